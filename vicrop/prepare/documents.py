"""InfographicVQA and ChartQA: from their official files to records."""

from collections.abc import Iterator
from typing import Any

from vicrop.prepare.kinds import ByName
from vicrop.prepare.source import Source, official

INFO = "infographicsVQA_val_v1.0*.json"
# What the official script breaks scores down by; a question may be of several kinds.
KINDS_OF_INFO = {"category": "answer_type", "subcategory": "evidence", "detail": "operation/reasoning"}
CHARTS, CHART_TABLE = ("human", "augmented"), "test-*.parquet"


def infovqa(source: Source) -> Iterator[dict[str, Any]]:
    """InfographicVQA (DocVQA task 3), validation (`infographicsVQA_val_v1.0_withQT.json`)."""
    for entry in source.each(source.json(INFO)["data"], INFO, "questionId"):
        record = {"id": str(official(entry, "questionId", ByName)), "question": entry["question"],
                  "labels": entry["answers"], "image_path": entry["image_local_name"]}  # fmt: skip
        yield record | {field: entry[name] for field, name in KINDS_OF_INFO.items() if entry.get(name)}


def chartqa(source: Source) -> Iterator[dict[str, Any]]:
    """ChartQA, test: questions of people and made ones (`category`); its own JSON, or a table of lmms-lab/ChartQA."""
    if source.matching("test_human.json"):
        for category in CHARTS:
            for number, entry in enumerate(source.table(f"test_{category}.json")):
                yield {"id": f"{category}-{number}", "question": entry["query"], "labels": entry["label"],
                       "image_path": f"test/png/{entry['imgname']}", "category": category}  # fmt: skip
        return
    if not source.matching(CHART_TABLE):
        raise ValueError(f"{source.folder} must hold test_human.json and test_augmented.json, or {CHART_TABLE}")
    for number, entry in enumerate(source.table(CHART_TABLE)):
        category = entry["type"].removesuffix("_test")
        yield {"id": f"{category}-{number}", "question": entry["question"], "labels": entry["answer"],
               "image_path": source.unpacked(entry["image"]), "category": category}  # fmt: skip
