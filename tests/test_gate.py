"""Crops only where the first answer is unsure: a gate of 1 is the plain run, one of 0 none at all, on every batch.

And what result files tell of it afterwards: gates, ensembles, one result against another.
"""

import json

import numpy as np
import pytest
from test_run import checkpoint, dataset, options, results  # noqa: F401

from vicrop.choices import MethodChoice, ModelChoice, wants_crop
from vicrop.crop import QuestionBatch, vicrop_qa
from vicrop.dataset import load_task
from vicrop.evaluation import command as run
from vicrop.evaluation import page_scores, paired, score_table
from vicrop.evaluation.batching import answer_batch
from vicrop.evaluation.ensembles import Vote, ensemble_rows, highest, majority
from vicrop.evaluation.gates import gate_rows, risk_coverage_area
from vicrop.evaluation.paired import compared
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.results import OUTPUT_FIELDS
from vicrop.evaluation.scores import ScoreOptions, row_of, rows_of
from vicrop.files import ROOT
from vicrop.loaded import load_chosen
from vicrop.session import ImageSession

COUNT = 8  # of the demo's questions
METHODS = ("rel_att", "center_crop")


# ------------------------------------------------------------------------------------------------------- while it runs
class Asked:
    """An embedded model and some of the demo's questions."""

    def __init__(self, name):
        self.loaded = load_chosen(ModelChoice(name, device="cpu"), MethodChoice(METHODS))
        self.records = load_task(ROOT / "data/demo/data.json")[:COUNT]

    def found(self, crop_below, size):
        """{method: what is added to each record} with a gate, in batches."""
        found = {method: [] for method in METHODS}
        for start in range(0, COUNT, size):
            batch = self.records[start : start + size]
            names = list(dict.fromkeys(record["image_path"] for record in batch))
            session = self.loaded.session([ROOT / "data/demo/images" / name for name in names])
            of = [names.index(record["image_path"]) for record in batch]
            asked = answer_batch(batch, lambda: (session, of), None, self.loaded.methods, crop_below)  # noqa: B023
            for method, fields in asked.items():
                found[method] += fields
        return found


@pytest.fixture(scope="module", params=["llava_tiny", "blip_tiny", "qwen2_5_tiny"])
def asked(request):
    return Asked(request.param)


def same(found, wanted):
    """Records are equal but for the last digits of probabilities and maps, which depend on who was in the batch."""
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"confidence", "map"}:
            assert one[name] == other[name]
        assert one["confidence"] == pytest.approx(other["confidence"], rel=1e-3)
        assert (one["map"] is None) == (other["map"] is None)


