"""The papers' findings: see vicrop/findings/command.py."""

from vicrop.files import ROOT
from vicrop.findings.command import main

if __name__ == "__main__":
    main(results=ROOT / "data" / "results")
