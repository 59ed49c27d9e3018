"""Kinds of questions: what stands in the table is what the result files say, and the words say what gains and loses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tiny.sets import write_set
from vicrop.evaluation import command as run
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.scores import ScoreOptions, rows_of
from vicrop.files import read_json
from vicrop.findings import command as findings
from vicrop.findings.kinds import Ways, gated, markdown, sentences, table_of, ways_of
from vicrop.findings.sample import SAMPLES
from vicrop.findings.table import Table, estimate, figure

METHODS = "rel_att,loc_att,question_att,gt_crop,grid_crops"


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A folder with a few questions of three kinds."""
    folder = tmp_path_factory.mktemp("streets")
    write_set(folder, 11, 3, ("reading", "relation", "two_places"))
    return folder


@pytest.fixture(scope="module")
def found(streets):
    """(folder of the results, the table of the finding)."""
    out = streets / "results"
    findings.main(told(streets, out))
    return out, read_json(out / "found" / "llava_tiny-streets-kinds.json")


def told(streets, out, *more):
    where = ["--task", "streets", "--question_path", streets / "data.json", "--image_path", streets / "images"]
    where += ["--save_path", out, "--out", out / "found", "--model", "llava_tiny", "--device", "cpu"]
    where += ["--max_new_tokens", 3]  # these signs are beyond this model, and its answers would be long
    return list(map(str, ["kinds", *where, "--method", METHODS, *more]))


def result(folder, method):
    return ResultFile.read(folder / f"llava_tiny-streets-{method}.json")


def test_every_way_has_its_row_and_every_kind_its_column(found):
    out, table = found
    assert list(table["rows"]) == [
        "no crop", "rel_att", "loc_att", "question_att", "gt_crop",
        "rel_att, 2 regions", "question_att, 2 regions", "gt_crop, 2 regions", "grid_crops, 2 regions",
        "rel_att, 3 regions", "question_att, 3 regions", "gt_crop, 3 regions", "grid_crops, 3 regions",
        "rel_att below 0.9", "rel_att, the surer answer", "ensemble",
    ]  # fmt: skip
    for row in table["rows"].values():
        assert {kind: cell["n"] for kind, cell in row.items()} == {
            "reading": 3,
            "relation": 3,
            "two_places": 3,
            "all": 9,
        }
    assert (out / "found" / "llava_tiny-streets-kinds.png").stat().st_size > 5000
    text = (out / "found" / "llava_tiny-streets-kinds.md").read_text()
    # In the small table and in the whole one, and in those of differences to no crop, to rel_att and to one region.
    assert text.count("| rel_att, 2 regions |") == 5
    assert text.count("| grid_crops, 2 regions |") == 3
    assert text.count("| rel_att |") == 3
    assert all(note in text for note in table["notes"])
    for name in ("against_no_crop", "against_crop", "against_one_region"):
        assert (out / "found" / f"llava_tiny-streets-kinds_{name}.png").stat().st_size > 5000


def test_of_many_questions_a_sample_is_asked(streets, tmp_path, monkeypatch):
    monkeypatch.setitem(SAMPLES, "kinds", 4)
    findings.main(told(streets, tmp_path, "--method", "question_att"))
    table = read_json(tmp_path / "found" / "llava_tiny-streets-kinds.json")
    ids = read_json(tmp_path / "found" / "llava_tiny-streets-kinds.ids.json")
    assert [row["all"]["n"] for row in table["rows"].values()] == [4] * len(table["rows"])
    assert [record["id"] for record in read_json(tmp_path / "llava_tiny-streets-question_att.json")] == ids
    assert [way for way in table["rows"] if way.endswith(" regions")] == [
        "question_att, 2 regions",
        "question_att, 3 regions",
    ]
    assert len(ids) == 4


def test_the_settings_of_the_table_have_what_the_finding_adds(found):
    settings = found[1]["settings"]
    assert settings["ensemble"] == ["no crop", "rel_att", "loc_att"]
    assert (settings["crop_below"], settings["most_regions"], settings["region_share"]) == (0.9, 3, 0.5)
    assert settings["model"] == "llava_tiny"


def test_the_table_is_that_of_get_score(found):
    out, table = found
    folders = {"": out, ", 2 regions": out / "regions_2", ", 3 regions": out / "regions_3"}
    for way, folder in folders.items():
        for method in ("rel_att", "gt_crop"):
            for row in rows_of(result(folder, method), ScoreOptions(by=("category",))):
                cells = table["rows"]
                assert cells[f"{method}{way}"][row["part"]]["mean"] == pytest.approx(row["with_crop"])
                assert cells["no crop"][row["part"]]["mean"] == pytest.approx(row["without_crop"])
                if method == "rel_att" and not way:
                    assert cells["rel_att, the surer answer"][row["part"]]["mean"] == pytest.approx(row["surer"])


