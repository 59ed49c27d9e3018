"""RefCOCO, RefCOCO+ and RefCOCOg for localization heads: makes queries and ground truth of their annotations.

python -m localization.refcoco refcoco_val.json --images train2014 --out data/refcoco
python -m localization.refcoco "refcoco/refs(unc).p" --split testA --images train2014

Takes refer's official files (refs(unc).p with instances.json beside it), MDETR's (finetune_refcoco_val.json, ...) and
those of MiniGPT-4 and v2 (refcoco_val.json, ...); writes `<name>.jsonl` for `localization.pipeline stage=batch
data.data_file=...` and `<name>_gt.jsonl` for `localization.evaluate_boxes --dataset-jsonl ... --id-field question_id`,
and, where there are masks, for `localization.evaluate_masks`.
"""

import json
import pickle
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vicrop.command_line import CommandParser
from vicrop.dataset import Id, Query, box_of_truth, checked, refuse_bad_ids
from vicrop.files import atomic_path, read_json

COCO_NAME = re.compile(r"COCO_\w+?_\d{12}")  # of an image; a number of the phrase may follow


class Row(NamedTuple):
    """A phrase, and what it means in its image: a box [x, y, width, height], and a mask as COCO writes it."""

    key: Id
    phrase: str
    file_name: str
    box: Sequence[float]
    width: float
    height: float
    mask: Any = None  # polygons [[x, y, x, y, ...], ...], or RLE {"size", "counts"}


