"""Questions about a scene, of the kinds that benchmarks have, each with the things that it is about.

    for question in questions_about(make_street(rng), rng):
        question.kind, question.text, question.answer, question.targets

A thing is named by what it alone has in the scene ("the red sign", "the triangle", "the red triangle"), so no question
is ambiguous; a shape is always that of a sign. Scenes of the first edition (tiny.scenes) can be asked about, too.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tiny.boards import SHAPES, Thing
from tiny.canvas import COLORS
from tiny.scenes import NUMBER_QUESTIONS, PRESENCE_QUESTIONS, Scene
from tiny.street import Street
from vicrop.tables import size_class

ABSENT = "absent"  # in place of the size class of what is not there
OBJECTS = ("car", "door")  # things that are no signs
READING = ("what does the {} say?", "what is on the {}?")
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}  # axis, direction
ASKED_SHAPES = (*SHAPES, *OBJECTS)
LIKE_SCENERY = ("square", "circle", "triangle")  # windows, trees and roofs look like these: they are not counted
ONES = 0.3  # share of the groups of one thing that are asked to be counted


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: one of KINDS.
        targets: what has to be seen to answer it; empty where nothing is there to be seen (an absent thing).
        names: what the text calls them, one after the other; empty where it does not name each of them.
    """

    kind: str
    text: str
    answer: str
    targets: tuple[Thing, ...] = ()
    names: tuple[str, ...] = ()

    def mentions(self) -> list[tuple[int, Thing]]:
        """[(place in the text where its name ends, thing)]; of "the red and the blue sign" the first ends at "red"."""
        found, end = [], 0
        for name, thing in zip(self.names, self.targets, strict=False):
            said = name if name in self.text[end:] else name.removesuffix(" sign")
            end = self.text.index(said, end) + len(said)
            found.append((end, thing))
        return found


def things_of(scene: Street | Scene) -> list[Thing]:
    """What can be asked about; a sign of the first edition counts as a square."""
    if isinstance(scene, Street):
        return list(scene.things)
    return [
        Thing("square", sign.color, sign.box, sign.paint, sign.digit, 0.66 * (sign.box[3] - sign.box[1]))
        for sign in scene.signs
    ]


def names_of(thing: Thing, things: Sequence[Thing]) -> list[str]:
    """How a thing can be called so that nothing else in the scene is meant."""
    alone = lambda same: sum(map(same, things)) == 1  # noqa: E731
    names = []
    if thing.is_sign and alone(lambda other: other.is_sign and other.color == thing.color):
        names.append(f"{thing.color} sign")
    if alone(lambda other: other.shape == thing.shape):
        names.append(thing.shape)
    if alone(lambda other: (other.shape, other.color) == (thing.shape, thing.color)):
        names.append(f"{thing.color} {thing.shape}")
    return names


@dataclass(frozen=True)
class Named:
    """A thing and a name that only it has."""

    thing: Thing
    name: str


def named(things: Sequence[Thing], rng: random.Random, only: Callable[[Thing], bool] = lambda _: True) -> list[Named]:
    """Those of the things that have a name of their own, each with one of its names, in random order."""
    found = [Named(thing, rng.choice(names)) for thing in things if only(thing) and (names := names_of(thing, things))]
    rng.shuffle(found)
    return found


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def both(first: str, second: str) -> str:
    """ "the red and the blue sign", "the triangle and the blue sign"."""
    if first.endswith(" sign") and second.endswith(" sign"):
        first = first.removesuffix(" sign")
    return f"the {first} and the {second}"


# ------------------------------------------------------------------------------------------------------- the kinds
def reading(things: Sequence[Thing], rng: random.Random) -> Iterator[Question]:
    """What is written on each sign that has a name."""
    for each in named(things, rng, lambda thing: thing.is_sign):
        color = each.name.removesuffix(" sign")
        ways = [way.format(each.name) for way in READING]
        if each.name.endswith(" sign") and each.thing.text.isdigit():
            most = 3 if len(each.thing.text) == 1 else 1  # "which digit" is asked of a single one
            ways += [way.format(color=color) for way in NUMBER_QUESTIONS[:most]]
        yield Question("reading", rng.choice(ways), each.thing.text, (each.thing,), (each.name,))


