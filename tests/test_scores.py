"""The graders against values worked out from the official definitions, and the statistics of the score table."""

import csv
import json
import re

import numpy as np
import pytest
from scipy.stats import binom

from vicrop.evaluation import columns
from vicrop.evaluation import score_table as get_score
from vicrop.evaluation.metrics import GRADERS, labels_of, pope_details, says_yes, score, vstar_details
from vicrop.evaluation.normal_text import CONTRACTIONS, evalai_normal, vqa_normal
from vicrop.evaluation.option_letters import chosen_letter
from vicrop.evaluation.scores import ScoreOptions
from vicrop.evaluation.statistics import bootstrap_interval, mcnemar
from vicrop.tables import TASKS


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes", "yes"),
        ("", ""),
        ("  \n\t ", ""),
        ("two\nlines", "2 lines"),
        ("a dog", "dog"),
        ("The Theatre", "theatre"),
        ("an A", ""),
        ("1,000", "1000"),
        ("1,000 (approx)", "1000 approx"),  # with a comma in a number every mark goes
        ("1,000-2,000", "10002000"),
        ("red, blue", "red blue"),  # a mark beside a space goes
        ("red,blue", "red blue"),  # any other becomes a space
        ("blue-green", "blue green"),
        ("blue -green", "blue green"),
        ("t-shirt - red-ish", "tshirt redish"),  # one " -" and every "-" goes
        ("what?!", "what"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("St. John.", "st john"),
        ("a.b.c", "abc"),
        ("1.2.", "1.2"),
        (".5", ".5"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("zero one", "0 1"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("Cant", "can't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("its", "its"),
        ("Im", "im"),  # the official table has it in capitals, but is asked in small letters
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("yalld've", "yalld've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("john's", "john's"),
        ("naïve café", "naïve café"),
        ("ÉCOLE", "école"),
        ("日本", "日本"),
        ("“quoted”", "“quoted”"),
        ("$5", "$5"),
        ("50%", "50%"),
        ("a/b", "b"),
        ("x" + "." * 40, "x" + "." * 8),  # the official code replaces 32 periods at most
    ],
)
def test_vqa_normalisation(text, normal):
    assert vqa_normal(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("John's", "john 's"),  # a possessive becomes a word of its own
        ("1,000 - 2,000", "1000 2000"),  # commas go first, so none is in a number later
        ("1,000-2,000", "1000 2000"),
        ("red,blue", "redblue"),
        ("what?", "what"),
        ("THE 'S", "'s"),
        ("it's", "it 's"),
        ("\nTwo\t", "2"),
        ("thats", "that's"),
        ("", ""),
    ],
)
def test_evalai_normalisation(text, normal):
    assert evalai_normal(text) == normal


def test_the_official_contractions():
    assert CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ows'at"] == CONTRACTIONS["'ow'sat"] == "'ow's'at"
    assert CONTRACTIONS["twas"] == "'twas"
    assert CONTRACTIONS["hed"] == "he'd"
    assert not {"shed", "wed", "were", "well", "its", "id", "ill", "shell", "lets", "shes"} & CONTRACTIONS.keys()
    assert all(wrong.replace("'", "") == right.replace("'", "") for wrong, right in CONTRACTIONS.items())


TEN = ["yes"] * 4 + ["no"] * 3 + ["maybe"] * 2 + ["Never."]


@pytest.mark.parametrize(
    ("grader", "answer", "labels", "score"),
    [
        ("exact", " 7. ", "7", 100),
        ("exact", "Seven", ["seven", "7"], 100),
        ("exact", "77", ["7"], 0),
        ("exact", "", [""], 0),
        # min(1, 0.3 x matches)
        ("vqa_paper", "Yes.", TEN, 100),
        ("vqa_paper", "no", TEN, 90),
        ("vqa_paper", "maybe", TEN, 60),
        ("vqa_paper", "never", TEN, 30),
        ("vqa_paper", "perhaps", TEN, 0),
        ("vqa_paper", "", TEN, 0),
        ("vqa_paper", "the yes", ["yes"], 30),
        # leave one out: (matching x min(1, (m - 1) / 3) + others x min(1, m / 3)) / 10
        ("textvqa", "Yes", TEN, 100),
        ("textvqa", "no", TEN, 100 * (3 * 2 / 3 + 7) / 10),
        ("textvqa", "maybe", TEN, 100 * (2 / 3 + 8 * 2 / 3) / 10),
        ("textvqa", "never", TEN, 100 * (9 / 3) / 10),
        ("textvqa", "perhaps", TEN, 0),
        ("textvqa", "", TEN, 0),
        ("textvqa", "yes", ["yes"], 0),  # a single label has no others
        ("textvqa", "yes", ["yes", "yes"], 100 / 3),
        ("textvqa", "yes", ["Yes"] * 10, 100),
        ("textvqa", "yes", ["yes"] * 4, 100),
        ("textvqa", "yes", ["yes"] * 3, 200 / 3),
        ("textvqa", "john 's", ["John's"] * 10, 100),
        ("vqav2", "Yes", TEN, 100),
        ("vqav2", "no", TEN, 90),
        ("vqav2", "never", TEN, 30),
        ("vqav2", "yes", ["yes"] * 10, 100),
        ("vqav2", "Yes", ["yes"] * 10, 0),  # unanimous labels: nothing is normalised
        ("vqav2", " yes\n", ["yes"] * 10, 100),
        ("vqav2", "Yes", ["yes"] * 9 + ["no"], 100),
        ("vqav2", "2", ["two"] * 10, 0),
        ("vqav2", "2", ["two"] * 9 + ["2"], 100),
        ("vqav2", "", ["", "a", "the"], 200 / 3),  # all of them are empty once normalised
        ("aokvqa_direct", "surfing", ["surfing", "surfing", "surf"], 200 / 3),
        ("aokvqa_direct", "surfing", ["surfing"] * 5, 100),
        ("aokvqa_direct", "Surfing", ["surfing"] * 5, 0),
        ("gqa_paper", "It is a red car.", "red", 100),
        ("gqa_paper", "yes", ["yes"], 100),
        ("gqa_paper", "blue", "red", 0),
        ("gqa_paper", "anything", "the", 0),  # nothing is left of the label
        ("gqa", "Red.", "red", 100),
        ("gqa", "red car", "red", 0),
        ("gqa", "", "red", 0),
        ("pope_paper", "Yes, there is", "yes", 100),
        ("pope_paper", "no", "no", 100),
        ("pope_paper", "", "no", 0),
        ("pope", "Yes.", "yes", 100),
        ("pope", "No, there is no dog.", "no", 100),
        ("pope", "There is not. Yes.", "no", 100),
        ("pope", "NO", "no", 0),  # only No, no and not are read
        ("pope", "", "no", 0),
        ("docvqa_paper", "12 March", ["March"], 100),
        ("docvqa_paper", "Mar", ["March"], 100),
        ("docvqa_paper", "", ["March"], 0),
        ("docvqa_paper", "march", ["March"], 0),
        ("docvqa_paper", "x", [""], 0),
        ("anls", "March", ["march"], 100),
        ("anls", "Marsh", ["march", "x"], 80),
        ("anls", "ma", ["march"], 0),  # 2 / 5 is less than a half
        ("anls", "abcd", ["abxy"], 50),  # a half is kept
        ("anls", "", ["march"], 0),
        ("anls", "", [""], 100),
        ("anls", "a  b", ["a b"], 100),
        ("anls", "é", ["e"], 0),
        # lengths are those in capitals, which may be longer; distances are those in small letters
        ("anls", "Strase", ["Straße"], 100 * (1 - 1 / 7)),
        ("anls", "ﬁne", ["fine"], 50),
        ("anls", "ŉx", ["nx", "ŉy"], 100 * (1 - 1 / 3)),
    ],
)
def test_graders(grader, answer, labels, score):
    assert GRADERS[grader](answer, {"id": "1", "labels": labels}) == pytest.approx(score)


def test_aokvqa_counts_only_what_it_should():
    record = {"labels": ["a"] * 3, "difficult_direct_answer": True, "choices": ["x", "a"], "correct_choice_idx": 1}
    assert GRADERS["aokvqa_direct"]("a", record) is None
    assert GRADERS["aokvqa_choice"]("a", record) == 100
    assert GRADERS["aokvqa_choice"]("x", record) == 0
    assert GRADERS["aokvqa_choice"]("a", {"labels": ["a"]}) is None
    assert GRADERS["aokvqa_direct"]("a", record | {"difficult_direct_answer": False}) == 100


def test_an_error_is_wrong_whatever_the_record_lacks():
    answers = {"original_answer": "", "crop_answer": "", "error": "no question"}
    for grader in GRADERS.keys() - {"aokvqa_choice"}:
        assert score({"id": "1"} | answers, grader) == (0, 0)
    for grader, record in (("aokvqa_direct", {"difficult_direct_answer": True}), ("aokvqa_choice", {"labels": ["a"]})):
        assert score(record | answers, grader) is None  # it would not have been counted anyway
        assert GRADERS[grader]("", record) is None
    assert vstar_details([""], [{"id": "1"} | answers]) == {"unparsed": 1}


VSTAR = "What is the glove made of?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) a red leather\nAnswer with a letter."


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"), ("b", "B"), ("(C)", "C"), ("D.", "D"), ("(A) rubber", "A"), ("B: cotton", "B"),
        ("The answer is C.", "C"), ("Option D", "D"), ("cotton", "B"), ("It is Cotton.", "B"), ("red leather", "D"),
        ("A red leather", "D"), ("cotton or rubber", None), ("cottons", None), ("", None), ("E", None), ("wood", None),
        ("The answer is option B.", "B"), ("A\nrubber, I think", "A"), ("Correct answer: (C)", "C"),
    ],
)  # fmt: skip
def test_the_letter_of_a_vstar_answer(answer, letter):
    record = {"id": "1", "question": VSTAR, "labels": "B"}
    assert chosen_letter(answer, VSTAR) == letter
    assert GRADERS["vstar"](answer, record) == 100 * (letter == "B")
    assert GRADERS["vstar_paper"]("cotton", record) == GRADERS["vstar_paper"]("(B)", record) == 100
    assert vstar_details([answer], [record]) == {"unparsed": int(letter is None)}