def from_mdetr(content: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of a COCO-like {"images", "annotations"}: an "image" has one phrase (`caption`) and one box."""
    truths = {}
    for annotation in content["annotations"]:
        if truths.setdefault(annotation["image_id"], annotation) is not annotation:
            raise ValueError(f"the phrase of image {annotation['image_id']} has several boxes")
    for image in content["images"]:
        if image["id"] not in truths:
            raise ValueError(f"image {image['id']} ({image['caption']!r}) has no annotation with a box")
        truth = truths[image["id"]]
        yield Row(image["id"], image["caption"], image["file_name"], truth["bbox"], image["width"], image["height"],
                  truth.get("segmentation"))  # fmt: skip


def from_minigpt(content: list[dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows of a list of {"img_id", "sents", "bbox", "width", "height"}."""
    for number, item in enumerate(content):
        phrases = [item["sents"]] if isinstance(item["sents"], str) else item["sents"]
        for index, phrase in enumerate(phrases):
            key = f"{number}" if len(phrases) == 1 else f"{number}-{index}"
            yield Row(key, phrase, coco_name(item["img_id"]), item["bbox"], item["width"], item["height"])


def from_refer(
    refs: Sequence[dict[str, Any]], instances: Mapping[str, Any], splits: Sequence[str]
) -> Iterator[tuple[str, Row]]:
    """Yield (split, row) of refer's refs(...).p and instances.json: a row for each sentence, with its mask."""
    annotations = {each["id"]: each for each in instances["annotations"]}
    sizes = {each["id"]: (each["width"], each["height"]) for each in instances["images"]}
    for ref in (ref for split in splits for ref in refs if ref["split"] == split):
        if ref["ann_id"] not in annotations or ref["image_id"] not in sizes:
            raise ValueError(f"instances.json has no annotation {ref['ann_id']} with image {ref['image_id']}")
        truth = annotations[ref["ann_id"]]
        for sentence in ref["sentences"]:
            yield ref["split"], Row(sentence["sent_id"], sentence["sent"], coco_name(ref["file_name"]), truth["bbox"],
                                    *sizes[ref["image_id"]], truth["segmentation"])  # fmt: skip


def coco_name(name: str) -> str:
    """The name of an image of COCO, of a name that a number of the phrase may follow; a ValueError if it is none."""
    found = COCO_NAME.match(name)
    if not found:
        raise ValueError(f"an image's name must begin like COCO_train2014_000000000009, not {name!r}")
    return f"{found[0]}.jpg"


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers; a pickle that holds anything else may run code, and is refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse it."""
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and only plain data is read")


def read_refs(path: str | Path) -> list[dict[str, Any]]:
    """The content of refer's refs(...).p; a ValueError, naming the file, if it is broken or more than plain data."""
    try:
        with Path(path).open("rb") as file:
            return PlainUnpickler(file, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is none of refer's files: {error}") from error


def rows_of(content: Any) -> Iterator[Row]:
    """The rows of either kind of JSON file, in the order of the file."""
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return from_mdetr(content)
    if isinstance(content, list) and content and {"img_id", "sents", "bbox"} <= content[0].keys():
        return from_minigpt(content)
    raise ValueError('it is neither MDETR\'s {"images", "annotations"} nor MiniGPT-4\'s list with img_id, sents, bbox')


def checked_row(row: Row) -> Row:
    """The row, if its phrase is a text and its box lies in its image; else a ValueError that names it."""
    name = repr(row.key)
    checked({"id": row.key, "prompt": row.phrase, "image_path": row.file_name}, Query, name)
    box_of_truth({"id": row.key, "bbox": row.box, "width": row.width, "height": row.height}, name)
    return row


def read(annotations: Path, split: str) -> tuple[str, list[Row]]:
    """(what the files are to be called, the rows) of a file of annotations; `split` is one of refer's.

    Raises:
        ValueError, OSError: naming the file.
    """
    refers = annotations.suffix == ".p"
    try:
        if refers:
            content = read_refs(annotations), read_json(annotations.with_name("instances.json"))
            rows = [checked_row(row) for _, row in from_refer(*content, [split])]
        else:
            rows = list(map(checked_row, rows_of(read_json(annotations))))
    except KeyError as error:
        raise ValueError(f"{annotations}: a record has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{annotations}: a record is not as expected: {error}") from error
    except ValueError as error:
        raise ValueError(str(error) if str(annotations) in str(error) else f"{annotations}: {error}") from error
    if not rows:
        raise ValueError(f"{annotations} has no phrase" + (f" of the split {split!r}" if refers else ""))
    refuse_bad_ids([{"id": row.key} for row in rows], annotations)
    return f"{annotations.resolve().parent.name}_{split}" if refers else annotations.stem, rows


def convert(
    annotations: str | Path, images: str | Path, out: str | Path, split: str = "val"
) -> tuple[Path, Path, int, list[str]]:
    """Write both files; returns (queries' file, ground truth's file, number of phrases, [missing image files])."""
    annotations, images, out = Path(annotations), Path(images).resolve(), Path(out)
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder at {images}: --images must be the folder of the COCO images")
    stem, rows = read(annotations, split)
    queries, truths = [], []
    for row in rows:
        image_path = str(images / Path(row.file_name).name)
        queries.append({"id": str(row.key), "prompt": row.phrase, "image_path": image_path})
        truth = {"question_id": str(row.key), "bbox": row.box, "image_path": image_path, "prompt": row.phrase,
                 "width": row.width, "height": row.height}  # fmt: skip
        truths.append(truth | ({} if row.mask is None else {"segmentation": row.mask}))
    queries_file, truths_file = (out / f"{stem}{ending}" for ending in (".jsonl", "_gt.jsonl"))
    for path, lines in ((queries_file, queries), (truths_file, truths)):
        write_lines(path, lines)
    missing = sorted({query["image_path"] for query in queries if not Path(query["image_path"]).is_file()})
    return queries_file, truths_file, len(rows), missing


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write a file of JSON lines."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = CommandParser(None, __doc__)
    parser.add_argument("annotations", help="refs(unc).p, or refcoco*.json")
    parser.add_argument("--images", required=True, help="folder of the COCO images (train2014)")
    parser.add_argument("--out", default="data/refcoco", help="folder to write into")
    parser.add_argument("--split", default="val", help="of refs(...).p: train, val, testA, testB or test")
    args = parser.parse_args(argv)
    try:
        queries, truths, count, missing = convert(args.annotations, args.images, args.out, args.split)
    except (ValueError, OSError) as error:
        sys.exit(f"refcoco: {error}")
    print(f"{count} phrases: {queries}, {truths}")
    if missing:
        print(f"{len(missing)} images are missing, for example {missing[0]}", file=sys.stderr)


if __name__ == "__main__":
    main()
