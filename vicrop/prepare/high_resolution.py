"""HR-Bench and MME-RealWorld: questions about large images, with options. From their official files to records.

A question is asked with its options as the benchmark publishes it; its map is made for the question without options.
"""

from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any

from vicrop.prepare.source import REFERENCE, Source, list_of

SELECT = "Please select the correct answer from the options above."
LISTED = "The choices are listed below:"
RESPOND = ("Select the best answer to the above multiple-choice question based on the image. Respond with only the "
           "letter (A, B, C, D, or E) of the correct option.\nThe best answer is:")  # fmt: skip


def hrbench_4k(source: Source) -> Iterator[dict[str, Any]]:
    """HR-Bench 4K: 200 questions, each with its options in four orders (`cycle`)."""
    return hrbench(source, "hr_bench_4k")


def hrbench_8k(source: Source) -> Iterator[dict[str, Any]]:
    """HR-Bench 8K, as `hrbench_4k`."""
    return hrbench(source, "hr_bench_8k")


def hrbench(source: Source, name: str) -> Iterator[dict[str, Any]]:
    """HR-Bench of a table: index, question, answer, category, A to D, cycle_category, and image in base64.

    The prompt is that of HR-Bench's own code (hrbench/vlmeval/dataset/image_mcq.py).
    """
    images: dict[str, str] = {}  # index -> the file of its image
    for entry in source.table(f"{name}.tsv", f"{name}*.parquet"):
        index, image = str(entry["index"]), entry["image"]
        if isinstance(image, str) and len(image) <= REFERENCE:
            if image not in images:
                raise ValueError(f"{source.at}: its image is that of row {image}, which does not come before it")
            images[index] = images[image]
        else:
            images[index] = source.unpacked(image)
        options = [f"{letter}. {entry[letter]}" for letter in ascii_uppercase if entry.get(letter) not in (None, "")]
        yield {
            "id": index, "question": "\n".join([f"Question: {entry['question']}", "Options:", *options, SELECT]),
            "labels": entry["answer"], "image_path": images[index], "short_question": entry["question"],
            "options": options, "category": entry["category"], "cycle": f"cycle {entry['cycle_category']}",
        }  # fmt: skip


def mme_realworld(source: Source) -> Iterator[dict[str, Any]]:
    """MME-RealWorld, in English: its own JSON, or the tables that were made of it for lmms-eval."""
    return mme(source, "MME_RealWorld.json", "MME-RealWorld.json", "train-*.parquet")


def mme_realworld_lite(source: Source) -> Iterator[dict[str, Any]]:
    """MME-RealWorld-Lite: its own JSON, or the table that was made of it for VLMEvalKit.

    No parquet files: those of the whole benchmark have the same names.
    """
    return mme(source, "MME-RealWorld-Lite.json", "mme_realworld_lite.tsv")


def mme(source: Source, *patterns: str) -> Iterator[dict[str, Any]]:
    """MME-RealWorld of the first of some files: task, subtask and category are those of eval_your_results.py.

    The prompt is that of its README.
    """
    for row in source.table(*patterns, field="Question_id"):
        entry = row if "Question_id" in row else as_official(row, source)
        task, subtask, kind = entry["Task"], entry["Subtask"], entry["Category"].lower()
        if "attribute" in kind:
            kind = f"{kind.split('/')[0]}/attribute"
        lines = entry["Answer choices"]
        yield {
            "id": str(entry["Question_id"]), "question": "\n".join([f"{entry['Text']} {LISTED}", *lines, RESPOND]),
            "labels": entry["Ground truth"], "image_path": entry["Image"], "short_question": entry["Text"],
            "options": lines, "category": task, "subcategory": f"{task}/{subtask}",
            "detail": f"{task}/{subtask}/{kind}",
        }  # fmt: skip


def as_official(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A row of the tables for other tools, under the official names; its image is in base64."""
    task, _, subtask = row["category"].partition("/")
    return {
        "Question_id": row["index"], "Text": row["question"], "Answer choices": list_of(row["multi-choice options"]),
        "Ground truth": row["answer"], "Image": source.unpacked(row["bytes" if "bytes" in row else "image"]),
        "Task": task, "Subtask": subtask, "Category": row["l2-category"],
    }  # fmt: skip