CUP = ["What is the cup made of?", "(A) tin", "(B) clay", "(C) glass", "(D) paper"]
ASK = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    "lines",
    [
        [*CUP, ASK], CUP, [*CUP, ""], [CUP[0], "Options:", *CUP[1:]], [CUP[0], "Options:", *CUP[1:], ASK],
        [CUP[0], f"Options: {CUP[1]}", *CUP[2:], ASK], [CUP[0], "", *CUP[1:], "", ASK, "Think first."],
        [f"{line}\r" for line in [*CUP, ASK]], [line.replace("(", "").replace(")", ".") for line in CUP],
    ],
)  # fmt: skip
def test_options_count_whatever_stands_around_them(lines):
    answers = {"D": "D", "(D) paper": "D", "paper": "D", "(A) tin": "A", "A": "A", "clay": "B", "(C)": "C"}
    for answer, letter in answers.items():
        record = {"id": "1", "question": "\n".join(lines), "labels": letter}
        assert [GRADERS[grader](answer, record) for grader in ("vstar_paper", "vstar")] == [100, 100]
        wrong = record | {"labels": "ABCD"["BCDA".index(letter)]}
        assert [GRADERS[grader](answer, wrong) for grader in ("vstar_paper", "vstar")] == [0, 0]


@pytest.mark.parametrize(
    ("question", "label", "says"),
    [
        ("What? (A) tin (B) clay", "A", "no lines like"),
        ("What? (A) tin\n(B) clay", "B", "two options or more, each on a line of its own, .* has lines of B"),
        ("What? (A) tin\n(B) clay\n(C) glass", "B", "has lines of B, C"),
        ("What?\nOptions: (A) tin (B) clay (C) glass", "A", "has lines of A"),
        ("What?\n(A) tin (B) clay\n(C) glass (D) paper", "A", "has lines of A, C"),
        ("What?\n(A) tin\n(B) clay (C) glass", "A", "has lines of A, B"),
        ("What?\n(A) tin\n(A) clay", "A", "has lines of A, A"),
        ("What?\n(A) tin\n(B) clay", "C", r"labels are the letter of an option \(A, B\), not 'C'"),
        ("What?\n(A) tin\n(B) clay", "tin", "not 'tin'"),
    ],
)
def test_options_that_one_metric_could_not_read_are_scored_by_none(question, label, says):
    record = {"id": "7", "question": question, "labels": label}
    for grader in ("vstar_paper", "vstar"):
        with pytest.raises(ValueError, match=f"record '7': .*{says}"):
            GRADERS[grader]("A", record)


