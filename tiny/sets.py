"""Datasets of the street world: questions of all kinds and sizes, and phrases with boxes and masks.

    python -m tiny.sets --seed 7 --per_kind 500 --out DIR                       # a fresh test set
    python -m tiny.sets --seed 7 --per_kind 60 --large 30 --huge 30 --out DIR   # with large pictures

They are DIR/data.json and DIR/images/. Each record has `category` (the kind of question), `size` (class of the smallest
thing that it is about; "absent" where that is not there), `gt_bboxes` (where those things are) and `gt_bbox` (the box
around all of them; the whole image where a thing is absent, since all of it has to be seen). DIR/grounding.jsonl has
phrases for things that have a name of their own, with box and mask.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny.dataset_folder import begin_folder, finish_folder
from tiny.drawing import Box, outline
from tiny.questions import ABSENT, KINDS, Question, names_of, questions_about, size_of
from tiny.street import Street, make_street
from vicrop.localization.coco_masks import mask_codec
from vicrop.tables import SIZES

MIN_CAP_PX = 12  # characters lower than that are hard to read even for a person who zooms in
PER_PICTURE = 5  # questions about one picture, at most
PHRASES = 3  # phrases about one picture in grounding.jsonl, at most
# Ranges of the signs' size that pictures are drawn with, so that no size class is rare; see tiny.street.make_street.
RANGES = ((0.035, 0.45), (0.035, 0.12), (0.22, 0.42))


@dataclass(frozen=True)
class Canvas:
    """Pictures of some size.

    Attributes:
        sides: range of sqrt(width * height) in pixels. ranges: of the signs' sides, relative to that.
        quality: of the JPEG.
    """

    sides: tuple[float, float]
    ranges: Sequence[tuple[float, float]] = RANGES
    quality: int = 92


USUAL, LARGE = Canvas((450, 760)), Canvas((1250, 1700), quality=85)  # 760 is 1013 at most, along the longer side
HUGE = Canvas((4096, 4096), ((0.008, 0.02), (0.03, 0.2), (0.23, 0.4)), 60)


@dataclass
class Writer:
    """A dataset that is being made; `open` counts the questions still wanted of each (kind, size)."""

    out: Path
    seed: int
    open: Counter = field(default_factory=Counter)
    records: list[dict] = field(default_factory=list)
    phrases: list[dict] = field(default_factory=list)
    pictures: int = 0

    def choose(self, street: Street, rng: random.Random, most: int) -> list[tuple[Question, str]]:
        """Some of the questions about a street that are still wanted, those of which most are wanted first."""
        chosen, left = [], Counter(self.open)
        asked = [(question, size_of(question, street)) for question in questions_about(street, rng)]
        rng.shuffle(asked)
        for question, size in sorted(asked, key=lambda each: -left[each[0].kind, each[1]]):
            said = [other.text for other, _ in chosen]
            if left[question.kind, size] > 0 and len(chosen) < most and question.text not in said:
                left[question.kind, size] -= 1
                chosen.append((question, size))
        self.open = left
        return chosen

    def add(self, street: Street, chosen: Sequence[tuple[Question, str]], rng: random.Random, quality: int) -> None:
        """Write the picture and what is asked about it."""
        name = f"street_{self.pictures:05d}.jpg"
        street.render().save(self.out / "images" / name, quality=quality, optimize=True)
        for number, (question, size) in enumerate(chosen):
            boxes = [list(clipped(thing.box, street.size)) for thing in question.targets]
            self.records.append({
                "id": f"{self.seed}-{self.pictures:05d}-{number}",
                "question": question.text,
                "labels": [question.answer],
                "image_path": name,
                "image_size": list(street.size),
                "category": question.kind,
                "size": size,
                "gt_bbox": around(boxes) or [0, 0, *street.size],
                "gt_bboxes": boxes,
            })  # fmt: skip
        self.phrases += grounding(street, f"{self.seed}-{self.pictures:05d}", f"images/{name}", rng)
        self.pictures += 1


def clipped(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in whole pixels, inside the picture."""
    x1, y1, x2, y2 = outline(box)
    return max(0, x1), max(0, y1), min(size[0], x2), min(size[1], y2)


def around(boxes: Sequence[Sequence[int]]) -> list[int]:
    """The box around boxes; empty without any."""
    if not boxes:
        return []
    corners = np.array(boxes)
    return [*corners[:, :2].min(0).tolist(), *corners[:, 2:].max(0).tolist()]


