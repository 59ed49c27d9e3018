"""Records: what each of their fields must be, said once. Everything that reads a record asks here.

    record = checked({"id": "7", "question": "what?", "image_path": "a.jpg"}, Question, "record '7'")

A record stays the plain dict that it was read as, so that fields nobody here knows reach the results unchanged.
"""

import re
from collections.abc import Sequence
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from vicrop.files import in_repository, read_rows, read_text

TEXTS = ("question", "short_question", "prompt", "image_path")  # fields that are shown to a model or to a system
Kind = TypeVar("Kind")
SHOWN = 100  # characters of a wrong value, at most
LARGEST = 1e300  # of a box's numbers, so that what is computed of them is still finite
GROUNDING = "grounding.jsonl"  # beside data.json: phrases and their boxes, for localization heads
ASKED = "question_with_ocr_tokens"  # field with what is asked in place of the question, its map excepted
EDGE = 1  # pixels that a box may reach beyond its image: annotators round

# ------------------------------------------------------------------------------------------------------------- fields
# The description says what is valid; it is the middle of the sentence of an error.
Id = Annotated[Annotated[str, Meta(min_length=1)] | int, Meta(description="{} is a text or a whole number")]
Text = Annotated[str, Meta(pattern=r"\S", description="{} is a text that is not empty")]
Labels = Annotated[str | list[str] | None, Meta(description="labels are a text or a list of texts")]
Answer = Annotated[str, Meta(description="{} is a text")]
Side = Annotated[int, Meta(gt=0)] | Annotated[float, Meta(gt=0, multiple_of=1)]  # 640 or 640.0
Size = Annotated[
    Annotated[list[Side], Meta(min_length=2, max_length=2)] | None, Meta(description="{} is [width, height] in pixels")
]
Box = Annotated[list[float], Meta(min_length=4, max_length=4, description="{} is [x, y, width, height] in pixels")]
Length = Annotated[Annotated[float, Meta(gt=0)] | None, Meta(description="{} is a number of pixels")]


class Record(msgspec.Struct):
    """What all records have."""

    id: Id


class Question(Record, kw_only=True):
    """A record of a dataset: what is asked about an image. Without labels there is nothing to score it by."""

    question: Text
    image_path: Text
    short_question: Annotated[str | None, Meta(description="{} is a text that is not empty")] = None
    labels: Labels = None
    image_size: Size = None

    def __post_init__(self):
        if self.short_question and not self.short_question.strip():
            raise ValueError(f"short_question is a text that is not empty, not {self.short_question!r}")


class Result(Record):
    """A record that was answered; the rest of it is the dataset's."""

    original_answer: Answer
    crop_answer: Answer


class Query(Record):
    """What localization heads are asked about an image."""

    prompt: Text
    image_path: Text


class Truth(Record):
    """A box that is right for a phrase, and the size of its image in pixels, if that is known."""

    bbox: Box
    width: Length = None
    height: Length = None


def checked(record: Any, kind: type[Kind], name: str) -> Kind:
    """A record as one of the classes above; what they do not know of it is left out.

    Args:
        record: a dict; kind: Record, Question, ...
        name: what an error calls it, "record '7'".
    Raises:
        ValueError: naming the record, the field, what is valid and what was given.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{name} is no object but {str(record)[:60]}")
    missing = [field for field in required(kind) if record.get(field) is None or record[field] == ""]
    if missing:
        raise ValueError(f"{name} has no {', '.join(missing)}")
    for field in TEXTS:
        refuse_half_characters(record.get(field), f"{name}: {field}")
    try:
        return msgspec.convert(record, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {_in_words(error, record, kind)}") from None


def field_of(record: dict, field: str, kind: type = Question, name: str | None = None) -> Any:
    """One field of a record, where its others do not matter; a ValueError as that of `checked`."""
    value, name = record.get(field), name or name_of(record)
    refuse_half_characters(value if field in TEXTS else None, f"{name}: {field}")
    try:
        return msgspec.convert(value, hints(kind)[field])
    except msgspec.ValidationError:
        raise ValueError(f"{name}: {_what_is_valid(kind, field)}, not {shown(value)}") from None


@cache
def required(kind: type) -> list[str]:
    """The fields without which a class cannot be, by name."""
    return sorted(field.name for field in msgspec.structs.fields(kind) if field.required)


@cache
def hints(kind: type) -> dict[str, Any]:
    """{field: its annotated type} of a class."""
    return get_type_hints(kind, include_extras=True)


def _what_is_valid(kind, field):
    notes = getattr(hints(kind)[field], "__metadata__", ())
    return next(note.description for note in reversed(notes) if getattr(note, "description", None)).format(field)


def refuse_half_characters(value: Any, what: str) -> None:
    """ValueError if a text cannot be written: JSON may hold half of a character that takes two."""
    try:
        (value if isinstance(value, str) else "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {value!r} has half of a character") from error


def _in_words(error, record, kind):
    """A validation error as "question is a text that is not empty, not 3"."""
    place = re.search(r"`\$\.(\w+)", str(error))
    if place is None:  # of a kind's own check, which has said it in words
        return str(error)
    return f"{_what_is_valid(kind, place[1])}, not {shown(record[place[1]])}"


def shown(value: Any) -> str:
    """A value in an error's sentence."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def name_of(record: dict) -> str:
    """ "record '7'", in a sentence."""
    return f"record {record.get('id')!r}"


