"""Kinds of questions: what stands in the table is what the result files say, and the words say what gains and loses."""

import json

import numpy as np
import pytest

from tiny.sets import write_set
from vicrop.evaluation import command as run
from vicrop.evaluation.result_files import ResultFile
from vicrop.evaluation.scores import ScoreOptions, rows_of
from vicrop.files import read_json
from vicrop.findings import command as findings
from vicrop.findings.kinds import Ways, gated, markdown, sentences
from vicrop.findings.table import Table, estimate, figure

METHODS = "rel_att,loc_att,gt_crop,grid_crops"


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
        "no crop", "rel_att", "loc_att", "gt_crop", "rel_att, 2 regions", "gt_crop, 2 regions", "grid_crops, 2 regions",
        "rel_att, 3 regions", "gt_crop, 3 regions", "grid_crops, 3 regions", "rel_att below 0.9",
        "rel_att, the surer answer", "ensemble",
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
    assert text.count("| rel_att, 2 regions |") == 2  # in the small table and in the whole one
    assert text.count("| grid_crops, 2 regions |") == 1


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
def planted():
    """40 questions each of a kind that gains, one that does not change, and one that loses and is repaired."""
    right, wrong = np.full(40, 100.0), np.zeros(40)
    plain, main = np.concatenate([wrong, right, right]), np.concatenate([right, right, wrong])
    gate = np.concatenate([right, right, right])
    scores = {"no crop": plain, "rel_att": main, "rel_att, 2 regions": main, "gate": gate}
    kinds = [kind for kind in ("reading", "presence", "count") for _ in range(40)]
    return Ways(scores, "rel_att", ("rel_att, 2 regions", "gate"), kinds, [str(number) for number in range(120)])


def test_what_gains_what_loses_and_what_repairs_it_is_said():
    said = {sentence.split()[0]: sentence for sentence in sentences(planted())}
    assert said["reading"] == ("reading gains with rel_att (100.0 [100.0, 100.0] points); nothing is better than that")
    assert said["presence"].startswith("presence does not change with rel_att (0.0 [0.0, 0.0] points)")
    assert said["count"] == (
        "count loses with rel_att (-100.0 [-100.0, -100.0] points); better than that: gate by 100.0 [100.0, 100.0]"
    )
    assert list(said) == ["count", "presence", "reading", "all"]


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
