"""HR-Bench, MME-RealWorld, InfographicVQA, ChartQA and RefCOCO: official files become records, and official scores."""

import csv
import json
import os
import pickle
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from more_releases import (
    CHOICES,
    MME,
    MME_RECORD,
    RELEASES,
    RLE,
    TRIANGLE,
    chartqa,
    content_of,
    hrbench_4k,
    in_base64,
    infovqa,
    mme_realworld,
    named,
    refcoco,
    refcoco_plus,
    write_image,
    write_json,
    write_tsv,
)
from PIL import Image

from vicrop.dataset import check_record, load_task
from vicrop.evaluation import command as run
from vicrop.evaluation import score_table as get_score
from vicrop.evaluation.metrics import GRADERS, hrbench_details, mme_details, relaxed_match, score
from vicrop.evaluation.option_letters import first_letter, matched_letter
from vicrop.evaluation.scores import ScoreOptions
from vicrop.prepare import referring, releases
from vicrop.tables import TASKS


def prepared(dataset, source, target, *more):
    releases.main([dataset, "--source", str(source), "--target", str(target), *more])
    return {record["id"]: record for record in load_task(target / "data.json")}


def refused(dataset, source, target):
    """What is said of a release; nothing was written, and nothing is left."""
    with pytest.raises(SystemExit) as stopped:
        prepared(dataset, source, target)
    assert [path.name for path in target.parent.iterdir()] == ["release"]
    return str(stopped.value)


# ----------------------------------------------------------------------------------------------------------- converters
@pytest.mark.parametrize("dataset", RELEASES)
def test_a_release_becomes_records_that_run_and_score(tmp_path, capsys, dataset):
    expected = RELEASES[dataset](tmp_path / "release" / "deep")
    records = prepared(dataset, tmp_path / "release", tmp_path / "target")
    assert records[expected["id"]] == expected
    for record in records.values():
        with Image.open(check_record(record, tmp_path / "target" / "images")) as image:
            image.load()
        for grader in TASKS[dataset]["metrics"].values():
            assert 0 <= GRADERS[grader]("yes", record) <= 100
            wrong = GRADERS[grader]("", record | {"bbox": [0, 0, 1, 1]})
            right = GRADERS[grader](as_answer(record), record | {"bbox": record.get("gt_bbox")})
            assert right == 100
            assert wrong < 100 or record["labels"] == "A"  # MME-RealWorld's script takes nothing for an A
    assert f"{len(records)} questions about" in capsys.readouterr().out
    assert prepared(dataset, tmp_path / "release", tmp_path / "target", "--copy") == records
    assert sorted(path.name for path in tmp_path.iterdir()) == ["release", "target"]  # no unpacked images are left


def as_answer(record):
    labels = record.get("labels", "yes")
    return labels if isinstance(labels, str) else labels[0]


def test_the_permutations_of_hrbench_share_an_image_as_it_was_released(tmp_path):
    hrbench_4k(tmp_path / "release")
    records = prepared("hrbench_4k", tmp_path / "release", tmp_path / "target")
    assert len(records) == 8
    for question in range(2):
        own = [records[str(question * 4 + cycle)] for cycle in range(4)]
        (name,) = {record["image_path"] for record in own}
        assert (tmp_path / "target" / "images" / name).read_bytes() == content_of(question)
        assert {record["cycle"] for record in own} == {f"cycle {number}" for number in range(4)}
        assert {line[3:] for record in own for line in record["options"]} == {line[3:] for line in own[0]["options"]}
    assert len(list((tmp_path / "target" / "images").iterdir())) == 2


def test_the_categories_of_mme_are_those_of_its_script(tmp_path):
    mme_realworld(tmp_path / "release")
    other = prepared("mme_realworld", tmp_path / "release", tmp_path / "target")[
        "perception/monitoring/Vehicle/attribute/color/0001"
    ]
    assert other["detail"] == "Reasoning/Monitoring/vehicle/attribute"