def attribute(things: Sequence[Thing], rng: random.Random) -> Iterator[Question]:
    """The colour of things named by their shape, the shape of signs named by their colour."""
    for thing in rng.sample(things, len(things)):
        names = names_of(thing, things)
        ways = []
        if thing.shape in names:
            ways.append((thing.shape, f"what colour is the {thing.shape}?", thing.color))
        if f"{thing.color} sign" in names:
            ways.append((f"{thing.color} sign", f"what shape is the {thing.color} sign?", thing.shape))
        if ways:
            name, text, answer = rng.choice(ways)
            yield Question("attribute", text, answer, (thing,), (name,))


def presence(things: Sequence[Thing], rng: random.Random) -> Iterator[Question]:
    """Things that are there, and for each of them one that is not, of another colour.

    All are asked about with a colour and a noun: of the words alone nobody can tell what is there, and no roof or
    window is taken for the triangle or the square that is asked about.
    """
    ask = lambda name: rng.choice((f"is there {a(name)} in the image?", f"does the image show {a(name)}?"))  # noqa: E731
    looks = {(thing.color, noun) for thing in things for noun in nouns_of(thing)}
    for thing in rng.sample(things, len(things)):
        names = [(noun, f"{thing.color} {noun}") for noun in nouns_of(thing)]
        names = [(noun, name) for noun, name in names if name in names_of(thing, things)]
        if not names:
            continue
        noun, name = rng.choice(names)
        absent = [color for color in COLORS if (color, noun) not in looks]
        if absent:
            yield Question("presence", ask(name), "yes", (thing,), (name,))
            yield Question("presence", ask(f"{rng.choice(absent)} {noun}"), "no")


def nouns_of(thing: Thing) -> list[str]:
    """What a thing can be called beside its colour."""
    return ["sign", thing.shape] if thing.is_sign else [thing.shape]


def count(things: Sequence[Thing], rng: random.Random) -> Iterator[Question]:
    """Groups of signs and things, a group of each number."""
    signs = [thing for thing in things if thing.is_sign]
    groups = {"signs": signs}
    for color in sorted({sign.color for sign in signs}):
        groups[f"{color} signs"] = [sign for sign in signs if sign.color == color]
    for shape in sorted({thing.shape for thing in things} - set(LIKE_SCENERY)):
        groups[f"{shape}s"] = [thing for thing in things if thing.shape == shape]
    groups = {name: group for name, group in groups.items() if len(group) <= 9}
    # Groups of one are by far the most frequent: take each number as often as the scene allows, and one more rarely.
    by_number = {}
    for name, group in groups.items():
        by_number.setdefault(len(group), []).append(name)
    for number in rng.sample(sorted(by_number), len(by_number)):
        if number > 1 or rng.random() < ONES:
            name = rng.choice(by_number[number])
            yield Question("count", f"how many {name} are there?", str(number), tuple(groups[name]))


def relation(
    things: Sequence[Thing], rng: random.Random, words: Sequence[str] = tuple(RELATIONS)
) -> Iterator[Question]:
    """Asked where one thing lies wholly on one side of the other, so that there is no doubt; in some of the words.

    Heights are compared of signs only: cars and doors stand on the ground, so that most answers could be guessed.
    """
    found = named(things, rng)
    for one, other in zip(found, found[1:], strict=False):
        level = [word for word in words if RELATIONS[word][0] == 0]
        fair = words if one.thing.is_sign and other.thing.is_sign else level
        for side in rng.sample(fair, min(2, len(fair))):
            axis, direction = RELATIONS[side]
            first, second = (one, other) if direction == 1 else (other, one)
            before = first.thing.box[axis + 2] <= second.thing.box[axis]
            if before or second.thing.box[axis + 2] <= first.thing.box[axis]:
                text = f"is the {one.name} {side} the {other.name}?"
                answer = "yes" if before else "no"
                yield Question("relation", text, answer, (one.thing, other.thing), (one.name, other.name))
                break


