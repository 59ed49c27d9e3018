"""The seven benchmarks of the ViCrop paper: from their official files to records.

A converter takes a Source and yields records; `image_path` is the official name of the image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vicrop.dataset import box_xywh_to_xyxy, name_of, refuse_bad_ids, refuse_misplaced, shown
from vicrop.files import read_json, read_rows
from vicrop.images import size_as_seen
from vicrop.prepare.kinds import ByName, ByNumber
from vicrop.prepare.source import Source, official

OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"  # the texts that were read in TextVQA's images


def textvqa(source: Source) -> Iterator[dict[str, Any]]:
    """TextVQA 0.5.1, validation; with more fields if the source also has what they are joined from.

    gt_bbox: of jrzhang/TextVQA_GT_bbox, as JSON or JSON lines. ocr_tokens: of TextVQA_Rosetta_OCR_v0.2_val.json.
    """
    boxes, tokens = {}, {}
    if source.matching(OCR):
        tokens = {
            entry["image_id"]: entry["ocr_tokens"] for entry in source.each(source.json(OCR)["data"], OCR, "image_id")
        }
    if any(Path(name).match("*TextVQA_GT_bbox*.json*") for name in source.by_name):
        path = source.find("*TextVQA_GT_bbox*.json*")
        rows = read_rows(path)
        refuse_bad_ids(rows, path, "dataset_id")
        boxes = {
            str(row["dataset_id"]): box_xywh_to_xyxy(row["bbox"], f"{path}: {row['dataset_id']!r}: a box")
            for row in rows
        }
    name = "TextVQA_0.5.1_val.json"
    for entry in source.each(source.json(name)["data"], name, "question_id"):
        record = {"id": str(official(entry, "question_id", ByName)), "question": entry["question"],
                  "labels": entry["answers"], "image_path": f"{official(entry, 'image_id', ByName)}.jpg",
                  "image_size": [entry["image_width"], entry["image_height"]]}  # fmt: skip
        record |= {"gt_bbox": boxes[record["id"]]} if record["id"] in boxes else {}
        yield record | ({"ocr_tokens": tokens[entry["image_id"]]} if entry["image_id"] in tokens else {})


def docvqa(source: Source) -> Iterator[dict[str, Any]]:
    """DocVQA task 1, validation (`val_v1.0*.json`)."""
    for entry in source.each(source.json("val_v1.0*.json")["data"], "val_v1.0*.json", "questionId"):
        yield {
            "id": str(official(entry, "questionId", ByName)),
            "question": entry["question"],
            "labels": entry["answers"],
            "image_path": Path(entry["image"]).name,
        }  # fmt: skip (the folder's name differs between releases)


def gqa(source: Source) -> Iterator[dict[str, Any]]:
    """GQA, balanced test-dev questions; category and subcategory are the structural and the semantic type."""
    groups = {"category": "structural", "subcategory": "semantic"}
    for key, entry in source.json("testdev_balanced_questions.json").items():
        source.at = f"testdev_balanced_questions.json: {key!r}"
        record = {"id": key, "question": entry["question"], "labels": entry["answer"],
                  "image_path": f"{official(entry, 'imageId', ByName)}.jpg"}  # fmt: skip
        types = entry.get("types", {})
        yield record | {field: types[name] for field, name in groups.items() if name in types}


def aokvqa(source: Source) -> Iterator[dict[str, Any]]:
    """A-OKVQA 1.0, validation: direct answers, and the choices for the official multiple choice."""
    kept = ("choices", "correct_choice_idx", "difficult_direct_answer")
    for entry in source.each(source.json("aokvqa_v1p0_val.json"), "aokvqa_v1p0_val.json", "question_id"):
        record = {"id": entry["question_id"], "question": entry["question"], "labels": entry["direct_answers"],
                  "image_path": f"{official(entry, 'image_id', ByNumber):012}.jpg"}  # fmt: skip
        yield record | {name: entry[name] for name in kept if name in entry}


def pope(source: Source) -> Iterator[dict[str, Any]]:
    """POPE on COCO: its three files, each a category."""
    for split in ("random", "popular", "adversarial"):
        name = f"coco_pope_{split}.json"
        for entry in source.each(source.lines(name), name, "question_id"):
            key = official(entry, "question_id", ByName)
            yield {"id": f"{split}-{key}", "question": entry["text"], "labels": entry["label"],
                   "image_path": entry["image"], "category": split}  # fmt: skip


def vstar(source: Source) -> Iterator[dict[str, Any]]:
    """V*Bench: the question with its options as published; its map is made for the question without options.

    The label is the option's letter. gt_bbox encloses the targets of the annotation beside the image, if there is one.
    """
    for entry in source.each(source.lines("test_questions.jsonl"), "test_questions.jsonl", "question_id"):
        key = official(entry, "question_id", ByName)
        record = {"id": f"{entry['category']}-{key}", "question": entry["text"],
                  "labels": entry["label"], "image_path": entry["image"],
                  "short_question": entry["text"].split("\n")[0], "category": entry["category"]}  # fmt: skip
        annotation = source.image(str(Path(entry["image"]).with_suffix(".json")))
        if annotation:
            boxes = targets(annotation, source.image(entry["image"]), name_of(record))
            left, top, right, bottom = zip(*boxes, strict=True)
            record["gt_bbox"] = [min(left), min(top), max(right), max(bottom)]
        yield record


def targets(annotation: Path, image: Path | None, name: str) -> list[list[float]]:
    """The boxes (xyxy) of a V* annotation; each must lie in the image, if there is one.

    Raises:
        ValueError: beginning with `name`: there is no box, or one that does not lie in the image.
    """
    size, boxes = image and size_as_seen(image), []
    for box in read_json(annotation)["bbox"]:
        boxes.append(box_xywh_to_xyxy(box, f"{name}: {annotation}: a box"))
        refuse_misplaced(boxes[-1], size, f"{name}: {annotation}: box {shown(box)} (x, y, width, height)")
    if not boxes:
        raise ValueError(f"{name}: {annotation} has no box")
    return boxes


def vqav2(source: Source) -> Iterator[dict[str, Any]]:
    """VQAv2, validation: questions and annotations."""
    rows = source.json("v2_mscoco_val2014_annotations.json")["annotations"]
    refuse_bad_ids(rows, "v2_mscoco_val2014_annotations.json", "question_id")
    answers = {official(entry, "question_id", ByNumber): [answer["answer"] for answer in entry["answers"]]
               for entry in source.each(rows, "v2_mscoco_val2014_annotations.json", "question_id")}  # fmt: skip
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    for entry in source.each(source.json(name)["questions"], name, "question_id"):
        key = official(entry, "question_id", ByNumber)
        if key not in answers:
            raise ValueError(f"v2_mscoco_val2014_annotations.json has no answers to question {key}")
        yield {"id": str(key), "question": entry["question"], "labels": answers[key],
               "image_path": f"COCO_val2014_{official(entry, 'image_id', ByNumber):012}.jpg"}  # fmt: skip