def test_an_option_that_is_a_part_of_another_is_not_named_by_it():
    question = "Which red?\n(A) red\n(B) dark red\nAnswer with a letter."
    said = {"dark red": "B", "The sign is dark red.": "B", "red": "A", "red, not dark red": None}
    assert {answer: chosen_letter(answer, question) for answer in said} == said
    assert chosen_letter("It is red.", "Which?\n(A) red\n(B) Red.\nAnswer.") is None
    assert chosen_letter("red car park", "Which?\n(A) red car\n(B) car park\nAnswer.") is None


@pytest.mark.parametrize(
    ("grader", "record"),
    [
        ("aokvqa_choice", {"choices": ["a", "b"]}),
        ("aokvqa_choice", {"choices": ["a", "b"], "correct_choice_idx": 2}),
        ("vstar", {"question": None}),
        ("vstar_paper", {}),
    ],
)
def test_a_record_that_cannot_be_graded_is_named(grader, record):
    with pytest.raises(ValueError, match="record '7': "):
        GRADERS[grader]("a", {"id": "7", "labels": "A"} | record)


@pytest.mark.parametrize("grader", ["pope", "pope_paper"])
def test_a_label_of_pope_is_yes_or_no(grader):
    for label, right in ((" Yes\n", "yes"), ("NO ", "no"), (["no"], "no")):
        record = {"id": "7", "labels": label}
        assert [GRADERS[grader](answer, record) for answer in ("yes", "no")] == [
            100 * (right == "yes"),
            100 * (right == "no"),
        ]
    for label in ("maybe", "nope", "yes, it is", " "):
        with pytest.raises(ValueError, match='record \'7\': labels must be "yes" or "no", not'):
            GRADERS[grader]("yes", {"id": "7", "labels": label})


