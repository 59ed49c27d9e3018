"""--ocr_tokens: the question as LLaVA's protocol for TextVQA asks it, in runs that go on and in files."""

import json

import pytest
from builders import photo

from vicrop.crop import QuestionBatch
from vicrop.dataset import ASKED
from vicrop.evaluation import batching, tasks
from vicrop.evaluation import command as run
from vicrop.findings import command as findings
from vicrop.prepare import releases

TOKENS = [["DAKOTA", "DIGITAL", "Single-Use"], []]


@pytest.fixture
def dataset(tmp_path):
    """Questions about an image: with texts, without any, and with a question of its own for the map."""
    (tmp_path / "images").mkdir()
    photo(60, 60).save(tmp_path / "images" / "a.png")
    records = [{"id": str(number), "question": "what brand is it?", "labels": ["dakota"], "image_path": "a.png",
                "ocr_tokens": tokens} for number, tokens in enumerate([*TOKENS, TOKENS[0]])]  # fmt: skip
    records[2]["short_question"] = "what brand?"
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def options(dataset, *more):
    return ["--model", "llava_tiny", "--device", "cpu", "--question_path", str(dataset / "data.json"), "--image_path",
            str(dataset / "images"), "--task", "textvqa", "--save_path", str(dataset / "out"), "--method", "rel_att",
            *more]  # fmt: skip


def results(dataset):
    return json.loads((dataset / "out" / "llava_tiny-textvqa-rel_att.json").read_text())


def test_the_prompt_is_that_of_llavas_file():
    """llava_textvqa_val_v051_ocr.jsonl: the question, a line break, and "Reference OCR token: " with commas between."""
    records = [{"id": "1", "question": "what is it?", "ocr_tokens": tokens} for tokens in TOKENS]
    assert [record[ASKED] for record in tasks.with_ocr_tokens(records, "data.json")] == [
        "what is it?\nReference OCR token: DAKOTA, DIGITAL, Single-Use", "what is it?\nReference OCR token: "
    ]  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """What all batches are about: (what is asked, what is asked in its place for the map)."""
    found = []

    class Noted(QuestionBatch):
        def __init__(self, session, questions, of, short, *rest):
            found.extend(zip(questions, short, strict=True))
            super().__init__(session, questions, of, short, *rest)

    monkeypatch.setattr(batching, "QuestionBatch", Noted)
    return found


def test_a_finding_asks_as_a_run_does(dataset, seen):
    findings.main(["overhead", *options(dataset, "--ocr_tokens", "--limit", "1", "--out", str(dataset / "out"))])
    asked = "what brand is it?\nReference OCR token: DAKOTA, DIGITAL, Single-Use"
    assert set(seen) == {(asked, "what brand is it?")}


def test_answers_are_asked_with_tokens_and_maps_without(dataset, seen):
    run.main(options(dataset, "--ocr_tokens"))
    with_tokens = "what brand is it?\nReference OCR token: DAKOTA, DIGITAL, Single-Use"
    without = "what brand is it?\nReference OCR token: "
    assert seen == [(with_tokens, "what brand is it?"), (without, "what brand is it?"), (with_tokens, "what brand?")]
    assert [record[ASKED] for record in results(dataset)] == [question for question, _ in seen]
    assert {record["question"] for record in results(dataset)} == {"what brand is it?"}
    boxes = [record["bbox"] for record in results(dataset)]
    assert boxes[0] == boxes[1]  # the map does not know the tokens
    seen.clear()
    run.main(options(dataset, "--overwrite"))
    assert seen == [("what brand is it?", None)] * 2 + [("what brand is it?", "what brand?")]
    assert not any(ASKED in record for record in results(dataset))
    assert [record["bbox"] for record in results(dataset)] == boxes


def test_a_run_goes_on_with_the_option_only(dataset, capsys):
    for first, then in (["--ocr_tokens"], []), ([], ["--ocr_tokens"]):
        where = ["--save_path", str(dataset / f"out{len(first)}")]
        run.main(options(dataset, "--limit", "1", *where, *first))
        with pytest.raises(SystemExit) as stopped:
            run.main(options(dataset, *where, *then))
        assert "ocr_tokens" in str(stopped.value) + capsys.readouterr().err
        run.main(options(dataset, *where, *first))
        assert len(json.loads(next((dataset / f"out{len(first)}").glob("*-rel_att.json")).read_text())) == 3


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (None, "record '1', not None"), ("DAKOTA", "record '1', not 'DAKOTA'"), ([7], r"record '1', not \[7\]"),
        ("gone", "record '1', and it has none"),
    ],
)  # fmt: skip
def test_records_without_tokens_are_named(dataset, tokens, says):
    records = json.loads((dataset / "data.json").read_text())
    records[1]["ocr_tokens"] = tokens
    if tokens == "gone":
        del records[1]["ocr_tokens"]
    (dataset / "data.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match=f"--ocr_tokens needs ocr_tokens in every record, a list of texts: {says}"):
        run.main(options(dataset, "--ocr_tokens"))
    assert not (dataset / "out").exists()


def test_a_picture_has_no_tokens(dataset):
    with pytest.raises(SystemExit):
        run.main(["--image", str(dataset / "images" / "a.png"), "--question", "what?", "--ocr_tokens"])


def test_textvqa_joins_the_tokens_of_its_own_ocr(tmp_path):
    entry = {"question": "what brand?", "image_id": "0054c9", "image_width": 60, "image_height": 40, "answers": ["a"],
             "question_id": 1}  # fmt: skip
    for name, data in (("TextVQA_0.5.1_val.json", [entry, entry | {"question_id": 2, "image_id": "1111"}]),
                       ("TextVQA_Rosetta_OCR_v0.2_val.json",
                        [{"image_id": "0054c9", "ocr_tokens": TOKENS[0], "ocr_info": []}])):  # fmt: skip
        (tmp_path / name).write_text(json.dumps({"data": data}))
    for name in ("0054c9", "1111"):
        photo(60, 40).save(tmp_path / f"{name}.jpg")
    records = releases.prepare("textvqa", tmp_path, tmp_path / "target")
    assert [record.get("ocr_tokens") for record in records] == [TOKENS[0], None]