def test_the_gated_row_is_a_gated_run(found, streets):
    out, table = found
    arguments = [text for text in told(streets, out / "gated", "--crop_below", "0.9") if text not in ("kinds", "--out")]
    arguments.remove(str(out / "gated" / "found"))
    arguments[arguments.index(METHODS)] = "rel_att"
    run.main(arguments)
    for row in rows_of(result(out / "gated", "rel_att"), ScoreOptions(by=("category",))):
        assert table["rows"][gated("rel_att")][row["part"]]["mean"] == pytest.approx(row["with_crop"])


def test_several_regions_are_held_against_one_question_by_question(found):
    table = found[1]
    rows = table["more"]["against_one_region"]["rows"]
    assert list(rows) == [
        f"{name}, {most} regions" for most in (2, 3) for name in ("rel_att", "question_att", "gt_crop")
    ]
    for way, row in rows.items():
        for kind, cell in row.items():
            more, one = (table["rows"][each][kind]["mean"] for each in (way, way.partition(",")[0]))
            assert cell["mean"] == pytest.approx(more - one)


def test_two_places_are_asked_about_with_a_crop_each(found):
    out, _ = found
    for record in result(out / "regions_2", "gt_crop").records:
        assert len(record["bboxes"]) == (2 if len(record["gt_bboxes"]) == 2 else 1)
    assert all(len(record["bboxes"]) == 3 for record in result(out / "regions_3", "grid_crops").records)


def test_nothing_is_asked_twice(found, streets, monkeypatch, capsys):
    out, table = found
    monkeypatch.setattr("vicrop.evaluation.runner.load_chosen", lambda *_: pytest.fail("a model was loaded"))
    findings.main(told(streets, out))
    assert read_json(out / "found" / "llava_tiny-streets-kinds.json") == table
    assert "complete before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--regions", "2"], "--regions must be left out: this finding asks with one to three by itself"),
        (["--crop_below", "0.9"], "--crop_below must be left out"),
    ],
)
def test_what_the_finding_chooses_itself_is_refused(streets, tmp_path, more, says, capsys):
    with pytest.raises(SystemExit):
        findings.main(told(streets, tmp_path, *more))
    assert says in capsys.readouterr().err


def test_records_without_a_category_are_a_sentence(streets, tmp_path):
    records = [{name: value for name, value in record.items() if name != "category"}
               for record in json.loads((streets / "data.json").read_text())]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments = told(streets, tmp_path)
    arguments[arguments.index(str(streets / "data.json"))] = str(tmp_path / "data.json")
    with pytest.raises(SystemExit, match="no record has a `category`"):
        findings.main(arguments)


def test_a_method_without_a_map_cannot_be_the_first(streets, tmp_path):
    arguments = told(streets, tmp_path)
    arguments[arguments.index(METHODS)] = "gt_crop,rel_att"
    with pytest.raises(SystemExit, match="the first method must make a map"):
        findings.main(arguments)


# ------------------------------------------------------------------------------------------------------------ in words
def answered(folder, method, answers):
    """A result with [(answer, its p, answer with crop, its p)], of which "yes" is right."""
    kinds = ["reading", "reading", ["count", "reading"], "count"]
    records = [
        {"id": n, "question": "?", "labels": ["yes"], "image_path": f"{n}.png", "category": kind,
         "original_answer": before, "crop_answer": after, "bbox": [0, 0, 1, 1],
         "confidence": {"original": p, "crop": q}}
        for n, (kind, (before, p, after, q)) in enumerate(zip(kinds, answers, strict=True))
    ]  # fmt: skip
    path = folder / f"llava_tiny-demo-{method}.json"
    path.write_text(json.dumps(records))
    return ResultFile.read(path)


def test_gate_surer_answer_and_ensemble_choose_question_by_question(tmp_path):
    """Each choice has a question in which it alone is right, so that none can stand in for another."""
    files = {
        "rel_att": answered(tmp_path, "rel_att", [
            ("no", 0.95, "yes", 0.99), ("no", 0.5, "yes", 0.4), ("yes", 0.95, "no", 0.3), ("no", 0.2, "no", 0.3)]),
        "loc_att": answered(tmp_path, "loc_att", [
            ("no", 0.95, "no", 0.97), ("no", 0.5, "no", 0.2), ("yes", 0.95, "no", 0.2), ("no", 0.2, "yes", 0.9)]),
    }  # fmt: skip
    run = findings.parse(["kinds", "--model", "llava_tiny"])[1]
    ways = ways_of(files, "rel_att", run, {0, 1, 2, 3})
    assert {way: scores.tolist() for way, scores in ways.scores.items()} == {
        "no crop": [0, 0, 100, 0],
        "rel_att": [100, 100, 0, 0],
        "loc_att": [0, 0, 0, 100],
        "rel_att below 0.9": [0, 100, 100, 0],
        "rel_att, the surer answer": [100, 0, 100, 0],
        "ensemble": [100, 0, 100, 100],
    }
    assert ways.members == ["no crop", "rel_att", "loc_att"]
    assert ways.repairs == ["rel_att below 0.9", "rel_att, the surer answer", "ensemble"]
    assert ways.names == ["count", "reading", "all"]
    assert [ways.of(kind, ways.scores["no crop"])["n"] for kind in ways.names] == [2, 3, 4]  # one is of two kinds
    assert ways_of(files, "rel_att", run, {1, 3}).scores["rel_att"].tolist() == [100, 0]


