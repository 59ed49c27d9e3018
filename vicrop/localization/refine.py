"""Refine boxes or points into masks with SAM, as the paper does for segmentation (arXiv 2503.06287).

python -m localization.refine --pred-root outputs/localization/MODEL --out outputs/localization/MODEL-sam

Reads every `<id>_bbox.json` of a folder (`bbox`, `peak`, `image_file`) and writes `<id>_mask.png` into another, which
`localization.evaluate_masks` judges. A box asks SAM for one mask; a point for three, of which the one counts that SAM
itself rates highest. Masks that are there already are kept, unless their prediction has been written since.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vicrop.command_line import CommandParser
from vicrop.dataset import numbers_of
from vicrop.files import in_repository, place_name, read_json, write_atomically
from vicrop.images import load_image
from vicrop.localization.viz import draw_mask
from vicrop.options import device_option
from vicrop.tables import CROPPERS

SAM = CROPPERS["sam"]
PROMPTS = {"box": ("bbox", 4), "peak": ("peak", 2)}  # --prompt -> the field with it, and how many numbers it has
ENDING, MASK = "_bbox.json", "_mask.png"
MADE = "refine.json"  # in the folder of the masks: how they were made
Found = tuple[str, str, tuple[float, ...]]  # name of a prediction, file of its image, box or point


def found_in(root: str | Path, prompt: str) -> tuple[list[Found], dict[str, str]]:
    """(what the predictions of a folder found, by image; {name: why it is left out} of the others).

    Raises:
        FileNotFoundError: there is no such folder, or no prediction in it.
    """
    field, count = PROMPTS[prompt]
    paths = sorted(Path(root).glob(f"[!.]*{ENDING}"))
    if not paths:
        raise FileNotFoundError(f"no {ENDING} in {root}: stage=batch of localization.pipeline writes them")
    found, wrong = [], {}
    for path in paths:
        name = path.name.removesuffix(ENDING)
        try:
            content = read_json(path)
        except ValueError:
            content = None
        place = numbers_of(content.get(field), count) if isinstance(content, dict) else None
        if place is None or not isinstance(content, dict) or not isinstance(content.get("image_file"), str):
            wrong[name] = "broken" if not isinstance(content, dict) else f"it has no {field} with an image_file"
        else:
            found.append((name, content["image_file"], place))
    return sorted(found, key=lambda each: each[1]), wrong


class Refiner:
    """SAM, and its processor.

        refiner = Refiner("facebook/sam-vit-huge")
        mask = refiner.masks(image, [[10, 20, 60, 80]], "box")[0]

    Args:
        name: hub id or folder of a checkpoint of transformers' SamModel; device: a torch device, by default the GPU.
    Raises:
        ValueError: one sentence: there is no such checkpoint, or it lacks weights of a SamModel.
    """

    def __init__(self, name: str = SAM, device: str | None = None):
        import torch
        from transformers import SamModel, SamProcessor

        from vicrop import outside
        from vicrop.checkpoints import default_device, quiet_libraries

        quiet_libraries()
        where = torch.device(device or default_device())
        self.model, self.processor = outside.load(SamModel, SamProcessor, name, where)

    def masks(self, image: Any, places: Sequence[Sequence[float]], prompt: str) -> list[Any]:
        """[(height, width) bool array] of some boxes (xyxy pixels) or points [x, y] of a PIL image, which is read once.

        Args:
            prompt: a name of PROMPTS, which says what the places are.
        """
        import torch

        asked = {"input_boxes": [[list(place) for place in places]]} if prompt == "box" else {
            "input_points": [[[list(place)] for place in places]]
        }  # fmt: skip
        inputs = self.processor(image, **asked, return_tensors="pt").to(self.model.device)
        sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes")]
        inputs |= {name: inputs[name].to(self.model.dtype) for name in asked}
        with torch.inference_mode():
            answer = self.model(**inputs, multimask_output=prompt == "peak")
        (masks,) = self.processor.post_process_masks(answer.pred_masks.cpu(), *(size.cpu() for size in sizes))
        best = answer.iou_scores[0].argmax(-1).cpu()  # of each place
        return [each[number].numpy() for each, number in zip(masks, best, strict=True)]


def refined(found: Sequence[Found], prompt: str, refiner: Refiner) -> Iterator[tuple[str, Any]]:
    """Yield (name, mask) of predictions that lie by image: those about one image are asked together.

    Where an image is gone or cannot be read, the sentence that says so stands in place of each mask.
    """
    for image_file, group in groupby(found, lambda each: each[1]):
        names, _, places = zip(*group, strict=True)
        try:
            image = load_image(in_repository(image_file))
        except (ValueError, OSError) as error:
            yield from ((name, str(error)) for name in names)
        else:
            yield from zip(names, refiner.masks(image, places, prompt), strict=True)


def refuse_other_masks(out: Path, made: dict[str, Any]) -> None:
    """Note in a folder how its masks are made; a ValueError if it has masks that were made otherwise."""
    note = out / MADE
    before = read_json(note) if note.is_file() else {}
    other = "; ".join(f"{name} was {before.get(name)!r} and is now {value!r}" for name, value in made.items()
                      if before.get(name) != value)  # fmt: skip
    if other and any(out.glob(f"*{MASK}")):
        raise ValueError(f"--out {out} has masks that were made otherwise ({other}): name another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(note, made)


def is_done(mask: Path, prediction: Path) -> bool:
    """Is there a mask that is not older than its prediction?"""
    return mask.is_file() and mask.stat().st_mtime_ns >= prediction.stat().st_mtime_ns


def refine(
    root: str | Path, out: str | Path, prompt: str = "box", sam: str = SAM, device: str | None = None
) -> dict[str, Any]:
    """Write the masks that are not there yet; what the command prints, as a dict; see its options."""
    root, out = Path(root), Path(out)
    if root.resolve() == out.resolve():
        raise ValueError(f"--out {out} has the masks of the heads themselves: name another folder")
    found, wrong = found_in(root, prompt)
    for name in wrong:
        (out / f"{name}{MASK}").unlink(missing_ok=True)  # of an earlier prediction: it would be scored
    masks = {each[0]: out / f"{each[0]}{MASK}" for each in found}
    if found:
        from vicrop.checkpoints import outside_weights  # it imports torch

        made = {"predictions": place_name(root), "prompt": prompt, "weights": outside_weights(sam)}
        refuse_other_masks(out, made)
    new = [each for each in found if not is_done(masks[each[0]], root / f"{each[0]}{ENDING}")]
    if new:
        for name, mask in tqdm(refined(new, prompt, Refiner(sam, device)), total=len(new), desc="masks"):
            if isinstance(mask, str):
                wrong[name] = mask
                masks.pop(name).unlink(missing_ok=True)
            else:
                draw_mask(mask, masks[name])
    return {"masks": len(masks), "out": str(out), "sam": sam, "prompt": prompt, "left_out": wrong}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(None, __doc__)
    add = parser.add_argument
    add("--pred-root", required=True, help="folder of the predictions")
    add("--out", required=True, help="folder for the masks")
    add(
        "--prompt", choices=PROMPTS, default="box", help="what SAM is shown: the box, or the point of the map's maximum"
    )
    add("--sam", default=SAM, help="checkpoint of transformers' SamModel: hub id or folder")
    add("--device", type=device_option, help="torch device; default: the GPU, else the CPU")
    args = parser.parse_args(argv)
    try:
        report = refine(args.pred_root, args.out, args.prompt, args.sam, args.device)
    except (ValueError, OSError) as error:
        sys.exit(f"refine: {error}")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
