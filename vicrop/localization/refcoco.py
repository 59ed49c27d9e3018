"""RefCOCO, RefCOCO+ and RefCOCOg for localization heads: from annotations to queries and ground truth.

python -m localization.refcoco refcoco_val.json --images train2014 --out data/refcoco

Takes MDETR's files (finetune_refcoco_val.json, ...) and those of MiniGPT-4 and v2 (refcoco_val.json, ...); writes
`<name>.jsonl` for `localization.pipeline stage=batch data.data_file=...` and `<name>_gt.jsonl` for
`localization.evaluate_boxes --dataset-jsonl ... --id-field question_id`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from vicrop.dataset import Query, box_of_truth, checked, refuse_bad_ids
from vicrop.files import atomic_path, read_json

COCO_NAME = re.compile(r"COCO_\w+?_\d{12}")  # of an image; what follows numbers the phrases about it


def from_mdetr(content):
    """Rows of a COCO-like {"images", "annotations"}: an image is a phrase (`caption`), with the one box of its id."""
    boxes = {}
    for annotation in content["annotations"]:
        if boxes.setdefault(annotation["image_id"], annotation["bbox"]) is not annotation["bbox"]:
            raise ValueError(f"the phrase of image {annotation['image_id']} has several boxes")
    for image in content["images"]:
        if image["id"] not in boxes:
            raise ValueError(f"image {image['id']} ({image['caption']!r}) has no annotation with a box")
        yield image["id"], image["caption"], image["file_name"], boxes[image["id"]], image["width"], image["height"]


def from_minigpt(content):
    """Rows of a list of {"img_id", "sents", "bbox", "width", "height"}."""
    for number, item in enumerate(content):
        name = COCO_NAME.match(item["img_id"])
        if not name:
            raise ValueError(f"img_id {item['img_id']!r} does not name a COCO image")
        phrases = [item["sents"]] if isinstance(item["sents"], str) else item["sents"]
        for index, phrase in enumerate(phrases):
            key = f"{number}" if len(phrases) == 1 else f"{number}-{index}"
            yield key, phrase, f"{name[0]}.jpg", item["bbox"], item["width"], item["height"]


def rows_of(content):
    """(id, phrase, image, [x, y, width, height], image width, image height) of either kind of file, in its order."""
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return from_mdetr(content)
    if isinstance(content, list) and content and {"img_id", "sents", "bbox"} <= content[0].keys():
        return from_minigpt(content)
    raise ValueError('it is neither MDETR\'s {"images", "annotations"} nor MiniGPT-4\'s list with img_id, sents, bbox')


def checked_row(row: tuple) -> tuple:
    """A row, if its phrase is a text and its box one in its image; else a ValueError that names it."""
    key, phrase, file_name, box, width, height = row
    checked({"id": key, "prompt": phrase, "image_path": file_name}, Query, repr(key))
    box_of_truth({"id": key, "bbox": box, "width": width, "height": height}, repr(key))
    return row


def convert(annotations, images, out):
    """Write both files: (the queries', the ground truth's, the number of phrases, [image files that are not there])."""
    annotations, images, out = Path(annotations), Path(images).resolve(), Path(out)
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder at {images}: --images names it")
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
    paths = [out / f"{annotations.stem}{ending}" for ending in (".jsonl", "_gt.jsonl")]
    for path, lines in zip(paths, (queries, truths), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    missing = sorted({query["image_path"] for query in queries if not Path(query["image_path"]).is_file()})
    return *paths, len(rows), missing


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        print(f"{len(missing)} images are not there, {missing[0]} for one", file=sys.stderr)


if __name__ == "__main__":
    main()
