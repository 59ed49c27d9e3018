"""Official files, in small, become records; downloads survive what networks do."""

import io
import json
import os
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from builders import photo
from more_releases import RELEASES as MORE_RELEASES
from PIL import Image

from vicrop.dataset import check_record, load_task
from vicrop.evaluation.metrics import GRADERS
from vicrop.prepare import download as downloads
from vicrop.prepare import releases as prepare_data
from vicrop.prepare.download import Unavailable, download
from vicrop.tables import TASKS

TEN = [f"answer {number}" for number in range(10)]


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_images(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo(40, 30, seed=seed).save(folder / name)


# Each writes a release of a few entries in its official structure, and says what one of its records must be.
def textvqa(folder):
    entry = {"question": "what brand is it?", "image_id": "0054c91397f2fe05", "image_classes": ["Tool"],
             "flickr_original_url": "https://...", "flickr_300k_url": "https://...", "image_width": 1024,
             "image_height": 730, "answers": TEN, "question_tokens": ["what"], "question_id": 34602,
             "set_name": "val"}  # fmt: skip
    write_json(folder / "TextVQA_0.5.1_val.json",
               {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1",
                "data": [entry, entry | {"question_id": 34603}]})  # fmt: skip
    write_lines(folder / "jrzhang_TextVQA_GT_bbox.jsonl", [{"dataset_id": "34603", "bbox": [10, 20, 30, 5]}])
    (folder / "train_images").mkdir(parents=True)
    photo(1024, 730).save(folder / "train_images" / "0054c91397f2fe05.jpg")
    return {"id": "34603", "question": "what brand is it?", "labels": TEN, "image_path": "0054c91397f2fe05.jpg",
            "image_size": [1024, 730], "gt_bbox": [10, 20, 40, 25]}  # fmt: skip


def docvqa(folder):
    entry = {"questionId": 49153, "question": "What is the actual value?", "question_types": ["figure/diagram"],
             "image": "documents/pybv0228_81.png", "docId": 14465, "ucsf_document_id": "pybv0228",
             "ucsf_document_page_no": "81", "answers": ["0.28"], "data_split": "val"}  # fmt: skip
    about = {"dataset_name": "SP-DocVQA", "dataset_version": "1.0", "dataset_split": "val"}
    write_json(folder / "val_v1.0_withQT.json", about | {"data": [entry]})
    write_images(folder, "documents/pybv0228_81.png")
    return {"id": "49153", "question": "What is the actual value?", "labels": ["0.28"],
            "image_path": "pybv0228_81.png"}  # fmt: skip


def gqa(folder):
    entry = {"semantic": [], "entailed": [], "equivalent": ["201307251"], "question": "Is it overcast?",
             "imageId": "n161313", "isBalanced": True, "groups": {"global": None, "local": "13-weather_overcast"},
             "answer": "no", "semanticStr": "", "annotations": {}, "types": {}, "fullAnswer": "No."}  # fmt: skip
    write_json(folder / "questions1.2" / "testdev_balanced_questions.json", {"201307251": entry})
    write_images(folder / "images", "n161313.jpg")
    return {"id": "201307251", "question": "Is it overcast?", "labels": "no", "image_path": "n161313.jpg"}


def aokvqa(folder):
    choices = ["toothpick", "food", "popsicle", "cigarette"]
    entry = {"split": "val", "image_id": 461751, "question_id": "22jbM6gDxdaMaunuzgrsBB",
             "question": "What is in the motorcyclist's mouth?", "choices": choices, "correct_choice_idx": 3,
             "direct_answers": ["cigarette"] * 10, "difficult_direct_answer": False,
             "rationales": ["He's smoking."]}  # fmt: skip
    write_json(folder / "aokvqa_v1p0_val.json", [entry])
    write_images(folder / "val2017", "000000461751.jpg")
    return {"id": "22jbM6gDxdaMaunuzgrsBB", "question": "What is in the motorcyclist's mouth?",
            "labels": ["cigarette"] * 10, "image_path": "000000461751.jpg",
            "choices": choices, "correct_choice_idx": 3, "difficult_direct_answer": False}  # fmt: skip


def pope(folder):
    image, text = "COCO_val2014_000000310196.jpg", "Is there a snowboard in the image?"
    for split in ("random", "popular", "adversarial"):
        row = {"question_id": 1, "image": image, "text": text, "label": "yes"}
        write_lines(folder / f"coco_pope_{split}.json", [row])
    write_images(folder / "val2014", image)
    return {"id": "popular-1", "question": text, "labels": "yes", "image_path": image, "category": "popular"}


def vstar(folder):
    instruction = "Answer with the option's letter from the given choices directly."
    text = f"Is the dog left or right of the cat?\n(A) left\n(B) right\n{instruction}"
    rows = [
        {"image": "direct_attributes/sa_4690.jpg", "text": f"What color?\n(A) red\n(B) blue\n{instruction}",
         "category": "direct_attributes", "label": "A", "question_id": 0},
        {"image": "relative_position/sa_9.jpg", "text": text, "category": "relative_position", "label": "B",
         "question_id": 1},
    ]  # fmt: skip
    write_lines(folder / "test_questions.jsonl", rows)
    write_images(folder, "direct_attributes/sa_4690.jpg", "relative_position/sa_9.jpg")
    write_json(folder / "relative_position" / "sa_9.json",
               {"target_object": ["dog", "cat"], "bbox": [[10, 20, 5, 5], [30, 10, 4, 4]], "question": "...",
                "options": []})  # fmt: skip
    return {"id": "relative_position-1", "question": text, "labels": "B", "image_path": "relative_position/sa_9.jpg",
            "short_question": "Is the dog left or right of the cat?", "category": "relative_position",
            "gt_bbox": [10, 10, 34, 25]}  # fmt: skip


def vqav2(folder):
    numbers, image = range(262148000, 262148010), 262148
    questions = [{"image_id": image, "question": "Where is he looking?", "question_id": n} for n in numbers]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json",
               {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "questions": questions})  # fmt: skip
    answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(TEN, 1)]
    common = {"question_type": "none of the above", "multiple_choice_answer": "down", "answer_type": "other"}
    annotations = [common | {"answers": answers, "image_id": image, "question_id": n} for n in reversed(numbers)]
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"info": {}, "annotations": annotations})
    write_images(folder / "val2014", "COCO_val2014_000000262148.jpg")
    return {"id": "262148003", "question": "Where is he looking?", "labels": TEN,
            "image_path": "COCO_val2014_000000262148.jpg"}  # fmt: skip