class TestTables:
    """Parquet, as the hub has these benchmarks."""

    @pytest.fixture(autouse=True)
    def _datasets(self):
        pytest.importorskip("datasets")

    def test_hrbench(self, tmp_path):
        from datasets import Dataset

        expected = hrbench_4k(tmp_path / "release")
        table = tmp_path / "release" / "hr_bench_4k.tsv"
        csv.field_size_limit(1 << 30)
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        table.unlink()
        Dataset.from_list(rows).to_parquet(tmp_path / "release" / "hr_bench_4k-00000-of-00001.parquet")
        assert prepared("hrbench_4k", tmp_path / "release", tmp_path / "target")["5"] == expected

    def test_mme(self, tmp_path):
        from datasets import Dataset

        (tmp_path / "release").mkdir()
        for shard in range(2):
            row = {"index": shard, "question": MME["Text"], "multi-choice options": CHOICES, "answer": "E",
                   "category": "Perception/Monitoring", "l2-category": "Vehicle/counting",
                   "bytes": in_base64(content_of(shard))}  # fmt: skip
            Dataset.from_list([row]).to_parquet(tmp_path / "release" / f"train-0000{shard}-of-00002.parquet")
        records = prepared("mme_realworld", tmp_path / "release", tmp_path / "target")
        assert records["1"] == MME_RECORD | {"id": "1", "image_path": named(content_of(1))}
        assert len(records) == 2

    def test_chartqa(self, tmp_path):
        from datasets import Dataset, Features, Value
        from datasets import Image as Images

        (tmp_path / "release").mkdir()
        content = content_of(4, kind="PNG")
        kinds = Features({name: Value("string") for name in ("type", "question", "answer")} | {"image": Images()})
        rows = [{"type": f"{split}_test", "question": "How many bars?", "answer": "14",
                 "image": {"bytes": content, "path": None}} for split in ("human", "augmented")]  # fmt: skip
        Dataset.from_list(rows, kinds).to_parquet(tmp_path / "release" / "test-00000-of-00001.parquet")
        records = prepared("chartqa", tmp_path / "release", tmp_path / "target")
        assert records["augmented-1"] == {
            "id": "augmented-1", "question": "How many bars?", "labels": "14", "category": "augmented",
            "image_path": named(content, "png"),
        }  # fmt: skip


def test_parquet_without_its_library_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "test-00000.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'vicrop[hub]'" in refused("chartqa", tmp_path / "release", tmp_path / "target")


ROW = {"index": 0, "question": "What?", "answer": "A", "category": "single", "A": "red", "B": "blue", "C": "", "D": "",
       "cycle_category": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": "C"}, "record '0': labels are the letter of an option (A, B), not 'C'"),
        ({"answer": ""}, "record '0' has no labels"),
        ({"B": ""}, "record '0': options are a list of two texts or more"),
        ({"question": " "}, "record '0': "),
        ({"image": "0"}, "hr_bench_4k.tsv: index '0': its image is that of row 0, which does not come before it"),
        ({"image": "x" * 80}, "hr_bench_4k.tsv: index '0': 'xxx"),
        ({"image": in_base64(b"no image" * 20)}, "is no image in base64"),
        ({"category": None}, None),
    ],
)
def test_a_wrong_row_is_named_and_nothing_is_written(tmp_path, change, says):
    row = ROW | {"image": in_base64(content_of(0))} | change
    if says is None:
        del row["category"]
        says = (
            "hr_bench_4k.tsv: index '0': an entry of hrbench_4k is not as in its official files, or has no 'category'"
        )
    write_tsv(tmp_path / "release" / "hr_bench_4k.tsv", [row])
    assert says in refused("hrbench_4k", tmp_path / "release", tmp_path / "target")


@pytest.mark.parametrize("dataset", RELEASES)
def test_an_empty_source_is_told_what_it_must_hold(tmp_path, dataset):
    (tmp_path / "release").mkdir()
    assert "must hold" in refused(dataset, tmp_path / "release", tmp_path / "target")


def test_tables_of_all_of_mme_are_not_taken_for_its_lite(tmp_path):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    assert "must hold MME-RealWorld-Lite.json or mme_realworld_lite.tsv" in refused(
        "mme_realworld_lite", tmp_path / "release", tmp_path / "target"
    )


