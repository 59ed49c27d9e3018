"""Localization heads from the command line: see vicrop/localization/pipeline.py."""

from vicrop.localization.pipeline import main

if __name__ == "__main__":
    main()