def test_gates_of_one_and_of_nought_and_between(asked):
    plain = asked.found(None, 1)
    first = [fields["confidence"]["original"] for fields in plain["rel_att"]]
    between = float(np.sort(first)[COUNT // 2 - 1 : COUNT // 2 + 1].mean())  # half of them are below
    for size in (1, COUNT):
        for method, fields in asked.found(1.0, size).items():
            same(fields, plain[method])
        for method, found in asked.found(between, size).items():
            gated = [fields.get("gated", False) for fields in found]
            assert gated == [p >= between for p in first]
            assert 0 < sum(gated) < COUNT
            open_ones = [number for number, shut in enumerate(gated) if not shut]
            same([found[n] for n in open_ones], [plain[method][n] for n in open_ones])
    for fields, wanted in zip(asked.found(0.0, COUNT)["rel_att"], plain["rel_att"], strict=True):
        assert fields["gated"] is True
        assert fields["bbox"] is fields["map"] is None
        assert fields["crop_answer"] == fields["original_answer"] == wanted["original_answer"]
        assert fields["confidence"]["crop"] == fields["confidence"]["original"]


def test_what_is_not_one_for_each_question_is_named(asked):
    session, _ = asked_session(asked)
    for name, given in (("of", [0]), ("short_questions", ["why?"] * 3), ("records", [{}])):
        says = f"{name} must be one for each question: 2 are asked, and it has {len(given)}"
        with pytest.raises(ValueError, match=says):
            QuestionBatch(session, ["why?", "who?"], **{name: given})
    assert QuestionBatch(session, ["why?", "who?"]).of == [0, 0]


def test_gated_questions_cost_the_others_of_their_batch_nothing(asked, monkeypatch):
    """Neither maps nor answers are asked for them."""
    (session, of), seen = asked_session(asked), []
    questions = [record["question"] for record in asked.records[:4]]
    batch = QuestionBatch(session, questions, of, [None] * 4, asked.records[:4])
    originals = batch.original_answers(asked.loaded.methods)
    batch.crop_below = sorted(answer.confidence for answer in originals)[2]
    answers = ImageSession.answers
    monkeypatch.setattr(
        ImageSession,
        "answers",
        lambda session, prompts, *a, **k: seen.append(len(prompts)) or answers(session, prompts, *a, **k),
    )
    found = batch.results(asked.loaded.methods["rel_att"], originals)
    assert seen == [2]
    assert sum(each.gated for each in found) == 2
    batch.crop_below = 0
    assert all(each.gated for each in batch.results(asked.loaded.methods["rel_att"], originals))
    assert seen == [2]


def asked_session(asked):
    records = asked.records[:4]
    names = list(dict.fromkeys(record["image_path"] for record in records))
    session = asked.loaded.session([ROOT / "data/demo/images" / name for name in names])
    return session, [names.index(record["image_path"]) for record in records]


def test_methods_that_choose_the_same_box_share_its_answer(asked, monkeypatch):
    session, of = asked_session(asked)
    batch = QuestionBatch(session, [asked.records[0]["question"]], of[:1], records=asked.records[:1])
    method, originals = asked.loaded.methods["center_crop"], batch.original_answers({})
    (first,) = batch.results(method, originals)
    monkeypatch.setattr(ImageSession, "answers", lambda *_, **__: pytest.fail("asked again"))
    (second,) = batch.results(method, originals)
    assert first == second


def test_a_notebook_may_gate_too(asked):
    record, loaded = asked.records[0], asked.loaded
    ask = (ROOT / "data/demo/images" / record["image_path"], record["question"], loaded.model, loaded.processor)
    name = {"llava": "llava_tiny", "instructblip": "blip_tiny", "qwen2_5_vl": "qwen2_5_tiny"}[
        loaded.model.config.model_type
    ]
    plain = vicrop_qa(name, "rel_att", *ask)
    assert vicrop_qa(name, "rel_att", *ask, crop_below=1) == plain
    assert vicrop_qa(name, "rel_att", *ask, crop_below=0) == (plain[0], plain[0], None)


def test_a_gate_is_a_setting_of_the_result(checkpoint, dataset, capsys):  # noqa: F811
    run.main(options(checkpoint, dataset, "--save_maps"))
    plain = results(dataset, "rel_att")
    with pytest.raises(SystemExit, match="crop_below was None and is now 0.5"):
        run.main(options(checkpoint, dataset, "--crop_below", "0.5", "--retry_errors"))
    run.main(options(checkpoint, dataset, "--crop_below", "0", "--overwrite", "--save_maps"))
    gated = results(dataset, "rel_att")
    assert [record["crop_answer"] for record in gated] == [record["original_answer"] for record in plain]
    assert not list((dataset / "out").glob("*.npz"))
    assert "were answered without" not in capsys.readouterr().out
    run.main(options(checkpoint, dataset, "--crop_below", "1", "--overwrite"))
    assert results(dataset, "rel_att") == plain
    assert not any("gated" in record for record in plain)
    assert {"confidence", "gated", "views"} <= set(OUTPUT_FIELDS)


@pytest.mark.parametrize("text", ["-0.1", "nan", "much", "inf"])
def test_a_gate_that_is_no_number_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        run.parse(["--crop_below", text])
    assert "is not a number from 0 (never) to 1 (always)" in capsys.readouterr().err


def test_when_a_crop_is_wanted():
    assert wants_crop(1.0, None)
    assert wants_crop(1.0, 1.0)
    assert wants_crop(0.5, 0.6)
    assert not wants_crop(0.6, 0.6)
    assert not wants_crop(0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------- afterwards
# (first answer, its p, answer with crop, its p); the label is "1"
ROWS = [("1", 0.99, "1", 0.9), ("2", 0.4, "1", 0.8), ("1", 0.7, "2", 0.3), ("2", 0.8, "3", 0.9), ("3", 0.2, "1", 0.1)]


def made(folder, method, rows=ROWS, model="llava_tiny", **more):
    records = [
        {"id": str(number), "question": "which?", "labels": "1", "image_path": f"{number}.png", "original_answer": a,
         "crop_answer": b, "bbox": [0, 0, 1, 1], "confidence": {"original": p, "crop": q}, **more}
        for number, (a, p, b, q) in enumerate(rows)
    ]  # fmt: skip
    path = folder / f"{model}-demo-{method}.json"
    path.write_text(json.dumps(records))
    return path


def test_the_surer_answer_has_a_column(tmp_path, capsys):
    made(tmp_path, "rel_att")
    (row, *_) = score_table.report(tmp_path, tmp_path, ScoreOptions())
    assert row["surer"] == pytest.approx(60)  # right in the first three
    records = json.loads((tmp_path / "llava_tiny-demo-rel_att.json").read_text())
    for record in records:
        del record["confidence"]
    assert "surer" not in row_of([(record, (0.0, 0.0)) for record in records], "exact", ScoreOptions())
    (tmp_path / "llava_tiny-demo-rel_att.json").write_text(json.dumps(records))
    score_table.report(tmp_path, tmp_path, ScoreOptions())
    assert capsys.readouterr().err.count("no column surer for what does not tell how sure the model was") == 1


def test_gates_are_worked_out_from_a_file(tmp_path):
    rows = {row["threshold"]: row for row in gate_rows(ResultFile.read(made(tmp_path, "rel_att")), ScoreOptions(by=()))}
    assert [rows[bound]["crops"] for bound in (0, 0.5, 0.8, 1)] == pytest.approx([0, 40, 60, 100])
    assert [rows[bound]["score"] for bound in (0, 0.5, 0.8, 1)] == pytest.approx([40, 80, 60, 60])
    assert rows[0.5]["against_always"] == pytest.approx(20)
    assert rows[1]["oracle"] == pytest.approx(80)
    assert rows[1]["surer"] == pytest.approx(60)


def test_gates_are_worked_out_for_each_size_where_that_is_asked_for(tmp_path, capsys):
    path = made(tmp_path, "rel_att")
    records = json.loads(path.read_text())
    for record, size in zip(records, ("small", "small", "large", "large", "large"), strict=True):
        record["size"] = size
    path.write_text(json.dumps(records))
    rows = gate_rows(ResultFile.read(path), ScoreOptions(by=("size",)))
    found = {(row["part"], row["threshold"]): (row["n"], row["crops"], row["score"]) for row in rows}
    assert found["small", 0.5] == pytest.approx((2, 50, 100))
    assert found["large", 0.5] == pytest.approx((3, 100 / 3, 200 / 3))
    assert found["all", 0.5] == pytest.approx((5, 40, 80))
    printed = {}
    for asked in ((), ("--by", "size")):
        score_table.main(["--data_dir", str(tmp_path), "--gate", *asked])
        printed[asked] = capsys.readouterr().out
    assert "small" not in printed[()]
    assert "small" in printed["--by", "size"]


def test_a_gated_file_tells_only_of_gates_below_its_own(tmp_path):
    path = made(tmp_path, "rel_att")
    records = json.loads(path.read_text())
    records[3] |= {"gated": True, "crop_answer": "2", "bbox": None}
    for p, highest_known in ((0.8, 0.8), (1.0, 0.999)):  # however sure it was, it never had a crop
        records[3]["confidence"] = {"original": p, "crop": p}
        path.write_text(json.dumps(records))
        rows = gate_rows(ResultFile.read(path), ScoreOptions(by=()))
        assert max(row["threshold"] for row in rows) == highest_known
        assert not any("low" in row for row in rows)
        assert "aurc" in rows[-1]


@pytest.mark.parametrize(
    ("scores", "confidences", "area"),
    [
        ([100, 100, 0, 0], [0.9, 0.8, 0.2, 0.1], (0 + 0 + 100 / 3 + 50) / 4),
        ([0, 100], [0.9, 0.1], 75),
        ([0, 100], [0.5, 0.5], 50),  # in any order
        ([100, 0, 100], [0.5, 0.5, 0.1], (50 + 50 + 100 / 3) / 3),
    ],
)
def test_the_area_under_the_risk_coverage_curve(scores, confidences, area):
    assert risk_coverage_area(scores, confidences) == pytest.approx(area)


def test_votes():
    votes = [Vote("a", 0.9, 0), Vote("b", 0.4, 100), Vote("B. ", 0.6, 100), Vote("c", 0.9, 0)]
    assert highest(votes) is votes[3]  # of equals the later one
    assert majority(votes) is votes[2]
    assert majority(votes[2:]) is votes[3]  # one each
    sure = [Vote("a", 1, 0), Vote("A", 1, 0), Vote("b", 1, 100), Vote("c", 0.9, 0), Vote("b", 0.9, 100)]
    assert highest(sure) is sure[1]  # of equals the one that most of them give


def test_checkpoints_of_one_name_are_members_with_first_answers_of_their_own(tmp_path):
    other = [(("9" if n == 2 else before), p, after, q) for n, (before, p, after, q) in enumerate(ROWS)]
    paths = [made(tmp_path, "rel_att"), made(tmp_path, "grad_att"), made(tmp_path, "loc_att", other)]
    files = [ResultFile.read(path) for path in paths]
    members = [row["member"] for row in ensemble_rows(files, ScoreOptions())]
    assert members[:5] == ["no crop before rel_att", "rel_att", "grad_att", "no crop before loc_att", "loc_att"]
    curves = [curve["name"] for curve in page_scores.risk_curves(files, "exact")]
    assert sum("without crop" in name for name in curves) == 2


def test_an_ensemble_against_its_best_member(tmp_path):
    other = [
        ("1", 0.99, "2", 0.95),
        ("2", 0.4, "1", 0.5),
        ("1", 0.7, "1", 0.99),
        ("2", 0.8, "1", 0.95),
        ("3", 0.2, "4", 0),
    ]
    files = [ResultFile.read(made(tmp_path, name, rows)) for name, rows in (("rel_att", ROWS), ("grad_att", other))]
    rows = {row["member"]: row for row in ensemble_rows(files, ScoreOptions())}
    members = {"no crop": 40, "rel_att": 60, "grad_att": 60}
    assert {name: rows[name]["score"] for name in members} == pytest.approx(members)
    assert rows["highest p"]["score"] == pytest.approx(80)  # the last one's first answer is the surest, and wrong
    assert rows["highest p"]["difference"] == pytest.approx(20)
    assert rows["highest p"]["low"] <= 20 <= rows["highest p"]["high"]
    assert rows["highest p"]["mcnemar_p"] == 1
    assert rows["majority, then p"]["score"] == pytest.approx(80)
    assert rows["the best answer of all (oracle)"]["score"] == pytest.approx(100)


def test_results_beside_each_other_are_told_apart_by_what_their_runs_did_otherwise(tmp_path):
    files = []
    for number, settings in enumerate(({}, {"regions": 2, "region_share": 0.5}, {"regions": 3, "crop_below": 0.9})):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = made(folder, "rel_att")
        told = {"settings": {"model": "llava_tiny", "task": "demo", "method": "rel_att"} | settings}
        path.with_suffix(".meta.json").write_text(json.dumps(told))
        files.append(ResultFile.read(path))
    wanted = ["rel_att", "rel_att, 2 regions", "rel_att, 3 regions below 0.9"]
    assert paired.names_of(files) == [each["method"] for each in page_scores.names_of(files)] == wanted
    assert {row["member"] for row in ensemble_rows(files, ScoreOptions())} > {"no crop", *wanted}
    assert [row["method"] for file in files for row in rows_of(file, ScoreOptions())] == wanted
    assert {row["method"] for file in files for row in gate_rows(file, ScoreOptions())} == set(wanted)


def test_two_results_against_each_other(tmp_path, capsys):
    other = [
        ("1", 0.9, "2", 0.9),
        ("2", 0.4, "1", 0.8),
        ("1", 0.7, "1", 0.3),
        ("2", 0.8, "3", 0.9),
        ("3", 0.2, "3", 0.1),
    ]
    paths = [made(tmp_path, "rel_att"), made(tmp_path, "grad_att", other)]
    (row,) = compared(*map(ResultFile.read, paths), ScoreOptions())
    assert (row["first"], row["second"], row["difference"]) == pytest.approx((60, 40, 20))
    assert row["mcnemar_p"] == 1
    assert row["outcomes"] == {
        ("right", "broken"): 1, ("fixed", "fixed"): 1, ("broken", "right"): 1, ("wrong", "wrong"): 1,
        ("fixed", "wrong"): 1,
    }  # fmt: skip
    score_table.main([str(path) for path in paths])
    printed = capsys.readouterr().out
    assert "rel_att 60.00, grad_att 40.00, difference +20.00" in printed
    assert "2 fixed by rel_att: with grad_att 1 fixed, 0 broken, 0 right, 1 wrong" in printed
    assert "1 broken by rel_att: with grad_att 0 fixed, 0 broken, 1 right, 0 wrong" in printed


@pytest.mark.parametrize("how", ["--gate", "--ensemble"])
def test_files_without_confidence_say_so_in_one_sentence(tmp_path, how, capsys):
    path = made(tmp_path, "rel_att", confidence=None)
    told = ["--data_dir", str(tmp_path), "--gate"] if how == "--gate" else ["--ensemble", str(path)]
    with pytest.raises(SystemExit, match="rel_att.json does not tell how sure the model was of its answers"):
        score_table.main(told)
    assert not capsys.readouterr().out


def test_what_does_not_go_together_is_refused(tmp_path, capsys):
    path = str(made(tmp_path, "rel_att"))
    for told, says in (
        ([path], "two result files are compared, not 1"),
        ([path, path, "--gate"], "one at a time"),
        (["--gate", "--ensemble", path], "one at a time"),
    ):
        with pytest.raises(SystemExit):
            score_table.main(told)
        assert says in capsys.readouterr().err
    records = json.loads((tmp_path / "llava_tiny-demo-rel_att.json").read_text())
    records[0]["question"] = "another?"
    (tmp_path / "llava_tiny-demo-grad_att.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="'0' is .*which.* and .*another"):
        score_table.main([path, str(tmp_path / "llava_tiny-demo-grad_att.json")])
