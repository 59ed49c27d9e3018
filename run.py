"""The command that runs ViCrop over a dataset or asks about one picture: see vicrop/evaluation/command.py.

    python run.py --model llava_tiny --task demo --method rel_att
    python run.py --model llava_tiny --image photo.jpg --question "what number is on the red sign?"

Notebooks import `vicrop_qa` from here: one question about one picture.
"""

from vicrop.evaluation.command import main
from vicrop.files import ROOT

if __name__ == "__main__":
    main(results=ROOT / "data" / "results")
else:
    from vicrop.crop import vicrop_qa

    __all__ = ["main", "vicrop_qa"]
