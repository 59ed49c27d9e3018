"""Findings that take something away or change one thing: each equals what the toolkit itself gives in that place."""

import json
from hashlib import sha256

import numpy as np
import pytest
from builders import build_qwen2_5, photo

from vicrop.boxes import WINDOW_RATIOS, bbox_from_att_image_adaptive
from vicrop.dataset import load_task
from vicrop.evaluation import command as run
from vicrop.evaluation.metrics import graded
from vicrop.files import ROOT, read_json
from vicrop.findings import budget, causal, windows
from vicrop.findings import command as findings
from vicrop.findings import heads as of_heads
from vicrop.findings.measure import duration, halved, images_of
from vicrop.findings.phrases import asking_of
from vicrop.findings.sample import SAMPLES, chosen
from vicrop.heads import Criteria, frequent
from vicrop.layouts import Layout, raster
from vicrop.session import ImageSession

RECORDS = [{"id": str(n), "image_path": f"{n // 2}.jpg"} for n in range(1000)]


def find(folder, finding, *arguments, model="llava_tiny"):
    """(table, records or None, whether there is a plot) of a finding."""
    where = ["--model", model, "--device", "cpu", "--out", str(folder), "--save_path", str(folder)]
    findings.main([finding, *where, *map(str, arguments)])
    stem = folder / f"{model}-demo-{finding}"
    records = stem.with_suffix(".records.json")
    table = read_json(stem.with_suffix(".json"))
    return table, read_json(records) if records.exists() else None, stem.with_suffix(".png").exists()


def answered(folder, method, limit, *more):
    """The scores of a run of a method, without and with its crop."""
    where = ["--model", "llava_tiny", "--task", "demo", "--device", "cpu", "--save_path", str(folder / "runs")]
    run.main([*where, "--method", method, "--limit", str(limit), *more])
    results = read_json(folder / "runs" / f"llava_tiny-demo-{method}.json")
    return [(graded(each["original_answer"], each, "exact"), graded(each["crop_answer"], each, "exact"))
            for each in results], results  # fmt: skip


# --------------------------------------------------------------------------------------------------- samples and time
@pytest.mark.parametrize("finding", SAMPLES)
def test_a_sample_has_the_size_that_help_says_and_is_always_the_same(finding, capsys):
    sample = chosen(RECORDS, finding)
    assert len(sample) == SAMPLES[finding]
    assert sample == chosen(RECORDS, finding) == sorted(sample, key=lambda each: int(each["id"]))
    assert int(sample[0]["id"]) < 100 < 900 < int(sample[-1]["id"])
    assert chosen(RECORDS, finding, limit=7) == RECORDS[:7]
    assert chosen(RECORDS[:9], finding) == RECORDS[:9]
    with pytest.raises(SystemExit):
        findings.main(["--help"])
    assert f"{finding} {SAMPLES[finding]}" in " ".join(capsys.readouterr().out.split())


def test_halves_are_about_different_images():
    choosing, judging = halved(RECORDS)
    assert not set(images_of(choosing)) & set(images_of(judging))
    assert len(choosing) == len(judging) == 500
    with pytest.raises(ValueError, match="at least 2 images"):
        halved(RECORDS[:2])


def test_a_finding_says_how_long_it_will_take_before_it_goes_on(tmp_path, capsys):
    find(tmp_path, "high", "--limit", 4, "--method", "rel_att")
    said = capsys.readouterr().err
    assert "llava_tiny high: 4 of 4 questions to measure, one at a time; the task has 360" in said
    assert "llava_tiny high: 2 more will take about" in said
    assert [duration(seconds) for seconds in (4, 300, 9000)] == ["4 s", "5 min", "2.5 h"]


