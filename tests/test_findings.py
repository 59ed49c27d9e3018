"""The findings: what each is by its definition, that it goes on after a kill, and the paper's own on llava_tiny."""

import json

import numpy as np
import pytest

from vicrop.dataset import load_task
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.scores import ScoreOptions, rows_of
from vicrop.files import read_json
from vicrop.findings import attention, layers
from vicrop.findings import command as findings
from vicrop.findings.measure import images_of
from vicrop.plots import bars_figure, curves_figure, save_figure

COMMON = ["--model", "llava_tiny", "--device", "cpu", "--limit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("findings")


def find(folder, *arguments):
    """What a finding writes: its table and what was measured of each question, if that is of its own."""
    findings.main([*map(str, arguments), "--out", str(folder), "--save_path", str(folder / "results")])
    stem = f"llava_tiny-demo-{arguments[0]}"
    assert (folder / f"{stem}.png").stat().st_size > 5000
    records = folder / f"{stem}.records.json"
    return read_json(folder / f"{stem}.json"), read_json(records) if records.exists() else None


# ---------------------------------------------------------------------------------------------------- attention ratio
def test_attention_ratio_of_an_even_map_is_one_and_of_a_planted_spot_is_large():
    region, box = (0, 0, 280, 140), (30, 40, 61, 85)
    assert attention.attention_ratio(np.ones((14, 14)), region, box) == pytest.approx(1)
    spot = np.full((14, 14), 1e-3)
    spot[5, 2] = 1  # x 40 to 60, y 50 to 60
    assert attention.attention_ratio(spot, region, box) > 10
    assert attention.attention_ratio(spot, region, (200, 40, 231, 85)) < 0.5
    assert np.isnan(attention.attention_ratio(spot, region, (-30, 0, -10, 9)))


def test_attention_ratio_of_an_even_map_is_one_also_in_a_box_between_pixels():
    ratios = attention.attention_ratio(np.ones((2, 3, 14, 14)), (0, 0, 100, 90), (3.3, 10.6, 40.9, 77.7))
    assert ratios.shape == (2, 3)
    assert ratios == pytest.approx(1)


@pytest.mark.parametrize("box", [(17, 3, 29, 9), (10, 0, 52, 20), (16, 4, 22, 8)])
def test_attention_ratio_equals_its_definition(box):
    rng = np.random.default_rng(0)
    att_map, region = rng.random((5, 7)), (10, 0, 52, 20)
    fine = np.kron(att_map, np.ones((4, 6)))  # one value per pixel
    x1, y1, x2, y2 = np.subtract(box, (10, 0, 10, 0))
    wide, high = x2 - x1, y2 - y1
    sums = [fine[y : y + high, x : x + wide].sum() for y in range(20 - high + 1) for x in range(42 - wide + 1)]
    assert attention.attention_ratio(att_map, region, box) == pytest.approx(fine[y1:y2, x1:x2].sum() / np.mean(sums))


# ------------------------------------------------------------------------------------------------- the paper's findings
def test_small_objects_are_misread_and_the_true_crop_bounds_the_methods(folder):
    table, _ = find(folder, "sizes", *COMMON, 90, "--method", "rel_att,loc_att")
    rows = table["rows"]
    assert list(rows) == ["small", "medium", "large", "all"]
    no_crop = [rows[size]["no crop"]["mean"] for size in ("small", "medium", "large")]
    assert no_crop == sorted(no_crop)
    assert no_crop[0] < no_crop[-1] - 20
    for method in ("rel_att", "loc_att"):
        assert rows["small"][method]["low"] > rows["small"]["no crop"]["mean"]
        assert rows["all"]["gt_crop"]["mean"] >= rows["all"][method]["mean"]
        results = folder / "results" / f"llava_tiny-demo-{method}.json"
        options = ScoreOptions(by=("size",))
        scored = rows_of(ResultFile.read(results), options)
        for row in scored:
            found = rows[row["part"]][method]
            assert (found["n"], found["mean"]) == (row["n"], pytest.approx(row["with_crop"]))


def test_attention_finds_the_place_also_where_the_answer_is_wrong(folder):
    table, records = find(folder, "attention", *COMMON, 60)
    rows = table["rows"]
    assert list(rows) == [str(layer) for layer in range(6)]
    assert max(row["wrong answers"]["low"] for row in rows.values()) > 1
    for layer, row in rows.items():
        wrong = [record["ratio"][int(layer)] for record in records if not record["score"]]
        assert row["wrong answers"]["mean"] == pytest.approx(np.mean(wrong))
        assert row["wrong answers"]["n"] + row["right answers"]["n"] == len(records) == 60


def test_the_layer_is_chosen_and_judged_on_different_images(folder):
    table, records = find(folder, "layers", *COMMON, 30, "--method", "rel_att")
    choosing, judging = layers.halved(records)
    assert not set(images_of(choosing)) & set(images_of(judging))
    assert len(choosing) + len(judging) == len(records)
    chosen = [np.mean([record["with_crop"]["rel_att"][str(layer)] for record in choosing]) for layer in range(6)]
    best = int(np.argmax(chosen))
    judged = [record["with_crop"]["rel_att"] for record in judging]
    right = table["rows"][str(best)]["rel_att, to judge"]["mean"]
    assert right == pytest.approx(np.mean([scores[str(best)] for scores in judged]))
    cost = np.mean([scores[str(best)] - scores["mean"] for scores in judged])
    (note, without) = table["notes"]
    assert note.startswith(f"rel_att: layer {best} is chosen")
    assert f"averaging all layers costs {cost:.1f} [" in note
    assert f"{np.mean([record['score'] for record in judging]):.1f} [" in without


def test_overhead_counts_what_each_method_does(folder):
    table, _ = find(folder, "overhead", *COMMON, 4, "--method", "rel_att,loc_att,center_crop")
    passes = {way: row["forward passes"]["mean"] for way, row in table["rows"].items()}
    assert list(passes) == ["no crop", "rel_att", "loc_att", "center_crop"]
    # A map of loc_att is read off the answer's own pass, and rel_att reads the general prompt besides. A crop's answer
    # is one pass where the first answer was confirmed, and each token that differs is one more.
    assert 0 <= passes["loc_att"] - passes["center_crop"] <= 1
    assert 0 <= passes["rel_att"] - passes["center_crop"] - 1 <= 1
    assert all(row["seconds"]["mean"] > 0 for row in table["rows"].values())


@pytest.mark.parametrize("model", ["blip_tiny", "qwen2_5_tiny"])
def test_every_model_has_its_findings(tmp_path, model):
    for finding, limit in (("attention", 6), ("layers", 4), ("overhead", 1), ("sizes", 4)):
        few = ["--method", "rel_att"] if finding != "attention" else []
        where = ["--out", str(tmp_path), "--save_path", str(tmp_path)]
        findings.main([finding, "--model", model, "--device", "cpu", "--limit", str(limit), *few, *where])
        table = read_json(tmp_path / f"{model}-demo-{finding}.json")
        assert table["settings"]["model"] == model
        counts = [each["n"] for row in table["rows"].values() for each in row.values()]
        assert 0 < max(counts) <= limit
        assert (tmp_path / f"{model}-demo-{finding}.png").exists()


@pytest.mark.parametrize("text", ["costs $5 # or $6", "$", "$x_$ and \\frac{"])
def test_names_with_dollars_are_drawn_as_they_are(tmp_path, text):
    found = {"no crop": {"mean": 1.0, "low": 0.5, "high": 2.0}}
    save_figure(bars_figure({text: found, "all": found}, "%", text), tmp_path / "bars.png")
    save_figure(curves_figure({0: found, 1: found}, "layer", "%", text), tmp_path / "curves.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("bars", "curves"))


# ------------------------------------------------------------------------------------------------------------ unbroken
def test_a_finding_that_is_killed_goes_on(tmp_path, monkeypatch):
    measure, asked = attention.ratios_of, []

    def interrupted(subject, record):
        asked.append(record["id"])
        if len(asked) == 5:
            raise KeyboardInterrupt
        return measure(subject, record)

    monkeypatch.setattr(attention, "ratios_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find(tmp_path, "attention", *COMMON, 8)
    _, records = find(tmp_path, "attention", *COMMON, 8)
    assert len(records) == 8
    assert sorted(asked) == sorted([*(record["id"] for record in records), asked[4]])
    find(tmp_path, "attention", *COMMON, 8)
    assert len(asked) == 9


def test_a_finding_goes_on_only_with_the_metric_that_its_scores_are_of(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def best(answer, labels): return 1")
    where = ["--model", "llava_tiny", "--device", "cpu", "--limit", "2", "--save_path", str(tmp_path)]

    def ask(metric, folder):
        findings.main(["attention", *where, "--metric", metric, "--out", str(tmp_path / folder)])

    ask("exact", "known")
    with pytest.raises(SystemExit, match="grader was 'exact' and is now 'vqa_paper'"):
        ask("vqa_paper", "known")
    ask(f"{own}:best", "own")
    own.write_text("def best(answer, labels): return 0")
    with pytest.raises(SystemExit, match="grader_sha256 was"):
        ask(f"{own}:best", "own")


def test_sizes_without_boxes_have_no_true_crop(tmp_path, capsys):
    records = [record | {"gt_bbox": None} for record in load_task("data/demo/data.json")[:2]]
    records += load_task("data/demo/data.json")[2:3]
    (tmp_path / "data.json").write_text(json.dumps(records))
    where = [
        "--task",
        "demo",
        "--question_path",
        tmp_path / "data.json",
        "--image_path",
        "data/demo/images",
        "--method",
        "rel_att",
    ]
    table, _ = find(tmp_path, "sizes", "--model", "llava_tiny", "--device", "cpu", *where)
    assert list(table["rows"]["all"]) == ["no crop", "rel_att"]
    assert "2 of 3 records have no gt_bbox, so there is no gt_crop" in table["notes"]


def test_a_record_that_cannot_be_measured_is_named_and_left_out(tmp_path, capsys):
    records = [
        {"id": "a", "question": "what?", "labels": ["1"], "image_path": "scene_00000.jpg", "gt_bbox": [9, 9, 99, 99]}
    ]
    records += [records[0] | {"id": "b", "gt_bbox": None}, records[0] | {"id": "c", "image_path": "gone.jpg"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    where = ["--task", "demo", "--question_path", tmp_path / "data.json", "--image_path", "data/demo/images"]
    table, _ = find(tmp_path, "attention", "--model", "llava_tiny", "--device", "cpu", *where)
    said = capsys.readouterr().err
    assert "b: record 'b' has no gt_bbox" in said
    assert "c: no image file" in said
    assert sum(row["n"] for row in table["rows"]["0"].values()) == 1
    assert "2 records could not be measured and are left out (--retry_errors tries them again)" in table["notes"]


def test_without_images_nothing_is_measured_and_no_error_is_kept(tmp_path):
    where = ["--model", "llava_tiny", "--device", "cpu", "--image_path", tmp_path / "none", "--limit", 2]
    with pytest.raises(SystemExit, match="no image folder at .*none: --image_path names it"):
        find(tmp_path, "attention", *where)
    assert not list(tmp_path.glob("*attention*"))


@pytest.mark.parametrize("finding", ["attention", "sizes"])
def test_a_record_that_cannot_be_scored_or_placed_is_named_and_left_out(tmp_path, capsys, finding):
    record = {"question": "what?", "labels": ["1"], "image_path": "scene_00001.jpg", "gt_bbox": [9, 9, 99, 99]}
    changes = {"fine": {}, "none": {"labels": []}, "number": {"labels": 3}, "turned": {"image_size": [446, 594]},
               "far": {"gt_bbox": [500, 9, 600, 99]}, "share": {"gt_bbox": [0.1, 0.1, 0.3, 0.3]}}  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([record | {"id": key} | more for key, more in changes.items()]))
    where = ["--task", "demo", "--question_path", tmp_path / "data.json", "--image_path", "data/demo/images"]
    where += ["--method", "center_crop"] if finding == "sizes" else []
    table, _ = find(tmp_path, finding, "--model", "llava_tiny", "--device", "cpu", *where)
    said = capsys.readouterr().err
    for key, says in (("none", "labels are a text"), ("number", "labels are a text"),
                      ("turned", "image_size [446, 594] is not"), ("far", "gt_bbox [500, 9, 600, 99]"),
                      ("share", "gt_bbox [0.1, 0.1, 0.3, 0.3]")):  # fmt: skip
        assert f"record {key!r}: {says}" in said
    if finding == "attention":
        assert sum(row["n"] for row in table["rows"]["0"].values()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["layers", "--method", "pure_grad"], "pure_grad reads no layer"),
        (["layers", "--layer", "1"], "this finding is about all layers"),
        (["attention", "--image", "x.png"], "the questions of a task"),
        (["attention", "--batch_size", "4"], "--batch_size must be left out: attention asks one question at a time"),
        (["overhead", "--save_maps"], "keeps no maps"),
        (["sizes", "--total_chunks", "2"], "by one process"),
        (["depth"], "unknown value 'depth': choose from sizes, "),
        (["sizes", "--max_image_pixels", "178956971"], "max_image_pixels must be 1 to 178956970, got 178956971"),
        (["sizes", "--model", "lava"], "unknown model 'lava': did you mean llava? Choose from llava, "),
        (["attention", "--limit", "1", "--question_path", "gone.json"], "gone.json"),
    ],
)
def test_what_cannot_be_found_is_a_sentence(tmp_path, capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        findings.main([*arguments, "--out", str(tmp_path)])
    assert says in capsys.readouterr().err + str(stopped.value.code)
