"""Sets of the street world: reproducible, of all kinds and sizes, boxes in their images, masks that fit their boxes."""

import argparse
import json
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tiny.questions import ABSENT, KINDS
from tiny.sets import kinds_of, write_set
from vicrop.dataset import load_task
from vicrop.tables import SIZES

coco = pytest.importorskip("pycocotools.mask")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return folder, write_set(folder, seed=5, per_kind=6, large=3, huge=2)


def test_a_set_is_reproducible_and_can_be_loaded(made, tmp_path):
    folder, records = made
    assert load_task(folder / "data.json") == records
    assert write_set(tmp_path / "again", seed=5, per_kind=6, large=3, huge=2) == records
    assert (tmp_path / "again/grounding.jsonl").read_text() == (folder / "grounding.jsonl").read_text()
    other = write_set(tmp_path / "other", seed=6, per_kind=6)
    assert [record["question"] for record in other] != [record["question"] for record in records]


def test_all_kinds_and_sizes_are_there(made):
    _, records = made
    found = Counter((record["category"], record["size"]) for record in records)
    assert found["presence", ABSENT] == 3
    for kind in KINDS:
        assert sum(number for (of, _), number in found.items() if of == kind) == 6
        assert all(found[kind, size] for size in SIZES)


def test_boxes_lie_in_their_images_and_sizes_are_theirs(made):
    folder, records = made
    sides = []
    for record in records:
        with Image.open(folder / "images" / record["image_path"]) as image:
            assert list(image.size) == record["image_size"]
        width, height = record["image_size"]
        sides.append(max(width, height))
        for x1, y1, x2, y2 in [record["gt_bbox"], *record["gt_bboxes"]]:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
        if record["size"] == ABSENT:
            assert record["gt_bbox"] == [0, 0, width, height]
            assert record["gt_bboxes"] == []
        else:
            corners = np.array(record["gt_bboxes"])
            assert record["gt_bbox"] == [*corners[:, :2].min(0), *corners[:, 2:].max(0)]
            share = ((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).min() / (width * height)
            low = dict(zip(SIZES, [0, *SIZES.values()], strict=False))[record["size"]]
            assert low <= share < 1.3 * SIZES[record["size"]] + 0.001
    assert sum(side > 4000 for side in sides) == 2
    assert sum(1024 < side < 4000 for side in sides) >= 3


def test_masks_fit_their_boxes(made):
    folder, records = made
    lines = [json.loads(line) for line in (folder / "grounding.jsonl").read_text().splitlines()]
    assert len(lines) >= len({record["image_path"] for record in records})
    assert len({line["id"] for line in lines}) == len(lines)
    for line in lines:
        mask = coco.decode(line["segmentation"])
        assert mask.shape == (line["height"], line["width"])
        rows, columns = np.where(mask)
        x, y, width, height = line["bbox"]
        assert x - 1 <= columns.min() <= columns.max() <= x + width
        assert y - 1 <= rows.min() <= rows.max() <= y + height
        assert mask.sum() > 0.3 * width * height


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"large": 2, "huge": 2}, "--large and --huge must be at least 0, and together at most 3, .*; got 2 and 2"),
        ({"large": -1}, "--large and --huge must be at least 0, .*; got -1 and 0"),
        ({"per_kind": 2}, "--per_kind must be at least 3, one question of each size; got 2"),
    ],
)
def test_numbers_out_of_range_are_refused(wanted, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        write_set(tmp_path, 1, **{"per_kind": 3, "kinds": ("reading",)} | wanted)
    assert not any(tmp_path.iterdir())


def test_a_set_is_only_replaced_when_that_is_asked_for(tmp_path):
    first = write_set(tmp_path, 1, 6, ("reading",))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=r"has a data.json already: choose another --out, or add --overwrite"):
        write_set(tmp_path, 2, 3, ("reading",))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    second = write_set(tmp_path, 2, 3, ("reading",), overwrite=True)
    assert second != first
    pictures = {record["image_path"] for record in second}
    assert {path.name for path in (tmp_path / "images").iterdir()} == pictures  # none of the first set is left
    phrases = [json.loads(line) for line in (tmp_path / "grounding.jsonl").read_text().splitlines()]
    assert {line["image_path"] for line in phrases} <= {f"images/{name}" for name in pictures}


def test_a_killed_set_has_no_files_that_tell_of_another(tmp_path, monkeypatch):
    write_set(tmp_path, 1, 3, ("reading",))
    monkeypatch.setattr("tiny.sets.Writer.add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_set(tmp_path, 2, 3, ("reading",), overwrite=True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_pycocotools_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=r"need pycocotools: pip install 'vicrop\[masks\]'"):
        write_set(tmp_path / "new", 2, 3, ("reading",))
    assert not (tmp_path / "new").exists()


def test_an_unknown_kind_is_named():
    assert kinds_of("reading,count") == ["reading", "count"]
    with pytest.raises(argparse.ArgumentTypeError, match="colour: choose from reading, attribute"):
        kinds_of("reading,colour")
