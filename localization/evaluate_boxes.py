"""How well boxes match the ground truth: see vicrop/localization/evaluate_boxes.py."""

from vicrop.localization.evaluate_boxes import main

if __name__ == "__main__":
    main()