def grounding(street: Street, name: str, image_path: str, rng: random.Random) -> list[dict]:
    """Phrases about things that have a name of their own, with box ([x, y, width, height]) and mask (RLE of COCO)."""
    things, codec = list(street.things), mask_codec()
    found = [(thing, names) for thing in things if (names := names_of(thing, things))]
    labels, lines = street.labels(), []
    for thing, names in rng.sample(found, min(PHRASES, len(found))):
        mask = labels == 1 + things.index(thing)
        if not mask.any():
            continue
        rle = codec.encode(np.asfortranarray(mask.astype(np.uint8)))
        x1, y1, x2, y2 = clipped(thing.box, street.size)
        lines.append({
            "id": f"{name}-{things.index(thing)}", "prompt": f"the {rng.choice(names)}", "image_path": image_path,
            "bbox": [x1, y1, x2 - x1, y2 - y1], "width": street.size[0], "height": street.size[1],
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        })  # fmt: skip
    return lines


def wanted(kinds: Sequence[str], number: int) -> Counter:
    """{(kind, size): questions}: `number` of each kind, evenly over the sizes; half of the presence ones are absent."""
    found = Counter()
    for kind in kinds:
        absent = number // 2 if kind == "presence" else 0
        found[kind, ABSENT] = absent
        for place, size in enumerate(SIZES):
            found[kind, size] = (number - absent + place) // len(SIZES)
    return +found


def fill(writer: Writer, rng: random.Random, canvas: Canvas, total: int, most: int) -> None:
    """Draw streets of one kind of canvas until `total` of the open questions are asked."""
    with tqdm(total=total, unit="question", desc=f"{writer.out} {canvas.sides[1]:.0f} px") as bar:
        while total > 0:
            low, high = rng.choice(canvas.ranges)
            count = rng.randint(2, 3) if low > 0.1 else None
            street = make_street(rng, rng.uniform(*canvas.sides), count, (low, high), MIN_CAP_PX)
            chosen = writer.choose(street, rng, min(most, total))
            if chosen:
                writer.add(street, chosen, rng, canvas.quality)
                total -= len(chosen)
                bar.update(len(chosen))


def write_set(
    out: Path | str,
    seed: int,
    per_kind: int,
    kinds: Sequence[str] = tuple(KINDS),
    large: int = 0,
    huge: int = 0,
    overwrite: bool = False,
) -> list[dict]:
    """Write `out`/data.json, `out`/images and `out`/grounding.jsonl; a function of its arguments alone.

    Args:
        per_kind: questions of each kind, at least one for each size class.
        large, huge: so many of all of them are about pictures with sqrt(width * height) of 1250 to 1700 px, and of
            4096 px.
        overwrite: replace a set that is there.
    Raises:
        FileExistsError: there is one. ValueError: an argument is out of its range.
        NoReader: pycocotools is missing.
    """
    mask_codec()
    out, rng = Path(out), random.Random(f"streets {seed}")
    if per_kind < len(SIZES):
        raise ValueError(f"--per_kind must be at least {len(SIZES)}, one question of each size; got {per_kind}")
    writer = Writer(out, seed, wanted(kinds, per_kind))
    total = writer.open.total()
    if min(large, huge) < 0 or large + huge > total:
        raise ValueError(f"--large and --huge must be at least 0, and together at most {total}, the number of all "
                         f"questions; got {large} and {huge}")  # fmt: skip
    begin_folder(out, "street_*.jpg", overwrite)
    fill(writer, rng, HUGE, huge, PER_PICTURE - 2)
    fill(writer, rng, LARGE, large, PER_PICTURE)
    fill(writer, rng, USUAL, sum(writer.open.values()), PER_PICTURE)
    # The usual pictures come first: a look at the first few questions should not begin with the largest files.
    phrases = sorted(writer.phrases, key=lambda line: line["width"] * line["height"] > USUAL.sides[1] ** 2)
    records = sorted(writer.records, key=lambda record: math.prod(record["image_size"]) > USUAL.sides[1] ** 2)
    finish_folder(out, records, phrases)
    return records


def kinds_of(text: str) -> list[str]:
    """The kinds of questions that an option names, with commas.

    Raises:
        argparse.ArgumentTypeError: one is none of KINDS.
    """
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{','.join(unknown)}: choose from {', '.join(KINDS)}")
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2026, help="any seed is disjoint from the training scenes")
    parser.add_argument("--per_kind", type=int, default=60, help="questions of each kind")
    parser.add_argument("--kinds", type=kinds_of, default=tuple(KINDS), help="which kinds, with commas")
    parser.add_argument("--large", type=int, default=0, help="how many are about pictures of 1250 to 1700 px a side")
    parser.add_argument("--huge", type=int, default=0, help="how many are about pictures of 4096 px a side")
    parser.add_argument("--out", required=True, help="folder to write data.json, grounding.jsonl and images/ into")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that is there")
    args = parser.parse_args()
    try:
        records = write_set(
            args.out, args.seed, args.per_kind, args.kinds, args.large, args.huge, overwrite=args.overwrite
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(records)} questions about {len({r['image_path'] for r in records})} images in {args.out}")


if __name__ == "__main__":
    main()