# ---------------------------------------------------------------------------------------------------------------- ids
def with_ids(
    records: Sequence, field: str = "id", numbers: Sequence[int] | None = None, unit: str = "record"
) -> tuple[list[dict], list[str]]:
    """(those with an id, [a sentence on each of the others]).

    Args:
        field: what the id is called there; numbers, unit: how a record is named, by default as record 0, 1, ...
    """
    good, said = [], []
    for number, record in zip(numbers or range(len(records)), records, strict=True):
        try:
            if isinstance(record, dict) and field not in record:
                among = f" among {', '.join(map(str, record))}" if record else ""
                raise ValueError(f"{unit} {number} has no {field!r}{among}")
            checked({"id": record[field]} if isinstance(record, dict) else record, Record, f"{unit} {number}")
        except ValueError as error:
            said.append(str(error))
        else:
            good.append(record)
    return good, said


def refuse_bad_ids(
    records: Sequence, where: Any, field: str = "id", numbers: Sequence[int] | None = None, unit: str = "record"
) -> None:
    """ValueError, naming `where` they are, unless all are objects with an id, and no id comes twice; 1 is "1".

    Args: as `with_ids`.
    """
    _, said = with_ids(records, field, numbers, unit)
    if said:
        raise ValueError(f"{where}: {said[0]}")
    seen, twice = {}, []
    for number, record in zip(numbers or range(len(records)), records, strict=True):
        key = record[field]
        if str(key) in seen:
            other, first = seen[str(key)]
            both = repr(key) if type(key) is type(other) else f"{other!r} and {key!r}"
            twice.append(f"{both} ({unit}s {first} and {number})")
        seen.setdefault(str(key), (key, number))
    if twice:
        more = f" and {len(twice) - 10} more" if len(twice) > 10 else ""
        raise ValueError(f"{where}: ids must differ, and each of these comes twice: {', '.join(twice[:10])}{more}")


# -------------------------------------------------------------------------------------------------------------- boxes
def refuse_misplaced(box: Sequence[float], image_size: Sequence[float] | None, what: str) -> None:
    """ValueError unless a box (xyxy) can be one in pixels of its image.

    Args:
        image_size: (width, height); None if it is not known: then only a box without a pixel is refused.
        what: the beginning of the sentence: "record '7': gt_bbox [5, 5, 900, 9] (x1, y1, x2, y2)".
    """
    x1, y1, x2, y2 = box
    if min(x2 - x1, y2 - y1) < 1:
        raise ValueError(f"{what} has a side under one pixel: boxes are in pixels, not in shares of the image")
    if image_size is None:
        return
    width, height = image_size
    if min(x1, y1) < -EDGE or x2 > width + EDGE or y2 > height + EDGE:
        raise ValueError(f"{what} reaches beyond its image of {width:g} x {height:g} pixels: is it in another form, "
                         "or on another scale?")  # fmt: skip


def box_of(
    record: dict, field: str = "gt_bbox", image_size: Sequence[float] | None = None
) -> tuple[float, float, float, float]:
    """A record's field as a box of four floats, xyxy pixels.

    Args:
        image_size: of the image that it is about; by default the record's own, if it has one.
    Raises:
        ValueError: naming the record: no box, or one that cannot lie in its image.
    """
    size = image_size or field_of(record, "image_size")
    box, name = numbers_of(record[field], 4), f"{name_of(record)}: {field}"
    if box is None or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"{name} is [x1, y1, x2, y2] in pixels, not {shown(record[field])}")
    refuse_misplaced(box, size, f"{name} {shown(record[field])} (x1, y1, x2, y2)")
    x1, y1, x2, y2 = box
    return x1, y1, x2, y2