def planted():
    """40 questions each of a kind that gains, one that does not change, and one that loses and is repaired."""
    right, wrong = np.full(40, 100.0), np.zeros(40)
    plain, main = np.concatenate([wrong, right, right]), np.concatenate([right, right, wrong])
    gate = np.concatenate([right, right, right])
    scores = {"no crop": plain, "rel_att": main, "rel_att, 2 regions": main, "gate": gate}
    kinds = [[kind] for kind in ("reading", "presence", "count") for _ in range(40)]
    images = [str(number) for number in range(120)]
    return Ways(scores, "rel_att", ("rel_att, 2 regions", "gate"), ("no crop", "rel_att"), kinds, images)


def test_what_gains_what_loses_and_what_repairs_it_is_said():
    said = {sentence.split()[0]: sentence for sentence in sentences(planted())}
    assert said["reading"] == ("reading gains with rel_att (100.0 [100.0, 100.0] points); nothing is better than that")
    assert said["presence"].startswith("presence does not change with rel_att (0.0 [0.0, 0.0] points)")
    assert said["count"] == (
        "count loses with rel_att (-100.0 [-100.0, -100.0] points); better than that: gate by 100.0 [100.0, 100.0]"
    )
    assert list(said) == ["count", "presence", "reading", "all"]


def test_a_repair_that_still_loses_to_no_crop_is_told_as_such():
    """Of 40 questions a crop spoils all and the gate spoils half: it is better than a crop, and worse than none."""
    scores = {"no crop": np.full(40, 100.0), "rel_att": np.zeros(40), "gate": np.repeat([0.0, 100.0], 20)}
    ways = Ways(scores, "rel_att", ("gate",), ("no crop", "rel_att"), [["count"]] * 40, [str(n) for n in range(40)])
    about_count = next(sentences(ways))
    assert about_count.startswith("count loses with rel_att")
    assert "better than that: gate by 50.0" in about_count
    assert about_count.endswith("], but still below no crop")


def test_the_ensemble_is_held_against_its_best_member():
    ways = planted()
    more = replace(ways, scores={**ways.scores, "ensemble": np.full(120, 100.0)}, members=("no crop", "rel_att"))
    *_, last = sentences(more)
    assert last.startswith("the ensemble against its best member, no crop: 33.3 [")


def test_differences_are_question_by_question():
    table = table_of(planted())
    assert list(table.more) == ["against_no_crop", "against_crop", "against_one_region"]
    assert list(table.more["against_no_crop"].rows) == ["rel_att", "rel_att, 2 regions", "gate"]
    assert list(table.more["against_crop"].rows) == ["no crop", "rel_att, 2 regions", "gate"]
    found = table.more["against_no_crop"].rows["gate"]
    assert {kind: each["mean"] for kind, each in found.items()} == {
        "count": 0, "presence": 0, "reading": 100, "all": pytest.approx(100 / 3)}  # fmt: skip
    (axes,) = figure(table.more["against_no_crop"], "change").axes
    assert axes.get_ylim()[0] < -100  # a loss is drawn
    lines = list(markdown(table.more["against_crop"]))
    assert lines[0] == "| difference to rel_att | count | presence | reading | all |"
    assert lines[2].startswith("| no crop | +100.0 [+100.0, +100.0] | +0.0 [+0.0, +0.0] | -100.0 [-100.0, -100.0] |")


def test_a_kind_is_about_its_own_questions_and_all_about_all():
    ways = planted()
    assert ways.of("count", ways.scores["rel_att"]) == estimate(np.zeros(40), ways.images[80:])
    assert ways.of("all", ways.scores["gate"])["n"] == 120


def test_markdown_and_bars_have_the_ways_that_are_named():
    ways = planted()
    rows = {way: {kind: ways.of(kind, scores) for kind in ways.names} for way, scores in ways.scores.items()}
    table = Table("kinds", "method", "%", rows, plotted=("no crop", "gate"), turned=True)
    assert list(markdown(table, ("no crop",))) == [
        "| | count | presence | reading | all |",
        "|---|---|---|---|---|",
        "| no crop | 100.0 ± 0.0 | 100.0 ± 0.0 | 0.0 ± 0.0 | 66.7 ± "
        f"{(rows['no crop']['all']['high'] - rows['no crop']['all']['low']) / 2:.1f} |",
    ]
    (axes,) = figure(table, "kinds").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["count", "presence", "reading", "all"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["no crop", "gate"]


def test_kinds_take_a_share_for_the_regions_that_they_ask_with():
    assert findings.parse(["kinds", "--region_share", "0.3"])[1].how.regions.share == 0.3