def two_places(things: Sequence[Thing], rng: random.Random) -> Iterator[Question]:
    """What is written on two signs."""
    found = named(things, rng, lambda thing: thing.is_sign)
    for one, other in zip(found, found[1:], strict=False):
        text = f"what is on {both(one.name, other.name)}?"
        answer = f"{one.thing.text} {other.thing.text}"
        yield Question("two_places", text, answer, (one.thing, other.thing), (one.name, other.name))


def comparison(things: Sequence[Thing], rng: random.Random) -> Iterator[Question]:
    """Which of two signs has the larger number; both have different ones."""
    ours = [thing for thing in things if f"{thing.color} sign" in names_of(thing, things) and thing.text.isdigit()]
    rng.shuffle(ours)
    for one, other in zip(ours, ours[1:], strict=False):
        if int(one.text) != int(other.text):
            text = f"which number is larger, on the {one.color} or the {other.color} sign?"
            larger = max(one, other, key=lambda thing: int(thing.text))
            yield Question("comparison", text, larger.color, (one, other), (one.color, other.color))


KINDS = {
    "reading": reading, "attribute": attribute, "presence": presence, "count": count, "relation": relation,
    "two_places": two_places, "comparison": comparison,
}  # fmt: skip


def questions_about(
    scene: Street | Scene, rng: random.Random, relations: Sequence[str] = tuple(RELATIONS)
) -> list[Question]:
    """Everything that is asked about a scene, kind by kind, in an order and with names that `rng` draws.

    Args:
        relations: of RELATIONS, those that are asked about.
    """
    things, ways = things_of(scene), KINDS | {"relation": partial(relation, words=tuple(relations))}
    found = [question for way in ways.values() for question in way(things, rng)]
    if isinstance(scene, Scene):  # the first edition asked in these words; all of its signs are squares
        found = [question for question in found if question.answer != "square"]
        present = {sign.color for sign in scene.signs}
        for color in (rng.choice(sorted(present)), rng.choice(sorted(set(COLORS) - present) or [None])):
            if color:
                targets = tuple(thing for thing in things if thing.color == color)
                text = rng.choice(PRESENCE_QUESTIONS).format(color=color)
                found.append(Question("presence", text, "yes" if targets else "no", targets))
    return found


def size_of(question: Question, scene: Street | Scene) -> str:
    """Size class of the smallest thing that a question is about; ABSENT where that is not there."""
    if not question.targets:
        return ABSENT
    areas = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in question.targets]
    return size_class(min(areas) / (scene.size[0] * scene.size[1]))


def describe(scene: Street | Scene) -> str:
    """The answer to the general prompt: every sign in reading order, as in `red A7, blue 3`."""
    signs = sorted((t for t in things_of(scene) if t.is_sign), key=lambda thing: (thing.box[1], thing.box[0]))
    return ", ".join(f"{sign.color} {sign.text}" for sign in signs)


def vocabulary() -> list[str]:
    """Texts in which every word of the questions and answers occurs."""
    names = [f"{color} {thing}" for color in COLORS for thing in ("sign", *ASKED_SHAPES)]
    texts = [f"is there {a(name)} in the image? {name}s" for name in names]
    texts += [way.format(name) for way in READING for name in names]
    texts += [q.format(color=color) for q in NUMBER_QUESTIONS + PRESENCE_QUESTIONS for color in COLORS]
    texts += [f"does the image show {a(name)}? how many {name}s are there?" for name in names]
    texts += [f"is the {name} {words} the {name}?" for name in names for words in RELATIONS]
    texts += [f"what colour is the {s}? what shape is the {c} sign? {s} {s}s" for c in COLORS for s in ASKED_SHAPES]
    texts += [f"which number is larger, on the {c} or the {c} sign? the {c} and the {c} sign {c}, {c}" for c in COLORS]
    return [*texts, " which yes no"]
