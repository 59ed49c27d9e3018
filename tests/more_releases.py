"""Small releases of further benchmarks, in the exact structure of their official files. Each says what a record is.

A function writes a release into a folder and returns one of its records, as it must come out.
"""

import base64
import csv
import hashlib
import io
import json
import pickle

from builders import photo

OPTIONS = ["A. red", "B. blue", "C. None", 'D. it\'s "dark"\tgreen']
TRIANGLE = [[2.0, 2.0, 12.0, 2.0, 2.0, 12.0]]
RLE = {"size": [30, 40], "counts": [65, 5, 25, 5, 1100]}  # five pixels in each of two columns


def content_of(seed, size=(40, 30), kind="JPEG"):
    """The bytes of an image file."""
    file = io.BytesIO()
    photo(*size, seed=seed).save(file, kind)
    return file.getvalue()


def in_base64(content):
    return base64.b64encode(content).decode()


def named(content, ending="jpeg"):
    return f"{hashlib.sha256(content).hexdigest()[:16]}.{ending}"


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_tsv(path, rows):
    """As pandas writes it: quotes only where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content_of(seed, kind={".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}[path.suffix]))


def hrbench(folder, name):
    """Two questions in four orders; the fourth row of each has the index of the first in place of its image."""
    rows, image = [], [content_of(seed) for seed in range(2)]
    for question in range(2):
        for cycle in range(4):
            index, texts = question * 4 + cycle, [line[3:] for line in OPTIONS]
            texts = texts[-cycle:] + texts[:-cycle] if cycle else texts
            picture = in_base64(image[question]) if cycle < 3 else str(question * 4)
            rows.append({
                "index": index, "question": "What is the color\nof the box?", "answer": "ABCD"[cycle],
                "category": ("single", "cross")[question], **dict(zip("ABCD", texts, strict=True)),
                "cycle_category": cycle, "image": picture,
            })  # fmt: skip
    write_tsv(folder / f"{name}.tsv", rows)
    lines = ['A. it\'s "dark"\tgreen', "B. red", "C. blue", "D. None"]
    question = "Question: What is the color\nof the box?\nOptions:\n" + "\n".join(lines)
    return {
        "id": "5", "question": f"{question}\nPlease select the correct answer from the options above.", "labels": "B",
        "image_path": named(image[1]), "short_question": "What is the color\nof the box?", "options": lines,
        "category": "cross", "cycle": "cycle 1",
    }  # fmt: skip


def hrbench_4k(folder):
    return hrbench(folder, "hr_bench_4k")


def hrbench_8k(folder):
    return hrbench(folder, "hr_bench_8k")


CHOICES = ["(A) 13", "(B) 90", "(C) 77", "(D) 6", "(E) The image does not feature the buses"]
MME = {
    "Question_id": "perception/monitoring/Vehicle/counting/0310",
    "Image": "monitoring_images/9999998_00382_d_0000334.jpg", "Text": "What is the number of buses in the image?",
    "Question type": "Multiple Choice", "Answer choices": CHOICES, "Ground truth": "E", "Category": "Vehicle/counting",
    "Subtask": "Monitoring", "Task": "Perception",
}  # fmt: skip
MME_RECORD = {
    "id": MME["Question_id"],
    "question": "What is the number of buses in the image? The choices are listed below:\n" + "\n".join(CHOICES)
    + "\nSelect the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "(A, B, C, D, or E) of the correct option.\nThe best answer is:",
    "labels": "E", "image_path": MME["Image"], "short_question": MME["Text"], "options": CHOICES,
    "category": "Perception", "subcategory": "Perception/Monitoring",
    "detail": "Perception/Monitoring/vehicle/counting",
}  # fmt: skip


def mme_realworld(folder):
    """Its own JSON; a category with an attribute is one of all attributes, as the official script has it."""
    other = MME | {"Question_id": "perception/monitoring/Vehicle/attribute/color/0001", "Task": "Reasoning",
                   "Category": "Vehicle/Attribute/Color", "Ground truth": "A"}  # fmt: skip
    write_json(folder / "MME_RealWorld.json", [MME, other])
    write_image(folder / "unpacked" / MME["Image"])
    return MME_RECORD


def mme_realworld_lite(folder):
    """The table for VLMEvalKit; its options are the text of a list."""
    image = content_of(3)
    row = {"index": 310, "image": in_base64(image), "question": MME["Text"], "multi-choice options": str(CHOICES),
           **dict(zip("ABCDE", (line[4:] for line in CHOICES), strict=True)), "answer": "E",
           "category": "Perception/Monitoring", "l2-category": "Vehicle/counting"}  # fmt: skip
    write_tsv(folder / "mme_realworld_lite.tsv", [row])
    return MME_RECORD | {"id": "310", "image_path": named(image)}


def infovqa(folder):
    entry = {
        "questionId": 98313, "question": "How many likes?", "image_local_name": "37313.jpeg",
        "image_url": "https://...", "ocr_output_file": "37313.json", "answers": ["3 million", "3m"],
        "answer_type": ["single span", "multi-span"], "evidence": ["text"], "operation/reasoning": [],
        "data_split": "val",
    }  # fmt: skip
    about = {"dataset_name": "infographicVQA", "dataset_version": "1.0", "dataset_split": "val"}
    write_json(folder / "infographicsVQA_val_v1.0_withQT.json", about | {"data": [entry]})
    write_image(folder / "infographicsvqa_images" / "37313.jpeg")
    return {"id": "98313", "question": "How many likes?", "labels": ["3 million", "3m"], "image_path": "37313.jpeg",
            "category": ["single span", "multi-span"], "subcategory": ["text"]}  # fmt: skip


def chartqa(folder):
    """Both official files, and a training image of the same name."""
    entry = {"imgname": "41699051005347.png", "query": "How many bars?", "label": "14"}
    for seed, split in enumerate(("human", "augmented")):
        write_json(folder / "ChartQA Dataset" / "test" / f"test_{split}.json", [entry, entry | {"label": str(seed)}])
    for seed, split in enumerate(("test", "train")):
        write_image(folder / "ChartQA Dataset" / split / "png" / entry["imgname"], seed)
    return {"id": "augmented-0", "question": "How many bars?", "labels": "14", "category": "augmented",
            "image_path": "test/png/41699051005347.png"}  # fmt: skip


def refer(folder, name, by):
    """The files of refer: a pickle of references, and COCO's instances with polygons and RLE."""
    image, file_name = 581857, "COCO_train2014_000000581857.jpg"
    sentences = [{"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": number, "sent": text}
                 for number, text in enumerate(("the lady", "woman in blue"))]  # fmt: skip
    ref = {"sent_ids": [0, 1], "file_name": "COCO_train2014_000000581857_16.jpg", "ann_id": 7, "ref_id": 0,
           "image_id": image, "split": "val", "sentences": sentences, "category_id": 1}  # fmt: skip
    crowd = {"ann_id": 8, "split": "testA", "sentences": [sentences[0] | {"sent_id": 5, "sent": "the crowd"}]}
    trained = {"split": "train", "sentences": [sentences[0] | {"sent_id": 9}]}
    instances = {
        "images": [{"id": image, "file_name": file_name, "width": 40, "height": 30}],
        "annotations": [
            {"id": 7, "image_id": image, "bbox": [2.0, 2.0, 10.5, 10.0], "segmentation": TRIANGLE, "iscrowd": 0},
            {"id": 8, "image_id": image, "bbox": [2, 5, 2, 5], "segmentation": RLE, "iscrowd": 1},
        ],
    }  # fmt: skip
    write_json(folder / name / "instances.json", instances)
    (folder / name / f"refs({by}).p").write_bytes(pickle.dumps([ref, ref | crowd, ref | trained], protocol=2))
    write_image(folder / "train2014" / file_name)
    return {"id": "val-1", "question": "where is woman in blue?", "prompt": "woman in blue", "image_path": file_name,
            "image_size": [40, 30], "gt_bbox": [2.0, 2.0, 12.5, 12.0], "category": "val",
            "segmentation": TRIANGLE}  # fmt: skip


def refcoco(folder):
    return refer(folder, "refcoco", "unc")


def refcoco_plus(folder):
    """The JSON of MDETR, without masks; another dataset lies beside it."""
    refer(folder, "refcoco", "unc")
    caption = {"id": 5, "caption": "the man left", "file_name": "COCO_train2014_000000581857.jpg", "width": 40,
               "height": 30, "original_id": 581857, "dataset_name": "refcoco+"}  # fmt: skip
    for split in ("val", "testB"):
        write_json(folder / f"finetune_refcoco+_{split}.json",
                   {"images": [caption], "annotations": [{"image_id": 5, "bbox": [1, 2, 3, 4], "id": 0}]})  # fmt: skip
    return {"id": "testB-5", "question": "where is the man left?", "prompt": "the man left", "category": "testB",
            "image_path": caption["file_name"], "image_size": [40, 30], "gt_bbox": [1, 2, 4, 6]}  # fmt: skip


def refcocog(folder):
    return refer(folder, "refcocog", "umd")


RELEASES = {each.__name__: each for each in (
    hrbench_4k, hrbench_8k, mme_realworld, mme_realworld_lite, infovqa, chartqa, refcoco, refcoco_plus, refcocog
)}  # fmt: skip
