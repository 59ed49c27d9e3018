"""Boxes and points into masks with SAM: see vicrop/localization/refine.py."""

from vicrop.localization.refine import main

if __name__ == "__main__":
    main()