RELEASES = {each.__name__: each for each in (textvqa, docvqa, gqa, aokvqa, pope, vstar, vqav2)}


def test_every_benchmark_has_a_converter():
    released = RELEASES.keys() | MORE_RELEASES.keys()
    assert released == prepare_data.CONVERTERS.keys() == TASKS.keys() - {"demo"}
    assert set(prepare_data.DOWNLOADS) | set(prepare_data.HUB) | set(prepare_data.LICENSED) == released


@pytest.mark.parametrize("dataset", RELEASES)
@pytest.mark.parametrize("how", [[], ["--copy"]], ids=["link", "copy"])
def test_a_release_becomes_records_that_run_and_score(tmp_path, capsys, dataset, how):
    expected = RELEASES[dataset](tmp_path / "release" / "deep")
    source, target = tmp_path / "release", tmp_path / "target"
    prepare_data.main([dataset, "--source", str(source), "--target", str(target), *how])
    records = load_task(target / "data.json")
    assert next(record for record in records if record["id"] == expected["id"]) == expected
    for record in records:
        assert check_record(record, target / "images").is_file()
        for grader in TASKS[dataset]["metrics"].values():
            assert 0 <= GRADERS[grader]("yes", record) <= 100
    printed = capsys.readouterr().out
    assert f"{len(records)} questions about" in printed
    prepare_data.main([dataset, "--source", str(source), "--target", str(target), *how])  # again: nothing to do
    assert load_task(target / "data.json") == records


def test_a_sample_is_drawn_by_its_seed(tmp_path):
    vqav2(tmp_path / "release")
    draw = lambda seed: [r["id"] for r in prepare_data.prepare("vqav2", tmp_path / "release", tmp_path, 4, seed)]  # noqa: E731
    assert len(draw(0)) == 4
    assert draw(0) == draw(0) == sorted(draw(0))
    assert len({tuple(draw(seed)) for seed in range(5)}) > 1