@pytest.mark.parametrize(
    ("release", "name", "dataset", "change", "says"),
    [
        (infovqa, "infographicsVQA*.json", "infovqa", {"answers": "3"}, "record '98313': labels are a list of texts"),
        (infovqa, "infographicsVQA*.json", "infovqa", {"questionId": None}, "questionId is a text or a whole number"),
        (chartqa, "test_human.json", "chartqa", {"label": 14}, "record 'human-0': labels are a text"),
        (mme_realworld, "MME_RealWorld.json", "mme_realworld", {"Answer choices": ["13", "90"]},
         "options begin like 'A. red' or '(A) red', not '13'"),
        (mme_realworld, "MME_RealWorld.json", "mme_realworld", {"Image": "../../x.jpg"}, "would leave the image"),
        (mme_realworld, "MME_RealWorld.json", "mme_realworld", {"Task": None}, "MME_RealWorld.json: Question_id"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_and_nothing_is_written(tmp_path, release, name, dataset, change, says):
    release(tmp_path / "release")
    path = next((tmp_path / "release").rglob(name))
    content = json.loads(path.read_text())
    entries = content["data"] if isinstance(content, dict) else content
    entries[0] |= change
    if None in change.values() and "Task" in change:
        del entries[0]["Task"]
    write_json(path, content)
    assert says in refused(dataset, tmp_path / "release", tmp_path / "target")


@pytest.mark.parametrize("dataset", ["hrbench_4k", "mme_realworld_lite"])
def test_of_a_hubs_dataset_only_the_wanted_files_are_fetched(tmp_path, monkeypatch, capsys, dataset):
    """A stand-in for the hub: what it has lies in a folder, and what matches is copied."""
    RELEASES[dataset](tmp_path / "hub")
    (tmp_path / "hub" / "others.tsv").write_text("of no use")

    def snapshot(name, repo_type, local_dir, allow_patterns):
        assert (name.count("/"), repo_type) == (1, "dataset")
        for path in (tmp_path / "hub").iterdir():
            if path.match(allow_patterns):
                shutil.copy(path, local_dir)

    def info(_, name, files_metadata):
        assert (name.count("/"), files_metadata) == (1, True)
        paths = (tmp_path / "hub").iterdir()
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=path.name, size=2_000_000_000) for path in paths])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    releases.main([dataset, "--download", "--target", str(tmp_path / "target")])
    assert f"{dataset}: 1 files to download into {tmp_path / 'target' / 'source'}: 2.0 GB" in capsys.readouterr().out
    assert len(list((tmp_path / "target" / "source").iterdir())) == 1
    assert load_task(tmp_path / "target" / "data.json")


def test_the_orders_of_a_questions_options_are_drawn_together():
    records = [{"id": f"{n}-{cycle}", "image_path": f"{n}.png", "short_question": "what?", "cycle": cycle}
               for n in range(10) for cycle in range(4)]  # fmt: skip
    for sample, expected in ((8, 8), (9, 12), (1, 4), (40, 40)):
        found = releases.drawn(records, sample, seed=0)
        assert len(found) == expected
        assert found == [record for record in records if record in found]  # in their order
        assert set(Counter(record["image_path"] for record in found).values()) == {4}
    alone = [{"id": n, "image_path": "one.png"} for n in range(50)]
    assert len(releases.drawn(alone, 7, seed=0)) == 7
    assert releases.drawn(alone, 7, seed=0) == releases.drawn(alone, 7, seed=0) != releases.drawn(alone, 7, seed=1)


def test_the_page_of_a_licence_is_named_with_what_to_fetch_there(tmp_path):
    with pytest.raises(
        SystemExit, match=r"infovqa needs its licence accepted: register at https://rrc\S*, download task 3"
    ):
        releases.main(["infovqa", "--download", "--target", str(tmp_path)])


# -------------------------------------------------------------------------------------------------------------- RefCOCO
def test_phrases_lie_beside_the_records_with_boxes_and_masks(tmp_path):
    refcoco(tmp_path / "release")
    records = prepared("refcoco", tmp_path / "release", tmp_path / "target")
    lines = list(map(json.loads, (tmp_path / "target" / "grounding.jsonl").read_text().splitlines()))
    assert [line["id"] for line in lines] == list(records) == ["val-0", "val-1", "testA-5"]
    assert lines[0]["bbox"] == [2.0, 2.0, 10.5, 10.0]
    assert [line["segmentation"] for line in lines] == [TRIANGLE, TRIANGLE, RLE]
    assert (tmp_path / "target" / lines[0]["image_path"]).is_file()


def test_two_files_of_one_split_are_named(tmp_path):
    """MDETR's and MiniGPT-4's have the same phrases: each would count twice."""
    refcoco_plus(tmp_path / "release")
    shutil.copy(tmp_path / "release" / "finetune_refcoco+_val.json", tmp_path / "release" / "refcoco+_val.json")
    assert "must hold one file of refcoco+'s val, found: finetune_refcoco+_val.json, refcoco+_val.json" in refused(
        "refcoco_plus", tmp_path / "release", tmp_path / "target"
    )