# ------------------------------------------------------------------------------------------------------------- windows
def test_a_single_multiple_has_windows_of_its_size():
    rng = np.random.default_rng(0)
    att_map = rng.random((14, 20))
    for ratio in WINDOW_RATIOS:
        x1, y1, x2, y2 = bbox_from_att_image_adaptive(att_map, (600, 420), 100, (ratio,))
        assert x2 - x1 == y2 - y1 == 2 * int(100 * ratio // 2)
    assert bbox_from_att_image_adaptive(att_map, (600, 420), 700, (1.4,)) == (0, 0, 600, 420)
    boxes = [bbox_from_att_image_adaptive(att_map, (600, 420), 100, (ratio,)) for ratio in WINDOW_RATIOS]
    assert bbox_from_att_image_adaptive(att_map, (600, 420), 100) in boxes


def test_windows_chosen_of_six_at_the_base_are_those_of_the_method(tmp_path):
    table, records, drawn = find(tmp_path, "windows", "--limit", 6)
    scores, _ = answered(tmp_path, "rel_att", 6)
    assert [record["with_crop"]["rel_att"]["112"]["chosen of six"] for record in records] == [b for _, b in scores]
    assert [record["score"] for record in records] == [a for a, _ in scores]
    assert list(table["rows"]) == [*(str(float(ratio)) for ratio in WINDOW_RATIOS), "chosen of six"]
    assert list(table["rows"]["1.2"]) == ["rel_att, base 56", "rel_att, base 112", "rel_att, base 224"]
    assert drawn


def test_the_best_window_is_chosen_on_one_half_of_the_images_and_judged_on_the_other():
    records = [{"id": n, "image_path": str(n), "score": 0} for n in range(8)]
    choosing, judging = halved(records)
    for half, right in ((choosing, "1.4"), (judging, "1")):  # what is best to choose by is worst to judge
        for record in half:
            scores = {str(ratio): 100.0 * (str(ratio) == right) for ratio in WINDOW_RATIOS}
            record["with_crop"] = {"rel_att": {"112": scores | {windows.CHOSEN: 100.0}}}
    base, best = windows.worth_of_choosing(records, "112", ["rel_att"])
    assert "gives 50.0 [" in base
    assert "gives 100.0 [100.0, 100.0] points over always 1.4 times the base, which is best on one half" in best
    assert len(list(windows.worth_of_choosing(records[:1], "112", ["rel_att"]))) == 1


# ---------------------------------------------------------------------------------------------------------------- high
def test_tiles_on_and_off_are_the_two_methods(tmp_path):
    table, records, _ = find(tmp_path, "high", "--limit", 16, "--method", "rel_att")
    for method in ("rel_att", "rel_att_high"):
        scores, results = answered(tmp_path, method, 16)
        assert [record["with_crop"][method] for record in records] == [b for _, b in scores]
    assert [record["tiles"] for record in records] == [each["views"] for each in results]
    parts = [table["rows"][name]["rel_att"]["n"] for name in ("one tile", "several tiles")]
    assert sum(parts) == 16
    assert min(parts) > 0


# ---------------------------------------------------------------------------------------------------------------- gate
def test_a_gate_is_what_crop_below_gives(tmp_path):
    table, records, drawn = find(tmp_path, "gate", "--limit", 24, "--method", "rel_att")
    rows = table["rows"]
    assert rows["0.0"]["crops"]["mean"] == 0
    assert rows["1.0"]["crops"]["mean"] == 100
    _, results = answered(tmp_path, "rel_att", 24, "--crop_below", "0.9")
    assert rows["0.9"]["crops"]["mean"] == pytest.approx(100 * np.mean(["gated" not in each for each in results]))
    scores = [graded(each["crop_answer"], each, "exact") for each in results]
    assert rows["0.9"]["rel_att"]["mean"] == pytest.approx(np.mean(scores))
    assert rows["0.0"]["rel_att"]["mean"] == pytest.approx(np.mean([record["score"] for record in records]))
    assert drawn


# -------------------------------------------------------------------------------------------------------------- budget
def test_a_budget_has_no_meaning_at_fixed_resolution_and_is_not_drawn(tmp_path, capsys):
    table, records, drawn = find(tmp_path, "budget")
    assert "no option changes the resolution in which llava_tiny sees an image" in capsys.readouterr().out
    assert table["rows"] == {}
    assert records is None
    assert not drawn


def test_a_budget_counts_every_token_of_every_image(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "RESOLUTIONS", (0.5, 1, 4))
    monkeypatch.setattr(budget, "WITH_CROP", (1,))
    table, records, drawn = find(tmp_path, "budget", "--limit", 2, "--method", "rel_att,rel_att_high",
                                 model="qwen2_5_tiny")  # fmt: skip
    base = 18432
    assert list(table["rows"])[:3] == [f"no crop at {int(factor * base)}" for factor in budget.RESOLUTIONS]
    for record in records:
        ways = record["ways"]
        plain = [ways[f"no crop at {int(factor * base)}"]["visual tokens"] for factor in budget.RESOLUTIONS]
        assert plain == sorted(plain)
        assert all(each <= factor * base / 16**2 for each, factor in zip(plain, budget.RESOLUTIONS, strict=True))
        assert all(way["seconds"] > 0 for way in ways.values())
        with_crop, tiled = ways[f"rel_att at {base}"], ways[f"rel_att_high at {base}"]
        assert plain[1] < with_crop["visual tokens"] <= 2 * plain[1] + 8
        assert tiled["visual tokens"] >= with_crop["visual tokens"] + plain[1] - 8  # a tile at least
    assert drawn


def test_counted_tokens_are_those_of_image_and_crop():
    model, processor = build_qwen2_5(layers=3)
    session = ImageSession([photo(120, 90)], model, processor)
    prompt = session.adapter.prompt("why?")
    with budget.counted_tokens() as tokens:
        session.answer([prompt])
        session.answer([prompt], crops=[photo(60, 60)])
    alone = ImageSession([photo(60, 60)], model, processor)
    assert tokens == [session.layouts[0].num_tokens, alone.layouts[0].num_tokens]


# --------------------------------------------------------------------------------------------------------------- heads
def test_heads_are_found_on_other_images_than_they_are_judged_on(tmp_path, monkeypatch):
    monkeypatch.setattr(of_heads, "SHOWN", 6 * 8)
    table, records, drawn = find(tmp_path, "heads", "--limit", 24)
    kept = read_json(tmp_path / "llava_tiny-demo-heads_choosing.records.json")
    assert not set(images_of(kept)) & set(images_of(records))
    assert len(kept) + len(records) == 24
    assert table["settings"]["data_sha256"] == sha256((ROOT / "data/demo/grounding.jsonl").read_bytes()).hexdigest()
    assert list(table["rows"]) == [str(count) for count in range(1, 11)]
    fixed = of_heads.orders_of([of_heads.as_measures(record) for record in kept])[of_heads.BOTH]
    assert fixed[:3] == frequent([of_heads.as_measures(record) for record in kept], Criteria())
    mean = np.mean([record[of_heads.BOTH]["pointing"][2] for record in records])
    assert table["more"]["pointing"]["rows"]["3"][of_heads.BOTH]["mean"] == pytest.approx(mean)
    shares = [next(iter(row.values()))["mean"] for row in table["more"]["frequency"]["rows"].values()]
    assert sum(shares) == pytest.approx(300)  # three heads a trial, of which all are shown here
    assert shares == sorted(shares, reverse=True)
    for name in ("heads", "heads_pointing", "heads_frequency"):
        assert (tmp_path / f"llava_tiny-demo-{name}.png").exists()
    assert drawn
    pointing = table["more"]["pointing"]["rows"]["3"]
    assert pointing[of_heads.BOTH]["mean"] > pointing[of_heads.NEITHER]["mean"]


def test_random_heads_are_others_for_each_phrase_and_the_same_ones_again():
    first, again, other = (of_heads.random_orders((6, 8), {"id": key}) for key in ("a", "a", "b"))
    assert first == again != other
    assert len(first) == of_heads.DRAWS
    for order in first:
        assert len(set(order)) == of_heads.MOST
        assert min(layer for layer, _ in order) >= 2


def test_heads_of_fewer_phrases_cost_no_measurement_of_more(tmp_path, monkeypatch):
    measure, asked = of_heads.measures_of, []

    def noted(mode, task_model, record):
        asked.append(record["id"])
        return measure(mode, task_model, record)

    monkeypatch.setattr(of_heads, "measures_of", noted)
    find(tmp_path, "heads", "--limit", 24)
    with pytest.raises(SystemExit, match="made with other settings"):  # other heads are judged
        find(tmp_path, "heads", "--limit", 8)
    find(tmp_path, "heads", "--limit", 24)
    assert len(asked) == len(set(asked))


def test_a_box_is_judged_by_overlap_and_a_map_by_its_peak():
    maps = np.zeros((3, 2, 10, 10))
    maps[2, 0, 2:4, 2:4] = 1
    maps[2, 1, 7:9, 7:9] = 5
    where = {"region": (0, 0, 100, 100), "size": (100, 100), "box": (20, 20, 40, 40)}
    one, two, *others = of_heads.judged(maps, [(2, 0), (2, 1)], 0.0, **where)
    assert one == (100, 100)
    assert two == (100, 0)  # both blobs are as large, and the upper one counts; the lower one is the brighter
    assert set(others) == {two}
    assert len(others) == of_heads.MOST - 2


def test_phrases_lie_beside_the_questions_or_are_named(tmp_path, capsys):
    lines = [
        {"question_id": n, "prompt": "a sign", "image_path": f"{n}.png", "bbox": [5, 5, 30, 30], "width": 90}
        for n in range(4)
    ]
    for line in lines:
        photo(90, 70, seed=line["question_id"]).save(tmp_path / line["image_path"])
    (tmp_path / "some_gt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = ["--model", "llava_tiny", "--device", "cpu", "--out", str(tmp_path)]
    findings.main(["heads", *where, "--question_path", str(tmp_path / "some_gt.jsonl")])
    records = read_json(tmp_path / "llava_tiny-some_gt-heads.records.json")
    assert len(records) == 2
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(SystemExit, match="no phrases at .*grounding.jsonl"):
        findings.main(["heads", *where, "--question_path", str(tmp_path / "data.json")])


def test_what_localization_does_otherwise_with_a_checkpoint_is_said():
    def asked(*told):
        return asking_of(findings.parse(["heads", *told])[1])

    assert asked("--model", "llava_tiny").notes == []
    assert asked("--model", "llava_tiny").conv_mode == "vqa"
    (note,) = asked("--model", "llava").notes  # its default checkpoint is that of llava15_7b.yaml
    assert "localization/ asks this checkpoint with --image_fit pad" in note
    assert asked("--model", "llava", "--image_fit", "pad").notes == []


# -------------------------------------------------------------------------------------------------------------- causal
def test_the_chosen_heads_cause_the_answer_more_than_random_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(causal, "DRAWS", 1)
    table, records, drawn = find(tmp_path, "causal", "--limit", 30)
    for kind in (causal.RANDOM, causal.SAME_LAYERS):
        assert causal.against(records, causal.SAYS_OTHER, kind)["low"] > 0
        assert causal.against(records, causal.EVENLY, kind)["mean"] < 0
    moved = [record for record in records if causal.MOVED in record]
    before = {causal.AS_IT_IS: (records, "score"), causal.BEFORE: (moved, "score"),
              causal.SAID_BEFORE: (moved, causal.SAID_BEFORE)}  # fmt: skip
    rows = table["rows"]
    assert list(rows) == [causal.AS_IT_IS, causal.EVENLY, causal.BEFORE, causal.MOVED, causal.SAID_BEFORE,
                          causal.SAYS_OTHER]  # fmt: skip
    for name, (group, field) in before.items():
        found = rows[name][causal.CHOSEN]
        assert (found["n"], found["mean"]) == (len(group), pytest.approx(np.mean([each[field] for each in group])))
    assert moved
    assert rows[causal.SAID_BEFORE][causal.CHOSEN]["mean"] < rows[causal.SAYS_OTHER][causal.CHOSEN]["mean"]
    assert drawn


def test_attention_is_moved_to_what_the_same_kind_of_question_is_about():
    asked = {"id": 1, "image_path": "a.jpg", "category": "reading", "gt_bbox": [0, 0, 9, 9], "labels": ["7"]}
    others = [asked | more for more in (
        {"id": 2, "gt_bbox": [20, 0, 29, 9], "labels": ["3"]},
        {"id": 3, "gt_bbox": [20, 0, 29, 9], "labels": ["yes"], "category": "presence"},
        {"id": 4, "gt_bbox": [20, 0, 29, 9]},  # the same label
        {"id": 5, "labels": ["3"]},  # the same place
        {"id": 6, "gt_bbox": None, "labels": ["3"]},
        {"id": 7, "gt_bbox": [20, 0, 29, 9], "labels": ["3"], "image_path": "b.jpg"},
    )]  # fmt: skip
    assert [other["id"] for other in causal.other_places([asked, *others], asked)] == [2]


def test_too_few_other_heads_are_said_before_anything_is_asked(tmp_path):
    with pytest.raises(SystemExit, match="compared with 1 other heads of layer 1, from layer 2 on, and there are 0"):
        find(tmp_path, "causal", "--limit", 3, "--loc_heads", "L1H0")
    assert not list(tmp_path.glob("*causal*"))


def test_random_heads_are_as_many_and_others():
    rng, chosen_heads = np.random.default_rng(0), [(2, 0), (2, 3), (4, 1)]
    pool = [(layer, head) for layer in range(2, 6) for head in range(5)]
    for same_layers in (False, True):
        for _ in range(20):
            found = causal.drawn(rng, chosen_heads, pool, same_layers)
            assert len(set(found)) == 3
            assert not set(found) & set(chosen_heads)
            if same_layers:
                assert sorted(layer for layer, _ in found) == [2, 2, 4]


def test_fewer_random_heads_than_chosen_ones_are_no_comparison():
    rng, pool = np.random.default_rng(0), [(layer, head) for layer in (2, 3) for head in range(3)]
    with pytest.raises(ValueError, match="with 4 other heads, from layer 2 on, and there are 2"):
        causal.drawn(rng, pool[:4], pool, False)
    with pytest.raises(ValueError, match="with 2 other heads of layer 2, from layer 2 on, and there are 1"):
        causal.drawn(rng, pool[:2], pool, True)
    with pytest.raises(ValueError, match="with 1 other heads of layer 1, from layer 2 on, and there are 0"):
        causal.drawn(rng, [(1, 0)], pool, True)


def test_attention_moves_to_the_cells_of_a_box_in_proportion():
    layout = Layout(13, raster(3, 4, 1), (10, 0, 50, 30))  # cells of 10 x 10 px
    shares = causal.covered(layout, (15, 10, 30, 20))
    assert shares.sum() == pytest.approx(1)
    assert shares[1].tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])
    weights = causal.weights_of(layout, shares)
    assert weights.tolist() == pytest.approx([0] * 5 + [1 / 3, 2 / 3] + [0] * 6)
    assert causal.covered(layout, (0, 0, 9, 9)) is None


