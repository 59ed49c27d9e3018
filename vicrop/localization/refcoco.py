"""RefCOCO, RefCOCO+ and RefCOCOg for localization heads: makes queries and ground truth of their annotations.

python -m localization.refcoco refcoco_val.json --images train2014 --out data/refcoco

Takes MDETR's files (finetune_refcoco_val.json, ...) and those of MiniGPT-4 and v2 (refcoco_val.json, ...); writes
`<name>.jsonl` for `localization.pipeline stage=batch data.data_file=...` and `<name>_gt.jsonl` for
`localization.evaluate_boxes --dataset-jsonl ... --id-field question_id`.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vicrop.command_line import CommandParser
from vicrop.dataset import Id, Query, box_of_truth, checked, refuse_bad_ids
from vicrop.files import atomic_path, read_json

COCO_NAME = re.compile(r"COCO_\w+?_\d{12}")  # of an image; a number of the phrase may follow

Row = tuple[
    Id, str, str, Sequence[float], float, float
]  # id, phrase, image, [x, y, width, height], image's width, height


def from_mdetr(content: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of a COCO-like {"images", "annotations"}: an "image" has one phrase (`caption`) and one box."""
    boxes = {}
    for annotation in content["annotations"]:
        if boxes.setdefault(annotation["image_id"], annotation["bbox"]) is not annotation["bbox"]:
            raise ValueError(f"the phrase of image {annotation['image_id']} has several boxes")
    for image in content["images"]:
        if image["id"] not in boxes:
            raise ValueError(f"image {image['id']} ({image['caption']!r}) has no annotation with a box")
        yield image["id"], image["caption"], image["file_name"], boxes[image["id"]], image["width"], image["height"]


def from_minigpt(content: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows of a list of {"img_id", "sents", "bbox", "width", "height"}."""
    for number, item in enumerate(content):
        name = COCO_NAME.match(item["img_id"])
        if not name:
            raise ValueError(f"img_id must begin like COCO_train2014_000000000009, not {item['img_id']!r}")
        phrases = [item["sents"]] if isinstance(item["sents"], str) else item["sents"]
        for index, phrase in enumerate(phrases):
            key = f"{number}" if len(phrases) == 1 else f"{number}-{index}"
            yield key, phrase, f"{name[0]}.jpg", item["bbox"], item["width"], item["height"]


def rows_of(content: Any) -> Iterator[Row]:
    """The rows of either kind of file, in the order of the file."""
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return from_mdetr(content)
    if isinstance(content, list) and content and {"img_id", "sents", "bbox"} <= content[0].keys():
        return from_minigpt(content)
    raise ValueError('it is neither MDETR\'s {"images", "annotations"} nor MiniGPT-4\'s list with img_id, sents, bbox')


def checked_row(row: Row) -> Row:
    """The row, if its phrase is a text and its box lies in its image; else a ValueError that names it."""
    key, phrase, file_name, box, width, height = row
    checked({"id": key, "prompt": phrase, "image_path": file_name}, Query, repr(key))
    box_of_truth({"id": key, "bbox": box, "width": width, "height": height}, repr(key))
    return row


def convert(annotations: str | Path, images: str | Path, out: str | Path) -> tuple[Path, Path, int, list[str]]:
    """Write both files; returns (queries' file, ground truth's file, number of phrases, [missing image files])."""
    annotations, images, out = Path(annotations), Path(images).resolve(), Path(out)
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder at {images}: --images must be the folder of the COCO images")
    content = read_json(annotations)
    try:
        rows = list(map(checked_row, rows_of(content)))
    except KeyError as error:
        raise ValueError(f"{annotations}: a record has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{annotations}: a record is not as expected: {error}") from error
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from error
    refuse_bad_ids([{"id": key} for key, *_ in rows], annotations)
    queries, truths = [], []
    for key, phrase, file_name, box, width, height in rows:
        image_path = str(images / Path(file_name).name)
        queries.append({"id": str(key), "prompt": phrase, "image_path": image_path})
        size = {"width": width, "height": height}
        truths.append({"question_id": str(key), "bbox": box, "image_path": image_path, "prompt": phrase} | size)
    queries_file, truths_file = (out / f"{annotations.stem}{ending}" for ending in (".jsonl", "_gt.jsonl"))
    for path, lines in ((queries_file, queries), (truths_file, truths)):
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    missing = sorted({query["image_path"] for query in queries if not Path(query["image_path"]).is_file()})
    return queries_file, truths_file, len(rows), missing


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("annotations", help="refcoco*.json")
    parser.add_argument("--images", required=True, help="folder of the COCO images (train2014)")
    parser.add_argument("--out", default="data/refcoco", help="folder to write into")
    args = parser.parse_args(argv)
    try:
        queries, truths, count, missing = convert(args.annotations, args.images, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"refcoco: {error}")
    print(f"{count} phrases: {queries}, {truths}")
    if missing:
        print(f"{len(missing)} images are missing, for example {missing[0]}", file=sys.stderr)


if __name__ == "__main__":
    main()