def test_pope_details():
    records = [{"labels": label} for label in ("yes", "yes", "no", "no")]
    found = pope_details(["Yes", "No", "Yes", "No."], records)
    assert found == {"precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50}
    assert pope_details(["No"] * 4, records) == {"precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert says_yes("Certainly")
    broken = [record | {"error": "no such image"} for record in records]
    assert pope_details([""] * 4, broken)["yes_ratio"] == 50  # each the opposite of what it had to be
    assert pope_details([""] * 4, broken)["f1"] == 0


@pytest.mark.parametrize("labels", [None, [], 7, ["a", 7]])
def test_labels_that_are_none_name_their_record(labels):
    with pytest.raises(ValueError, match="record 'x'"):
        labels_of({"id": "x", "labels": labels})


# ----------------------------------------------------------------------------------------------------------- statistics
def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Pairs in clusters of one to three that share a part of their luck; 600 experiments, true difference 10."""
    rng, inside = np.random.default_rng(0), 0
    experiments = 600
    for _ in range(experiments):
        clusters = np.repeat(np.arange(150), rng.integers(1, 4, 150))
        lucky = rng.random(150)[clusters] < 0.5
        change = rng.choice([100, 0, -100], len(clusters), p=[0.1, 0.8, 0.1])
        difference = np.where(lucky, rng.choice([100, 0], len(clusters), p=[0.2, 0.8]), change)
        low, high = bootstrap_interval(difference, clusters, 400, 1)
        inside += low <= 10 <= high
    assert 0.93 <= inside / experiments <= 0.97


def test_the_interval_equals_drawing_the_images_themselves():
    rng = np.random.default_rng(3)
    difference, images = rng.choice([0.0, 100.0, -100.0, 30.0], 300), rng.integers(0, 80, 300)
    low, high = bootstrap_interval(difference, images, 20_000, 0)
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 80, 80)
        rows = np.concatenate([np.flatnonzero(images == image) for image in drawn])
        means.append(difference[rows].mean())
    np.testing.assert_allclose((low, high), np.percentile(means, (2.5, 97.5)), atol=0.8)
    assert bootstrap_interval(difference, images, 1000, 5) == bootstrap_interval(difference, images, 1000, 5)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 0), (5, 0), (3, 3), (2, 9), (40, 20)])
def test_mcnemar(fixed, broken):
    tail = binom.cdf(min(fixed, broken), fixed + broken, 0.5)
    assert mcnemar(fixed, broken) == pytest.approx(min(1, 2 * tail))


# ---------------------------------------------------------------------------------------------------------------- table
def result(number, before, after, **more):
    record = {"id": str(number), "image_path": f"{number // 2}.png", "question": "q?", "labels": ["yes"] * 10}
    return record | {"original_answer": before, "crop_answer": after, "bbox": [0.5, 0, 9.25, 9]} | more


def report(folder, samples_path=None, **more):
    return get_score.report(folder, folder, ScoreOptions(bootstrap=200, **more), samples_path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results of two methods; ten of twelve records of the dataset are there, one with an error."""
    records = [result(n, "no" if n < 6 else "yes", "yes" if n != 9 else "no", size="small") for n in range(9)]
    records.append(result(9, "yes", "yes", error="no such image", size="large"))
    for name in ("my-own-model-textvqa-rel_att", "llava-textvqa-grad"):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "questions.jsonl").write_text(json.dumps([{"id": str(number)} for number in range(12)]))
    monkeypatch.setitem(TASKS["textvqa"], "question_path", str(tmp_path / "questions.jsonl"))
    return tmp_path


def test_the_table(folder, capsys):
    rows = report(folder)
    columns.show(rows)
    shown = capsys.readouterr().out
    assert {(row["model"], row["method"]) for row in rows} == {("my-own-model", "rel_att"), ("llava", "grad")}
    assert {row["metric"] for row in rows} == {"paper", "official"}
    row = next(row for row in rows if row["part"] == "all")
    assert (row["n"], row["missing"], row["errors"], row["fixed"], row["broken"]) == (10, 2, 1, 6, 0)
    assert (row["without_crop"], row["with_crop"], row["difference"]) == (30, 90, 60)
    assert row["low"] <= 60 <= row["high"]
    assert row["mcnemar_p"] == pytest.approx(2 / 2**6)
    assert "+60.00" in shown
    assert {row["part"] for row in rows} == {"all", "small", "large"}
    assert {row["part"] for row in report(folder, by=(), metric="paper")} == {"all"}
    assert {row["metric"] for row in report(folder, metric="official")} == {"official"}
    assert json.loads((folder / "evaluation_report.json").read_text())
    with (folder / "evaluation_report.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(report(folder, metric="official"))
    assert (folder / "evaluation_report.md").read_text().startswith("| task | model |")


def test_combinations_of_groups_have_rows_of_their_own(tmp_path):
    kinds = [
        ("count", "large", "yes"),
        ("count", "small", "no"),
        ("reading", "small", "yes"),
        ("count", "small", "yes"),
    ]
    records = [result(n, "no", answer, category=kind, size=size) for n, (kind, size, answer) in enumerate(kinds)]
    (tmp_path / "llava-textvqa-rel_att.json").write_text(json.dumps([*records, result(9, "no", "no", size="small")]))
    rows = report(tmp_path, by=("category,size",), metric="paper")
    assert [(row["part"], row["n"], row["with_crop"]) for row in rows] == [
        ("all", 5, 60), ("count, small", 2, 50), ("count, large", 1, 100), ("reading, small", 1, 100),
    ]  # fmt: skip


@pytest.mark.parametrize("asked", ["sise", "size,size", "size,", "nothing,size"])
def test_only_groups_can_be_asked_for(asked, tmp_path, capsys):
    with pytest.raises(SystemExit):
        get_score.main(["--data_dir", str(tmp_path), "--by", asked])
    assert f"must be some of size, category, subcategory, detail, cycle, with commas, or nothing; got {asked}" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_scores_of_every_record(folder):
    report(folder, folder / "samples.jsonl", metric="paper")
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert lines[0] == {"id": "0", "model": "llava", "task": "textvqa", "method": "grad", "metric": "paper",
                        "original": 0.0, "crop": 100.0}  # fmt: skip
    assert (lines[9]["original"], lines[9]["crop"]) == (0, 0)  # its error


def test_pope_by_split_has_its_own_figures(tmp_path, capsys):
    records = [result(n, "yes", "yes" if n % 2 else "no", category=("random", "popular")[n // 4]) for n in range(8)]
    records = [record | {"labels": ["no", "yes"][n % 2]} for n, record in enumerate(records)]
    (tmp_path / "llava-pope-rel_att.json").write_text(json.dumps(records))
    rows = report(tmp_path, metric="official")
    assert {row["part"] for row in rows} == {"all", "random", "popular"}
    assert all(row["f1, with crop"] == 100 and row["precision, without crop"] == 50 for row in rows)
    columns.show(rows)
    assert "yes_ratio, without crop 100.00" in capsys.readouterr().out
    assert "yes_ratio, without crop 100.00" in (tmp_path / "evaluation_report.md").read_text()


def test_sizes_come_from_the_boxes(tmp_path):
    records = [
        result(n, "no", "yes", gt_bbox=[0, 0, side, 10], image_size=[100, 100]) for n, side in enumerate((4, 5, 50))
    ]
    (tmp_path / "llava-vqav2-rel_att.json").write_text(json.dumps(records))
    assert [row["part"] for row in report(tmp_path, metric="paper")] == ["all", "small", "medium", "large"]
    (tmp_path / "llava-vqav2-rel_att.json").write_text(json.dumps([result(1, "no", "yes", gt_bbox=[1, 2, 3])]))
    assert [row["part"] for row in report(tmp_path, metric="paper")] == ["all"]


@pytest.mark.parametrize("box", [[90, 90, 130, 20], [0, 0, 101.5, 9], [0.1, 0.1, 0.3, 0.2], [-9, 0, 9, 9], "left"])
def test_a_box_that_cannot_be_one_has_no_size_and_is_named(tmp_path, capsys, box):
    records = [result(0, "no", "yes", gt_bbox=box, image_size=[100, 100])]
    records += [result(1, "no", "yes", gt_bbox=[0, 0, 100.9, 100], image_size=[100, 100])]
    (tmp_path / "llava-vqav2-rel_att.json").write_text(json.dumps(records))
    rows = report(tmp_path, metric="paper")
    assert [(row["part"], row["n"]) for row in rows] == [("all", 2), ("large", 1)]
    assert "llava-vqav2-rel_att.json: record '0': gt_bbox " in capsys.readouterr().err


def test_what_is_only_begun_is_no_failure(tmp_path, capsys):
    (tmp_path / "llava-pope-rel_att.parts").mkdir()
    get_score.main(["--data_dir", str(tmp_path), "--save_path", str(tmp_path)])
    assert capsys.readouterr().out.startswith("llava-pope-rel_att is not finished, and it is not scored")
    assert not list(tmp_path.glob("evaluation_report.*"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (None, None, "no result files"),
        ("llava-textvqa.json", "[]", "not named MODEL-TASK-METHOD"),
        ("llava-nothing-rel_att.json", "[]", "unknown task 'nothing', known are demo, textvqa"),
        ("llava-textvqa-magic.json", "[]", "unknown method 'magic'"),
        ("llava-textvqa-rel_att.json", '[{"id": "1", "orig', "no complete JSON file"),
        ("llava-textvqa-rel_att.json", "{}", "holds a dict"),
        ("llava-textvqa-rel_att.json", '[{"id": "1"}]', "record '1': original_answer is a text, not None"),
        (
            "llava-textvqa-rel_att.json",
            json.dumps([result(1, "a", "b"), result(1, "a", "b")]),
            "comes twice: '1' (records 0 and 1)",
        ),
        ("llava-textvqa-rel_att.json", json.dumps([result(1, "a", "b", labels=None)]), "record '1': labels"),
        ("llava-textvqa-rel_att.json", json.dumps([result(1, "a", "b") | {"id": [1]}]), "a text or a whole number"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_sentence(tmp_path, capsys, name, text, says):
    if name:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        get_score.main(["--data_dir", str(tmp_path), "--save_path", str(tmp_path)])
    assert says in str(stopped.value)
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.glob("evaluation_report.*"))


GOOD = "llava-textvqa-rel_att.json"
BAD = [result(2, "a", "b", labels=None), result(3, "a", "b") | {"crop_answer": 7}, {"question": "who?"}, "text"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("llava-textvqa.json", "[]", "llava-textvqa.json in .* is not named MODEL-TASK-METHOD.json: it is left out"),
        ("llava-chart-rel_att.json", "[]", "llava-chart-rel_att.json in .*: unknown task 'chart'"),
        ("llava-gqa-magic.json", "[]", "llava-gqa-magic.json in .*: unknown method 'magic'"),
        ("llava-gqa-rel_att.json", '[{"id": "1", "orig', "llava-gqa-rel_att.json is no complete JSON file"),
        ("llava-gqa-rel_att.json", "{}", "llava-gqa-rel_att.json holds a dict"),
        ("llava-gqa-rel_att.json", json.dumps([result(1, "a", "b"), result(1, "a", "b") | {"id": 1}]),
         r"comes twice: '1' and 1 \(records 0 and 1\)"),
        ("llava-gqa-rel_att.json", json.dumps([result(1, "a", "b", labels=[])]),
         "gqa-rel_att.json: record '1': labels are"),
        ("llava-vstar-rel_att.json", json.dumps([result(1, "a", "b")]), "vstar-rel_att.json: record '1': its question"),
        ("llava-textvqa-rel_att.meta.json", "{", "rel_att.meta.json is no complete .*: llava-textvqa-rel_att.json is"),
        ("llava-textvqa-rel_att.meta.json", '{"counts": 3}', "rel_att.meta.json is none that run.py has written"),
        ("llava-textvqa-rel_att.meta.json", '{"settings": {"image_path": 3}}', "its image_path must be a text"),
    ],
)  # fmt: skip
def test_a_bad_file_costs_only_itself(tmp_path, capsys, monkeypatch, name, text, says):
    monkeypatch.setitem(TASKS["textvqa"], "question_path", str(tmp_path / "none.json"))
    (tmp_path / GOOD).write_text(json.dumps([result(n, "no", "yes") for n in range(3)]))
    (tmp_path / name).write_text(text)
    get_score.main(["--data_dir", str(tmp_path), "--save_path", str(tmp_path)])
    assert re.search(says, capsys.readouterr().err)
    rows = json.loads((tmp_path / "evaluation_report.json").read_text())
    (row,) = [row for row in rows if (row["task"], row["metric"]) == ("textvqa", "paper")]
    assert (row["n"], row["with_crop"], "unscored" in row) == (3, 100, False)


def test_a_bad_record_costs_only_itself(tmp_path, capsys):
    (tmp_path / GOOD).write_text(json.dumps([result(0, "no", "yes"), *BAD]))
    get_score.main(["--data_dir", str(tmp_path), "--save_path", str(tmp_path), "--per_sample", str(tmp_path / "all")])
    printed = capsys.readouterr()
    for says in ("record '2': labels are", "record '3': crop_answer is a text, not 7", "record 3 has no 'id' among",
                 "record 4 is no object"):  # fmt: skip
        assert printed.err.count(f"{GOOD}: {says}") == 1
    assert "textvqa llava rel_att paper all: 2 records cannot be scored and are not in n" in printed.out
    assert "2 records cannot be scored" in (tmp_path / "evaluation_report.md").read_text()
    rows = json.loads((tmp_path / "evaluation_report.json").read_text())
    assert [(row["n"], row["unscored"], row["with_crop"]) for row in rows] == [(1, 2, 100)] * 2
    assert len((tmp_path / "all").read_text().splitlines()) == 2


@pytest.mark.parametrize("odd", [{"image_path": ["a", "b"]}, {"image_path": {}}, {"category": ["x"]}, {"size": [1]},
                                 {"gt_bbox": {}, "image_size": "large"}, {"question": 3}])  # fmt: skip
def test_odd_fields_cost_no_score(tmp_path, odd):
    (tmp_path / GOOD).write_text(json.dumps([result(0, "no", "yes"), result(1, "no", "yes", **odd)]))
    rows = report(tmp_path, metric="paper")
    assert [(row["n"], row["with_crop"]) for row in rows if row["part"] == "all"] == [(2, 100)]


@pytest.mark.parametrize("labels", [None, 7, [], ["no", 3], "maybe"])
def test_an_error_without_usable_labels_is_wrong_and_no_answer_of_pope(tmp_path, labels):
    fine = [result(n, "yes", "yes", labels="yes") for n in range(3)]
    error = result(3, "", "", labels=labels, error="record '3': labels are a text")
    for records, figures in ((fine, (100, 100)), ([*fine, error], (100, 75)), ([error], (None, 0))):
        (tmp_path / "llava-pope-rel_att.json").write_text(json.dumps(records))
        (row,) = report(tmp_path, metric="official")
        assert (row.get("recall, with crop"), row["with_crop"]) == figures
        assert row["n"] == len(records)


@pytest.mark.parametrize(("task", "labels"), [("pope", "no"), ("vstar", "A")])
def test_an_error_without_answers_is_wrong_and_costs_no_table(tmp_path, task, labels):
    fine = result(0, labels, labels, labels=labels, question="which?\n(A) a\n(B) b")
    error = {"id": "1", "labels": labels, "error": "out of memory"}
    (tmp_path / f"llava-{task}-rel_att.json").write_text(json.dumps([fine, error]))
    for row in report(tmp_path):
        assert (row["n"], row["errors"], row["with_crop"]) == (2, 1, 50)


def test_many_bad_records_are_counted_and_some_are_named(tmp_path, capsys):
    (tmp_path / GOOD).write_text(json.dumps([result(n, "no", "yes", labels=True if n else ["yes"]) for n in range(40)]))
    get_score.main(["--data_dir", str(tmp_path), "--save_path", str(tmp_path)])
    assert f"{GOOD}: and 29 more" in capsys.readouterr().err