def test_another_place_is_one_with_another_label_in_the_same_image():
    records = load_task("data/demo/data.json")
    for record in records[:20]:
        for other in causal.other_places(records, record):
            assert other["image_path"] == record["image_path"]
            assert other["labels"] != record["labels"]
            assert other["gt_bbox"] != record["gt_bbox"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["causal", "--loc_heads", "per_sample"], "heads of llava_tiny must be known: --loc_heads names them"),
        (["causal", "--method", "rel_att"], "--method must be left out: this finding is about attention heads"),
        (["heads", "--layer", "1"], "this finding is about all layers"),
        (["windows", "--method", "center_crop"], "center_crop makes no map"),
        (["high", "--method", "center_crop"], "center_crop has no variant with tiles"),
        (["gate", "--crop_below", "0.5"], "a finding is about the crops of all questions"),
        *(([name, "--regions", "2"], "--regions must be left out: this") for name in ("windows", "heads", "causal")),
        (["heads", "--ocr_tokens"], "--ocr_tokens must be left out: this finding is about phrases"),
        *(
            ([name, "--metric", "box_iou"], f"{name} scores answers, and box_iou judges the box of a crop")
            for name in ("attention", "gate", "high", "layers", "windows", "budget", "causal")
        ),
    ],
)
def test_what_has_no_meaning_is_a_sentence(tmp_path, capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        findings.main([*arguments, "--out", str(tmp_path)])
    assert says in capsys.readouterr().err + str(stopped.value.code)


@pytest.mark.parametrize(("finding", "limit"), [("windows", 1), ("high", 1), ("gate", 4), ("heads", 4), ("causal", 1)])
@pytest.mark.parametrize("model", ["blip_tiny", "qwen2_5_tiny"])
def test_every_model_has_these_findings(tmp_path, finding, limit, model):
    table, _, drawn = find(tmp_path, finding, "--limit", limit, model=model)
    assert table["rows"]
    assert table["settings"]["model"] == model
    assert drawn