def broken(change):
    """A release of GQA to which something has happened."""

    def write(folder):
        gqa(folder)
        change(folder)

    return write


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "images" / "n161313.jpg").unlink(), "1 of 1 images of gqa are not in .*: n161313.jpg"),
        (lambda f: (f / "questions1.2" / "testdev_balanced_questions.json").unlink(), "must hold one testdev_balanced"),
        (lambda f: write_json(f / "copy" / "testdev_balanced_questions.json", {}), "must hold one .*found: copy/"),
        (lambda f: write_json(f / "questions1.2" / "testdev_balanced_questions.json", {"1": {}}), "no 'question'"),
        (lambda f: (f / "questions1.2" / "testdev_balanced_questions.json").write_text("{"), "Expecting"),
        (lambda f: write_json(f / "questions1.2" / "testdev_balanced_questions.json", {}), "no questions of gqa"),
        (lambda f: write_json(f / "questions1.2" / "testdev_balanced_questions.json", [1]), "not as in its official"),
    ],
)
def test_a_broken_release_is_one_clear_sentence_and_writes_nothing(tmp_path, change, says):
    broken(change)(tmp_path / "release")
    with pytest.raises(SystemExit, match=says):
        prepare_data.main(["gqa", "--source", str(tmp_path / "release"), "--target", str(tmp_path / "target")])
    assert not (tmp_path / "target" / "data.json").exists()


# Which file of a release has the entries, and where in it; what its labels are called there.
ENTRIES = {
    "textvqa": ("TextVQA_0.5.1_val.json", lambda content: content["data"], "answers"),
    "docvqa": ("val_v1.0_withQT.json", lambda content: content["data"], "answers"),
    "gqa": ("testdev_balanced_questions.json", lambda content: list(content.values()), "answer"),
    "aokvqa": ("aokvqa_v1p0_val.json", lambda content: content, "direct_answers"),
    "pope": ("coco_pope_popular.json", lambda content: content, "label"),
    "vstar": ("test_questions.jsonl", lambda content: content, "label"),
    "vqav2": ("v2_mscoco_val2014_annotations.json", lambda content: content["annotations"], "answers"),
}


def refused(tmp_path, capsys, dataset, change):
    """What is said of a release whose last entry was changed; nothing was written."""
    RELEASES[dataset](tmp_path / "release")
    name, entries_of, _ = ENTRIES[dataset]
    path = next((tmp_path / "release").rglob(name))
    lines = dataset in ("pope", "vstar")
    content = list(map(json.loads, path.read_text().splitlines())) if lines else json.loads(path.read_text())
    change(entries_of(content)[-1])
    write_lines(path, content) if lines else write_json(path, content)
    with pytest.raises(SystemExit) as stopped:
        prepare_data.main([dataset, "--source", str(tmp_path / "release"), "--target", str(tmp_path / "target")])
    assert not (tmp_path / "target").exists()
    return str(stopped.value)


WRONG = [None, 7, True, "", [], [7], ["a", None], {"a": 1}]  # for all
WRONG_LABELS = [(dataset, labels) for dataset in RELEASES for labels in WRONG]
WRONG_LABELS += [(dataset, "['cup', 'cup']") for dataset in ("textvqa", "docvqa", "aokvqa", "vqav2")]
WRONG_LABELS += [(dataset, ["yes"]) for dataset in ("gqa", "pope", "vstar")]
WRONG_LABELS += [("pope", "E"), ("pope", "no\n"), ("vstar", "E")]


@pytest.mark.parametrize(("dataset", "labels"), WRONG_LABELS)
def test_labels_of_a_wrong_type_are_refused_by_name(tmp_path, capsys, dataset, labels):
    field, value = ENTRIES[dataset][2], labels
    if dataset == "vqav2" and isinstance(labels, list):  # there an answer has more fields
        value = [{"answer": each} for each in labels]
    said = refused(tmp_path, capsys, dataset, lambda entry: entry.update({field: value}))
    assert "record '" in said or "is not as in its official files" in said
    assert "labels" in said or dataset == "vqav2"


