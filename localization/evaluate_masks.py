"""How well masks match the ground truth: see vicrop/localization/evaluate_masks.py."""

from vicrop.localization.evaluate_masks import main

if __name__ == "__main__":
    main()
