"""Cells that every question lights are found, and can be left out; nothing else is."""

import os
import sys

import numpy as np
import pytest

from vicrop.files import ROOT, read_json, read_rows
from vicrop.localization import pipeline
from vicrop.localization.config import Logic, Selection
from vicrop.localization.grounding import ground
from vicrop.localization.sinks import LEAST, SinkCounter, hash_of, read_sinks, without_sinks, write_sinks

PHRASES = ROOT / "data/demo/grounding.jsonl"
SHAPE = (4, 2, 8, 8)
HEAD, SINK = (2, 1), (6, 6)  # the head that localizes, and the cell that it lights whatever the question is


def sample(place, seed):
    """Attention in which HEAD lights a place and, more, the sink; the others light anything."""
    attention = np.random.default_rng(seed).random(SHAPE) * 1e-3
    attention[HEAD][place] += 0.2
    attention[(*HEAD, *SINK)] += 0.5
    return attention


@pytest.fixture
def sinks():
    counter = SinkCounter()
    for seed in range(LEAST):
        counter.add(sample((seed % 5, seed // 5), seed))
    assert counter.why_not is None
    return counter.sinks()


def test_what_is_lit_in_every_sample_is_found_and_nothing_else(sinks):
    assert [tuple(map(int, each)) for each in np.argwhere(sinks)] == [(*HEAD, *SINK)]


def test_lit_is_what_exceeds_the_threshold_of_the_criteria():
    counter = SinkCounter(threshold=0.3)  # the place is lit by 0.2, and the sink by 0.5
    for seed in range(LEAST):
        counter.add(sample((0, 0), seed))
    assert [tuple(map(int, each)) for each in np.argwhere(counter.sinks())] == [(*HEAD, *SINK)]


def test_a_file_is_loaded_once_until_it_is_written_anew(sinks, tmp_path):
    file = tmp_path / "sinks.npz"
    write_sinks(file, sinks)
    assert read_sinks(file) is read_sinks(str(file))
    write_sinks(file, ~sinks)
    os.utime(file, ns=(0, 1))
    assert np.array_equal(read_sinks(file), ~sinks)


def test_without_the_sink_the_box_is_that_of_the_phrase(sinks, tmp_path):
    write_sinks(tmp_path / "sinks.npz", sinks)
    attention, logic = sample((1, 1), 77), Logic(selection=Selection.fixed)
    logic.smoothing.sigma = 0.0
    boxes = [ground(each, (0, 0, 80, 80), (80, 80), logic, [HEAD]).peak
             for each in (attention, without_sinks(attention, tmp_path / "sinks.npz"))]  # fmt: skip
    assert boxes == [[65, 65], [15, 15]]
    left = without_sinks(attention, tmp_path / "sinks.npz") != attention
    assert np.array_equal(left, sinks)
    assert without_sinks(attention, None) is attention


def test_maps_of_several_shapes_and_few_samples_have_no_sinks(tmp_path):
    counter = SinkCounter()
    counter.add(sample((1, 1), 0))
    assert counter.why_not == f"1 samples are fewer than {LEAST}"
    counter.add(np.zeros((4, 2, 8, 9)))
    assert "different shapes" in counter.why_not


def test_a_file_of_other_maps_is_refused(sinks, tmp_path):
    write_sinks(tmp_path / "sinks.npz", sinks)
    with pytest.raises(ValueError, match=r"maps of shape \[4, 2, 8, 8\], and these are \[4, 2, 9, 9\]"):
        without_sinks(np.zeros((4, 2, 9, 9)), tmp_path / "sinks.npz")
    with pytest.raises(FileNotFoundError, match="stage=batch_analyze has written"):
        read_sinks(tmp_path / "gone.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="torn.npz has no attention sinks"):
        read_sinks(tmp_path / "torn.npz")


def test_a_batch_finds_sinks_and_goes_on_without_them(tmp_path, monkeypatch):
    def localize(*told):
        monkeypatch.setattr(sys, "argv", ["localization.pipeline"])
        pipeline.main(["model=llava_tiny", f"data.output_dir={tmp_path}", *told])

    lines = [f"data.data_file={PHRASES}", f"data.end_index={LEAST}"]
    localize("stage=batch", *lines)
    folder = tmp_path / "llava_tiny"
    localize("stage=batch_analyze", f"data.batch_attention_dir={folder}")
    file = folder / "attention_sinks.npz"
    sinks = read_sinks(file)
    assert sinks.ndim == 4
    assert read_json(folder / "localization_heads.json")["drop_sinks"] is None
    localize("stage=batch_analyze", f"data.batch_attention_dir={folder}", f"logic.drop_sinks={file}")
    assert read_json(folder / "localization_heads.json")["drop_sinks"] == hash_of(file)
    key = read_rows(PHRASES)[0]["id"]
    before = read_json(folder / f"{key}_bbox.json")
    localize("stage=batch", *lines, f"logic.drop_sinks={folder}/attention_sinks.npz")
    after = read_json(folder / f"{key}_bbox.json")
    assert "drop_sinks" in after["made_with"]["logic"]
    assert "drop_sinks" not in before["made_with"]["logic"]
    boxes = []
    for name, columns in (("none", slice(0, 0)), ("left", slice(0, 7)), ("right", slice(7, None))):
        planted = np.zeros_like(sinks)
        planted[..., columns] = True
        write_sinks(tmp_path / f"{name}.npz", planted)
        localize("stage=batch", *lines[:1], "data.end_index=1", f"logic.drop_sinks={tmp_path / name}.npz")
        boxes.append(read_json(folder / f"{key}_bbox.json")["bbox"])
    assert boxes[0] == before["bbox"]  # what has no sinks is as without the option
    assert boxes[1] != boxes[2]
    for path in folder.glob(f"{key}*"):
        path.unlink()  # too few samples are left
    localize("stage=batch_analyze", f"data.batch_attention_dir={folder}")
    assert not file.exists()