@pytest.mark.parametrize(
    ("dataset", "change", "says"),
    [
        ("aokvqa", {"choices": "['a', 'b']"}, "record '22jbM6gDxdaMaunuzgrsBB': choices are a list of texts, not \"["),
        ("aokvqa", {"correct_choice_idx": 4}, "correct_choice_idx is the number of a choice (0 to 3), not 4"),
        ("aokvqa", {"correct_choice_idx": "3"}, "correct_choice_idx is the number of a choice, not '3'"),
        ("aokvqa", {"correct_choice_idx": True}, "correct_choice_idx is the number of a choice, not True"),
        ("aokvqa", {"difficult_direct_answer": "false"}, "difficult_direct_answer is true or false, not 'false'"),
        ("aokvqa", {"image_id": "461751"}, "image_id is a whole number, not '461751'"),
        ("aokvqa", {"question_id": None}, "record 0 has no id"),
        ("docvqa", {"questionId": True}, "questionId is a text or a whole number, not True"),
        ("textvqa", {"image_id": None}, "image_id is a text that is not empty, not None"),
        ("textvqa", {"question": ["what?"]}, "record '34603': question is a text that is not empty, not ['what?']"),
        ("textvqa", {"image_width": "1024"}, "record '34603': image_size is [width, height] in pixels"),
        ("textvqa", {"image_width": 730, "image_height": 1024}, "record '34603': image_size [730, 1024] is not that"),
        ("gqa", {"question": 7}, "record '201307251': question is a text that is not empty, not 7"),
        ("pope", {"image": 7}, "record 'popular-1': image_path is a text that is not empty, not 7"),
        ("pope", {"label": "maybe"}, "record 'popular-1': labels are \"yes\" or \"no\", not 'maybe'"),
        ("vstar", {"label": "C"}, "record 'relative_position-1': labels are the letter of an option (A, B), not 'C'"),
        ("vstar", {"text": " \n(A) a\n(B) b"}, "short_question is a text that is not empty, not ' '"),
        ("vstar", {"text": "Left or right?"}, "has no lines like '(A) red'"),
        ("vstar", {"text": "Which? (A) a (B) b\n(C) c\n(D) d"}, "'relative_position-1': its question must have two"),
        ("vqav2", {"question_id": 262148001}, "ids must differ, and each of these comes twice: 262148001"),
    ],
)  # fmt: skip
def test_an_entry_of_a_wrong_type_is_refused_by_name(tmp_path, capsys, dataset, change, says):
    assert says in refused(tmp_path, capsys, dataset, lambda entry: entry.update(change))


@pytest.mark.parametrize("dataset", RELEASES)
def test_an_entry_that_lacks_a_field_is_named_with_its_file(tmp_path, capsys, dataset):
    field = ENTRIES[dataset][2]
    said = refused(tmp_path, capsys, dataset, lambda entry: entry.pop(field))
    assert re.search(rf"(json|jsonl): (question_?[iI]d )?'?\w+'?: an entry of {dataset} .* has no '{field}'", said)


@pytest.mark.parametrize("ids", [(1, "1"), ("7", "7"), (3, 3)])
def test_equal_ids_are_refused_whatever_their_type(tmp_path, capsys, ids):
    aokvqa(tmp_path / "release")
    path = tmp_path / "release" / "aokvqa_v1p0_val.json"
    (entry,) = json.loads(path.read_text())
    write_json(path, [entry | {"question_id": key} for key in ids])
    with pytest.raises(SystemExit, match="ids must differ, and each of these comes twice: "):
        prepare_data.main(["aokvqa", "--source", str(tmp_path / "release"), "--target", str(tmp_path / "target")])
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ([900, 700, 1000, 720], "reaches beyond its image of 1024 x 730 pixels"),  # x2, y2 taken for width and height
        ([0.1, 0.2, 0.3, 0.4], "has a side under one pixel"),
        ([500, 720, 200, 280], "reaches beyond its image"),  # thousandths of its sides
        ([-5, 0, 20, 20], "reaches beyond its image"),
        ([10, 20, 30], ": 34603: a box is [x, y, width, height] in pixels, not [10, 20, 30]"),
        ([10, 20, 30, "5"], "a box is [x, y, width, height] in pixels, not [10, 20, 30, '5']"),
        (None, "a box is [x, y, width, height] in pixels, not None"),
    ],
)
def test_a_box_that_the_images_size_contradicts_is_refused_by_name(tmp_path, box, says):
    textvqa(tmp_path / "release")
    write_lines(tmp_path / "release" / "jrzhang_TextVQA_GT_bbox.jsonl", [{"dataset_id": 34603, "bbox": box}])
    with pytest.raises(SystemExit) as stopped:
        prepare_data.main(["textvqa", "--source", str(tmp_path / "release"), "--target", str(tmp_path / "target")])
    assert says in str(stopped.value)
    assert "34603" in str(stopped.value)
    assert not (tmp_path / "target").exists()


