"""RefCOCO, RefCOCO+ and RefCOCOg: phrases, and the box and the mask of what each means. From files to records.

The question of a record only makes the model look; what counts is the crop's box (metrics.box_point, ...). The phrase
is its `prompt`, for localization heads.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vicrop.dataset import box_xywh_to_xyxy
from vicrop.files import read_json
from vicrop.localization.refcoco import Row, checked_row, from_refer, read_refs, rows_of
from vicrop.prepare.source import Source

SPLITS = ("val", "testA", "testB", "test")  # all but train
BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # whose splits of refer's are the usual ones


def refcoco(source: Source) -> Iterator[dict[str, Any]]:
    """RefCOCO: refer's `refcoco/refs(unc).p` and `instances.json`, or the JSON of MDETR or MiniGPT-4."""
    return referring(source, "refcoco")


def refcoco_plus(source: Source) -> Iterator[dict[str, Any]]:
    """RefCOCO+, as `refcoco`."""
    return referring(source, "refcoco+")


def refcocog(source: Source) -> Iterator[dict[str, Any]]:
    """RefCOCOg, as `refcoco`; of refer's the splits of UMD."""
    return referring(source, "refcocog")


def referring(source: Source, name: str) -> Iterator[dict[str, Any]]:
    """The records of the phrases of one of the three; category is the split."""
    for split, row in phrases(source, name):
        row = checked_row(row)
        record = {"id": f"{split}-{row.key}", "question": f"where is {row.phrase}?", "prompt": row.phrase,
                  "image_path": Path(row.file_name).name, "image_size": [row.width, row.height],
                  "gt_bbox": box_xywh_to_xyxy(row.box), "category": split}  # fmt: skip
        yield record | ({} if row.mask is None else {"segmentation": row.mask})
    source.at = ""


def phrases(source: Source, name: str) -> Iterator[tuple[str, Row]]:
    """Yield (split, Row) of whatever files of a dataset there are; refer's, which have the masks, go first."""
    refs = f"{name}/refs({BY[name]}).p"
    if source.matching(refs):
        path = source.find(refs)
        source.at = str(path)
        yield from from_refer(read_refs(path), read_json(path.with_name("instances.json")), SPLITS)
        return
    pattern = re.compile(rf"(?:finetune_)?{re.escape(name)}_({'|'.join(SPLITS)})\.json")
    found = {split: sorted(file for file in source.by_name if (match := pattern.fullmatch(file)) and match[1] == split)
             for split in SPLITS}  # fmt: skip
    if not any(found.values()):
        raise ValueError(f"{source.folder} must hold {refs} with its instances.json, or {name}_val.json and the like")
    for split, files in found.items():
        if len(files) > 1:
            raise ValueError(f"{source.folder} must hold one file of {name}'s {split}, found: {', '.join(files)}")
        for file in files:
            source.at = file
            yield from ((split, row) for row in rows_of(source.json(file)))