def test_refers_files_are_read_once(tmp_path, monkeypatch):
    read, paths = referring.read_refs, []
    monkeypatch.setattr(referring, "read_refs", lambda path: paths.append(path) or read(path))
    refcoco(tmp_path / "release")
    assert len(prepared("refcoco", tmp_path / "release", tmp_path / "target")) == 3
    assert len(paths) == 1


class Evil:
    """A pickle of it runs code."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("content", [pickle.dumps([Evil()]), b"no pickle", b""])
def test_a_pickle_that_holds_more_than_data_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    refcoco(tmp_path / "release")
    path = tmp_path / "release" / "refcoco" / "refs(unc).p"
    path.write_bytes(content)
    assert f"{path} is none of refer's files" in refused("refcoco", tmp_path / "release", tmp_path / "target")
    assert not (tmp_path / "evil").exists()


# -------------------------------------------------------------------------------------------------------------- graders
COLORS = {"A": "Red", "B": "blue", "C": "green", "D": "dark grey"}  # 21 letters: answers of up to 42 are looked into


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # can_infer_option: .()[],:;!*#{} are spaces; the only letter among the words counts if it is one of the last 5
        ("A", "A"), ("(B)", "B"), ("C.", "C"), ("D: dark grey", "D"), ("**B**", "B"), ("{A}", "A"),
        ("The answer is B", "B"),
        ("I am sure that it is D", "D"), ("A is the answer here", None), ("A or B", None), ("B?", None), ("b", None),
        ("Of all of them D is it, I", "D"), ("Of all of them D is it, I say", None),
        # then "(correct) answer is B", with asterisks or without, in any case
        ("The correct answer is **C**, not A", "C"), ("answer is b or A or D", "B"), ("Answer  is\nB, A", "B"),
        ("answer: B or A", None),
        # Z where no option is named; refusals
        ("Z", "Z"), ("Z or A", "A"), ("Cannot determine the answer, A", "Z"), ("I can't process this file.", "Z"),
        # then can_infer_text: the only option whose text is in the answer, in small letters, unless that is long
        ("red", "A"), ("It is BLUE.", "B"), ("red or blue", None), ("covered", "A"), ("dark", None), ("grey", None),
        ("A blue or B", "B"), ("A box. It is green, I say so again", "C"), ("blue" + "." * 38, "B"),
        ("blue" + "." * 39, None), ("", None),
    ],
)  # fmt: skip
def test_hrbench_is_read_as_vlmevalkit_does(answer, letter):
    assert matched_letter(answer, COLORS) == letter
    for right in COLORS:
        record = {"id": "1", "labels": right, "options": [f"{name}. {text}" for name, text in COLORS.items()]}
        assert GRADERS["hrbench"](f" {answer}\n", record) == 100 * (letter == right)  # it strips what was predicted


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # the first capital from A to E, wherever it stands, once the prefixes are gone
        ("E", "E"), ("(B) 90", "B"), ("The best answer is: D", "D"), ("The correct answer is C.", "C"), ("D or A", "D"),
        ("Based on the image, A", "B"), ("Eleven", "E"), ("Best answer: C", "B"), ("The best option is C", "C"),
        ("The answer is: Z, or A", "A"), ("All of them: C", "A"), ("F", "E"),
        # else the first option of which the answer is a part, in small letters
        ("77", "C"), ("6", "D"), ("a", "A"), ("b", "B"), ("the image does not feature the buses", "E"), ("", "A"),
        (" \n", "A"), ("The answer is", "A"), ("The answer is 90", "B"), ("The answer is: 90", ""), ("none", ""),
        ("33", ""), ("one two three four five six seven eight nine ten eleven", ""),
    ],
)  # fmt: skip
def test_mme_realworld_is_read_as_its_script_does(answer, letter):
    """The list of prefixes in that script lacks two commas, so "Best answer:" is none. "F" is a part of "(E) ..."."""
    assert first_letter(answer, CHOICES) == letter
    for right in "ABCDE":
        assert GRADERS["mme_realworld"](answer, MME_RECORD | {"labels": right}) == 100 * (letter == right)


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        # both numbers, the label not 0: |answer - label| / |label| <= 0.05
        ("14", "14", True), ("14.7", "14", True), ("14.71", "14", False), ("13.3", "14", True), ("13.29", "14", False),
        ("-14", "14", False), ("-14", "-14.5", True), ("2015", "2010", True), ("1e3", "1000", True),
        (" 14 ", "14", True), ("1_000", "1000", True), ("14.", "14", True), ("+14", "14", True),
        # a percentage is its hundredth
        ("5%", "0.05", True), ("5%", "5%", True), ("5", "5%", False), ("0.052", "5%", True), ("50%%", "50%", True),
        ("%", "5%", False), ("5 %", "5%", True),
        # else equal in small letters, and nothing else
        ("Yes", "yes", True), ("yes.", "yes", False), (" yes", "yes", False), ("1,000", "1000", False),
        ("$14", "14", False), ("fourteen", "14", False), ("14", "fourteen", False), ("[1, 2]", "[1, 2]", True),
        # 0 is compared as a text; what is not finite is near nothing
        ("0", "0", True), ("0.0", "0", False), ("0%", "0", False), ("nan", "nan", False), ("inf", "inf", False),
        ("0", "0.01", False),
    ],
)  # fmt: skip
def test_chartqa_is_judged_as_pix2struct_does(answer, label, right):
    assert relaxed_match(answer, label) is right
    assert GRADERS["chartqa"](answer, {"id": "1", "labels": label}) == 100 * right
    assert GRADERS["chartqa"](answer, {"id": "1", "labels": ["something else", label]}) == 100 * right


def test_crops_are_judged_by_their_boxes():
    """The object is 20 x 10 in an image of 40 x 30, and has its middle; without a crop the whole image is the box."""
    record = {"id": "1", "image_size": [40, 30], "gt_bbox": [10, 10, 30, 20], "original_answer": "", "crop_answer": ""}
    half, away, none = {"bbox": [0, 0, 20, 20]}, {"bbox": [30, 20, 40, 30]}, {"bbox": None, "gated": True}
    expected = {
        "box_iou": (200 / 12, 100 * 100 / (400 + 200 - 100), 0, 200 / 12), "box_inside": (100, 50, 0, 100),
        "box_point": (100, 100, 0, 100),
    }  # fmt: skip
    for grader, (before, *after) in expected.items():
        for box, value in zip((half, away, none), after, strict=True):
            assert score(record | box, grader) == pytest.approx((before, value))
        assert score(record | {"bbox": record["gt_bbox"]}, grader)[1] == 100
        with pytest.raises(ValueError, match="record '1': image_size and gt_bbox are needed"):
            score({name: value for name, value in record.items() if name != "image_size"}, grader)


@pytest.mark.parametrize("grader", ["hrbench", "mme_realworld"])
def test_options_are_read_alike_in_both_forms(grader):
    """By their texts, where an answer has no letter."""
    dotted = [line.replace("(", "").replace(")", ".") for line in CHOICES]
    for options in (CHOICES, dotted):
        record = {"id": "7", "labels": "C", "options": options}
        assert [GRADERS[grader](answer, record) for answer in ("77", "13", "C")] == [100, 0, 100]


@pytest.mark.parametrize("options", [None, [], "A. red", ["A. red", 7], {"A": "red"}, [""], ["A) red"], ["red"]])
@pytest.mark.parametrize("grader", ["hrbench", "mme_realworld"])
def test_options_that_are_none_name_their_record(grader, options):
    with pytest.raises(ValueError, match=r"record '7': options are a list of texts like 'A. red', not"):
        GRADERS[grader]("A", {"id": "7", "labels": "A", "options": options})


# --------------------------------------------------------------------------------------------------------------- tables
def written(path, records):
    base = {"question": "q?", "image_path": "a.png", "bbox": [0, 0, 9, 9]}
    path.write_text(json.dumps([base | record for record in records]))
    return get_score.report(path.parent, path.parent, ScoreOptions(bootstrap=100))


def test_gqa_has_a_row_for_each_type_of_question(tmp_path):
    types = [("query", "rel"), ("query", "attr"), ("verify", "attr")]
    answers = {"labels": "yes", "original_answer": "no", "crop_answer": "yes"}
    records = [answers | {"id": str(number), "category": structural, "subcategory": semantic}
               for number, (structural, semantic) in enumerate(types)]  # fmt: skip
    rows = written(tmp_path / "llava-gqa-rel_att.json", records)
    counts = {row["part"]: row["n"] for row in rows if row["metric"] == "official"}
    assert counts == {"all": 3, "query": 2, "verify": 1, "rel": 1, "attr": 2}


def test_a_question_of_several_kinds_counts_in_each(tmp_path):
    kinds = [["single span", "multi-span"], ["single span"], "list"]
    records = [{"id": str(number), "labels": ["yes"], "original_answer": "no", "crop_answer": "yes", "category": each}
               for number, each in enumerate(kinds)]  # fmt: skip
    rows = written(tmp_path / "llava-infovqa-rel_att.json", records)
    assert {row["part"]: row["n"] for row in rows} == {"all": 3, "single span": 2, "multi-span": 1, "list": 1}


def test_hrbench_averages_its_cycles(tmp_path, capsys):
    """Three right of four in one cycle, none of one in the other: 37.5 %, where all together are 60 %."""
    same = {"labels": "A", "options": ["A. red", "B. blue"], "original_answer": "B", "category": "single"}
    records = [same | {"id": str(number), "crop_answer": "A" if number < 3 else "B", "cycle": f"cycle {number // 4}"}
               for number in range(5)]  # fmt: skip
    rows = written(tmp_path / "llava-hrbench_4k-rel_att.json", records)
    row = next(row for row in rows if row["part"] == "all")
    assert (row["with_crop"], row["average of cycles, with crop"]) == (60, 37.5)
    assert {each["part"]: each["with_crop"] for each in rows} == {
        "all": 60, "single": 60, "cycle 0": 75, "cycle 1": 0
    }  # fmt: skip
    broken = records[0] | {"error": "no such image"}
    assert hrbench_details([""], [broken]) == {"average of cycles": 0}
    assert mme_details(["E", "E is it", "A", ""], [MME_RECORD] * 3 + [MME_RECORD | {"error": "no"}]) == {"E": 2}


def test_a_benchmark_that_the_paper_has_not_is_left_out_of_its_metric(tmp_path, capsys):
    written(tmp_path / "llava-chartqa-rel_att.json",
            [{"id": "1", "labels": "yes", "original_answer": "no", "crop_answer": "yes"}])  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        get_score.main(["--data_dir", str(tmp_path), "--metric", "paper"])
    assert "of chartqa there is no metric paper, but official" in str(stopped.value)
    assert "Traceback" not in capsys.readouterr().err


def test_the_types_of_gqas_questions_are_its_own(tmp_path):
    """testdev_balanced_questions.json: structural is how a question is built, semantic what it is about."""
    entry = {"question": "Is it overcast?", "imageId": "n161313", "answer": "no",
             "types": {"detailed": "weatherVerifyC", "semantic": "global", "structural": "verify"}}  # fmt: skip
    write_json(tmp_path / "testdev_balanced_questions.json", {"201307251": entry})
    write_image(tmp_path / "images" / "n161313.jpg")
    (record,) = releases.prepare("gqa", tmp_path, tmp_path / "target")
    assert (record["category"], record["subcategory"]) == ("verify", "global")


# ----------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize("dataset", ["hrbench_4k", "mme_realworld_lite", "infovqa", "chartqa", "refcoco"])
def test_a_prepared_benchmark_is_run_and_scored_under_its_name(tmp_path, capsys, dataset):
    """From official files to the table, as one types it."""
    RELEASES[dataset](tmp_path / "release")
    target = tmp_path / "target"
    releases.main([dataset, "--source", str(tmp_path / "release"), "--target", str(target)])
    run.main([
        "--model", "llava_tiny", "--device", "cpu", "--task", dataset, "--question_path", str(target / "data.json"),
        "--image_path", str(target / "images"), "--method", "center_crop", "--limit", "2", "--save_path",
        str(tmp_path / "results"),
    ])  # fmt: skip
    assert "no labels" not in capsys.readouterr().err
    rows = get_score.report(tmp_path / "results", tmp_path, ScoreOptions(bootstrap=50))
    whole = {row["metric"]: row for row in rows if row["part"] == "all"}
    assert whole.keys() == TASKS[dataset]["metrics"].keys()
    asked = min(2, len(load_task(target / "data.json")))
    assert all((row["n"], row["errors"]) == (asked, 0) for row in whole.values())
    if dataset == "refcoco":  # the middle of a 40 x 30 image, and what is around it, of an object at its upper left
        assert (whole["box_point"]["with_crop"], whole["box_inside"]["without_crop"]) == (0, 100)
        assert whole["box_iou"]["without_crop"] == pytest.approx(100 * 10.5 * 10 / (40 * 30))