def test_a_release_without_image_sizes_has_them_from_its_images_as_they_are_seen(tmp_path):
    vstar(tmp_path / "release")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(30, 40).save(tmp_path / "release" / "relative_position" / "sa_9.jpg", exif=exif)  # 40 x 30 once it is turned
    prepare_data.prepare("vstar", tmp_path / "release", tmp_path / "target")
    annotation = tmp_path / "release" / "relative_position" / "sa_9.json"
    fine = [1, 2, 30, 20]  # it encloses most of the others, so that the box around both could be one
    for box in ([10, 20, 35, 5], [5, 25, 5, 9], [0.2, 0.5, 0.3, 0.1], [5, 5, 0, 9], [20, 20, -9, 3]):
        write_json(annotation, {"bbox": [fine, box]})
        with pytest.raises(ValueError, match=r"record 'relative_position-1': .*sa_9.json: box \["):
            prepare_data.prepare("vstar", tmp_path / "release", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def packed_release(folder, dataset, names, ending):
    """A release of which the files that match `names` lie in an archive."""
    RELEASES[dataset](folder)
    files = [path for path in sorted(folder.rglob("*.*")) if any(path.match(name) for name in names)]
    archive = folder / f"all{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in files:
                file.write(path, f"inner/{path.name}")
    else:
        with tarfile.open(archive, f"w:{ending.rpartition('.')[2].replace('tgz', 'gz').replace('tar', '')}") as file:
            for path in files:
                file.add(path, f"inner/{path.name}")
    for path in files:
        path.unlink()
    return archive


@pytest.mark.parametrize(
    ("dataset", "names", "ending"),
    [
        ("gqa", ["*.jpg"], ".zip"), ("textvqa", ["*.jpg"], ".tar"), ("docvqa", ["*.png"], ".tar.gz"),
        ("pope", ["*.jpg"], ".ZIP"), ("vqav2", ["v2_OpenEnded*"], ".zip"), ("aokvqa", ["aokvqa*.json"], ".tar.gz"),
        ("docvqa", ["val_v1.0*.json"], ".tgz"), ("vstar", ["sa_4690.jpg"], ".tar.xz"),
    ],
)  # fmt: skip
def test_an_archive_that_is_not_unpacked_is_named(tmp_path, dataset, names, ending):
    archive = packed_release(tmp_path / "release", dataset, names, ending.lower())
    archive = archive.rename(archive.with_name(f"all{ending}"))
    (tmp_path / "release" / "a.zip").write_bytes(b"PK: half of one")
    with pytest.raises(SystemExit, match=rf"{archive} has inner/.*: unpack it there"):
        prepare_data.main([dataset, "--source", str(tmp_path / "release"), "--target", str(tmp_path / "target")])
    assert not (tmp_path / "target").exists()


def test_an_archive_that_has_nothing_of_it_is_not_blamed(tmp_path):
    packed_release(tmp_path / "release", "gqa", ["*.jpg"], ".zip").unlink()
    with zipfile.ZipFile(tmp_path / "release" / "other.zip", "w") as file:
        file.writestr("other.jpg", b"")
    with pytest.raises(SystemExit) as stopped:
        prepare_data.main(["gqa", "--source", str(tmp_path / "release"), "--target", str(tmp_path / "target")])
    assert "other.zip" not in str(stopped.value)


def test_an_image_may_not_leave_its_folder(tmp_path):
    gqa(tmp_path)
    questions = tmp_path / "questions1.2" / "testdev_balanced_questions.json"
    write_json(questions, {"1": {"question": "q?", "imageId": "../../n161313", "answer": "no"}})
    with pytest.raises(ValueError, match="record '1'.*would leave"):
        prepare_data.prepare("gqa", tmp_path, tmp_path / "target")


def test_links_are_followed_and_their_files_linked(tmp_path):
    """A folder elsewhere, and files that are relative links, as a hub's cache has them."""
    gqa(tmp_path / "real")
    (tmp_path / "real" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "n161313.jpg").rename(tmp_path / "blob")
    (tmp_path / "elsewhere" / "n161313.jpg").symlink_to("../blob")
    (tmp_path / "real" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "real")
    (record,) = prepare_data.prepare("gqa", tmp_path / "real", tmp_path / "target")
    path = check_record(record, tmp_path / "target" / "images")
    assert path.read_bytes() == (tmp_path / "blob").read_bytes()


def test_two_different_images_of_one_name_are_refused(tmp_path):
    gqa(tmp_path)
    write_images(tmp_path / "smaller", "other.jpg", "n161313.jpg")
    with pytest.raises(ValueError, match="which one is n161313.jpg"):
        prepare_data.prepare("gqa", tmp_path, tmp_path / "target")


def test_a_question_that_comes_twice_writes_nothing(tmp_path):
    pope(tmp_path / "release")
    path = next((tmp_path / "release").rglob("coco_pope_random.json"))
    path.write_text(2 * path.read_text())
    with pytest.raises(SystemExit, match="ids must differ"):
        prepare_data.main(["pope", "--source", str(tmp_path / "release"), "--target", str(tmp_path / "target")])
    assert not (tmp_path / "target").exists()


def test_an_image_that_has_changed_is_replaced(tmp_path):
    gqa(tmp_path / "release")
    (image,) = (tmp_path / "release").rglob("n161313.jpg")
    for change in (False, True):
        if change:  # one byte, in a file of the same size
            time = image.stat().st_mtime_ns
            image.write_bytes(image.read_bytes()[:-1] + b"x")
            os.utime(image, ns=(time, time))
        prepare_data.prepare("gqa", tmp_path / "release", tmp_path / "target", copy=True)
        assert (tmp_path / "target" / "images" / "n161313.jpg").read_bytes() == image.read_bytes()


def test_a_licensed_dataset_names_the_page(tmp_path):
    with pytest.raises(SystemExit, match="https://rrc.cvc.uab.es"):
        prepare_data.main(["docvqa", "--download", "--target", str(tmp_path)])


# ------------------------------------------------------------------------------------------------------------ downloads
class Server(BaseHTTPRequestHandler):
    """Serves `content`, in the manner of `faults`: one for each request, and then without any."""

    content, faults, asked, tag, time = b"", [], [], '"1"', None

    def do_GET(self):  # noqa: N802 (the name is the library's)
        self.asked.append(self.headers.get("Range"))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if fault != "no ranges" else 0
        if "If-Range" in self.headers and self.headers["If-Range"] not in (self.tag, self.time):
            start = 0
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.end_headers()
            return
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.tag)
        if self.time:
            self.send_header("Last-Modified", self.time)
        self.send_header("Content-Length", str(len(body) + (7 if fault == "wrong size" else 0)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "breaks" else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """(url of a file, its handler)."""
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    Server.content, Server.faults, Server.asked = bytes(range(256)) * 3000, [], []
    Server.tag, Server.time = '"1"', None
    http = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/file.bin", Server
    http.shutdown()
    http.server_close()


def test_a_file_that_nothing_marks_is_not_mixed_with_an_older_one(server, tmp_path):
    url, handler = server
    handler.tag, handler.faults = 'W/"1"', ["breaks", 404]
    with pytest.raises(Unavailable):
        download(url, tmp_path / "file.bin")
    handler.content = handler.content[::-1]
    assert download(url, tmp_path / "file.bin").read_bytes() == handler.content


def test_a_file_that_only_its_time_marks_is_not_mixed_with_an_older_one(server, tmp_path):
    url, handler = server
    handler.tag, handler.time, handler.faults = 'W/"1"', "Mon, 02 Nov 2026 10:00:00 GMT", ["breaks", 404]
    with pytest.raises(Unavailable):
        download(url, tmp_path / "file.bin")
    handler.content, handler.time = handler.content[::-1], "Tue, 03 Nov 2026 10:00:00 GMT"
    assert download(url, tmp_path / "file.bin").read_bytes() == handler.content


def test_a_download_that_was_killed_before_its_last_step_is_done(server, tmp_path):
    url, handler = server
    (tmp_path / "file.bin.part").write_bytes(handler.content)
    (tmp_path / "file.bin.part.version").write_text(handler.tag)
    assert download(url, tmp_path / "file.bin").read_bytes() == handler.content
    assert handler.asked == [f"bytes={len(handler.content)}-"]


@pytest.mark.parametrize("faults", [[], ["breaks"], ["breaks", "breaks", 503], ["wrong size"], ["breaks", "no ranges"]])
def test_a_download_is_whole_whatever_happened_on_the_way(server, tmp_path, faults):
    url, handler = server
    handler.faults = list(faults)
    assert download(url, tmp_path / "file.bin").read_bytes() == handler.content
    assert not list(tmp_path.glob("*.part"))
    if faults == ["breaks"]:
        assert handler.asked == [None, f"bytes={len(handler.content) // 2}-"]  # only the rest, the second time
    asked = len(handler.asked)
    download(url, tmp_path / "file.bin")
    assert len(handler.asked) == asked  # it is there


def test_a_download_goes_on_in_another_run(server, tmp_path):
    url, handler = server
    (tmp_path / "file.bin.part").write_bytes(handler.content[:1000])
    (tmp_path / "file.bin.part.version").write_text(handler.tag)
    assert download(url, tmp_path / "file.bin").read_bytes() == handler.content
    assert handler.asked == ["bytes=1000-"]


def test_a_file_that_has_changed_meanwhile_is_fetched_anew(server, tmp_path):
    url, handler = server
    handler.faults = ["breaks", 404]
    with pytest.raises(Unavailable):
        download(url, tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").stat().st_size == len(handler.content) // 2
    handler.content, handler.tag = handler.content[::-1], '"2"'
    assert download(url, tmp_path / "file.bin").read_bytes() == handler.content
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_a_broken_archive_is_removed_and_said(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK no zip")
    with pytest.raises(Unavailable, match="was broken .* and is removed"):
        prepare_data.unpack(tmp_path / "images.zip")
    assert not (tmp_path / "images.zip").exists()


def test_an_archive_with_a_changed_bit_is_refused(tmp_path):
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        content = np.random.default_rng(0).bytes(20000).hex().encode()
        entry = tarfile.TarInfo("data.json")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    whole = (tmp_path / "all.tar.gz").read_bytes()
    for place in np.random.default_rng(1).integers(20, len(whole), 20):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "changed.tar.gz").write_bytes(changed)
        with pytest.raises(Unavailable, match="was broken"):
            prepare_data.unpack(tmp_path / "changed.tar.gz")
        assert not (tmp_path / "data.json").exists()
    prepare_data.unpack(tmp_path / "all.tar.gz")
    assert (tmp_path / "data.json").read_bytes() == content


def test_a_part_that_is_too_long_is_fetched_anew(server, tmp_path):
    url, handler = server
    (tmp_path / "file.bin.part").write_bytes(handler.content + b"more")
    (tmp_path / "file.bin.part.version").write_text(handler.tag)
    assert download(url, tmp_path / "file.bin").read_bytes() == handler.content


def test_what_cannot_be_had_is_said_at_once_and_a_dead_line_after_some_tries(server, tmp_path):
    url, handler = server
    handler.faults = [404]
    with pytest.raises(Unavailable, match="file.bin cannot be downloaded: 404"):
        download(url, tmp_path / "file.bin")
    assert len(handler.asked) == 1
    handler.faults = [500] * 9
    with pytest.raises(Unavailable, match="could not be fetched in 5 tries"):
        download(url, tmp_path / "file.bin")
    assert not (tmp_path / "file.bin").exists()


def test_a_dataset_is_fetched_unpacked_and_prepared(server, tmp_path, monkeypatch):
    """GQA as two archives on a server."""
    url, handler = server
    gqa(tmp_path / "release")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in (tmp_path / "release").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "release"))
    handler.content = (tmp_path / "all.zip").read_bytes()
    monkeypatch.setitem(prepare_data.DOWNLOADS, "gqa", [url.replace("file.bin", "questions.zip")])
    for _ in range(2):
        prepare_data.main(["gqa", "--download", "--target", str(tmp_path / "gqa")])
    assert len(handler.asked) == 1  # the second time it is there
    assert [record["id"] for record in load_task(tmp_path / "gqa" / "data.json")] == ["201307251"]