def box_of_truth(record: dict, name: str) -> tuple[tuple[float, ...], tuple[float, float] | None]:
    """((x1, y1, x2, y2), (width, height) or None) of a record with a box [x, y, width, height] (see Truth).

    Raises:
        ValueError: beginning with `name`: no box, or one that cannot lie in its image.
    """
    box = tuple(box_xywh_to_xyxy(record.get("bbox"), f"{name}: a box"))
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"{name}: {_what_is_valid(Truth, 'bbox')}, not {shown(record['bbox'])}")
    size = tuple(field_of(record, side, Truth, name) for side in ("width", "height"))
    size = None if None in size else size
    refuse_misplaced(box, size, f"{name}: bbox {shown(record['bbox'])} (x, y, width, height)")
    return box, size


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes, xyxy; 0 if either has no area."""
    areas = [max(0, box[2] - box[0]) * max(0, box[3] - box[1]) for box in (one, other)]
    if not all(areas):
        return 0.0
    sides = [min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1)]
    both = max(0, sides[0]) * max(0, sides[1])
    return both / (sum(areas) - both)


def numbers_of(values: Any, count: int) -> tuple[float, ...] | None:
    """So many finite numbers as a tuple of floats, or None."""
    values = list(values) if isinstance(values, list | tuple) or hasattr(values, "tolist") else []
    good = len(values) == count and all(isinstance(each, Real) and not isinstance(each, bool) for each in values)
    found = tuple(map(float, values)) if good else ()
    return found if found and max(map(abs, found)) < LARGEST else None


def box_xywh_to_xyxy(box: Any, what: str = "a box") -> list[float]:
    """[x, y, width, height] -> [x1, y1, x2, y2], pixels; a ValueError, beginning with `what`, shows what is no box."""
    if numbers_of(box, 4) is None:
        raise ValueError(f"{what} is [x, y, width, height] in pixels, not {shown(box)}")
    x, y, width, height = box
    return [x, y, x + width, y + height]


def refuse_other_size(record: dict, image_size: Sequence[int]) -> None:
    """ValueError, naming both, if a record says that its image has another size than it has, as a person sees it."""
    said = field_of(record, "image_size")
    if said is not None and tuple(said) != tuple(image_size):
        width, height = image_size
        turned = " (a camera's orientation tag turns it)" if tuple(said) == (height, width) else ""
        raise ValueError(f"{name_of(record)}: image_size {said} is not that of its image, which is "
                         f"[{width}, {height}] as it is seen{turned}")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- tasks
def load_task(question_path: str | Path) -> list[dict]:
    """The records of a dataset: a JSON list, or JSON lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a list of objects, or an id that is missing or given twice.
    """
    path = in_repository(question_path)
    if not path.is_file():
        raise FileNotFoundError(f"no questions at {question_path}: see data/README.md for how to get or make them")
    records = read_rows(path)
    refuse_bad_ids(records, question_path)
    return records


def pick(records: list[dict], ids_path: str | Path | None = None, limit: int | None = None) -> list[dict]:
    """The records that a run is about: those whose ids a file lists (a JSON list, or one a line), at most `limit`.

    Raises:
        FileNotFoundError, ValueError: no such file; it names ids that the dataset does not have.
    """
    if ids_path is not None:
        text = read_text(ids_path)
        listed = read_rows(Path(ids_path)) if text.lstrip().startswith("[") else map(str.strip, text.split("\n"))
        listed = set(map(str, listed)) - {""}
        unknown = sorted(listed - {str(record["id"]) for record in records})
        if unknown:
            named = ", ".join(unknown[:10])
            raise ValueError(f"{ids_path} names {len(unknown)} ids that are not in the dataset: {named}")
        records = [record for record in records if str(record["id"]) in listed]
    if not records:
        raise ValueError(f"there are no records to ask about: {ids_path or 'the dataset'} is empty")
    return records[:limit]


def check_record(record: dict, image_folder: str | Path) -> Path:
    """The path of a record's image.

    Raises:
        ValueError: a field that is missing or not what it must be, or an image outside of the folder.
    """
    checked(record, Question, name_of(record))
    return image_of(record, image_folder)


def image_of(record: dict, image_folder: str | Path) -> Path:
    """The path of a record's image, whatever its other fields are; ValueError if it lies outside of the folder."""
    name, folder = name_of(record), Path(image_folder).resolve()
    image_path = field_of(record, "image_path")
    path = (folder / image_path).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"{name}: image_path {image_path!r} leaves the image folder")
    return path
