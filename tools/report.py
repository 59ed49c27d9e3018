"""The page of results: see vicrop/evaluation/report.py."""

from vicrop.evaluation.report import main

if __name__ == "__main__":
    main()
