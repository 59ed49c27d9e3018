"""Streets with signs: the second edition of the world in which the embedded models live.

    street = make_street(random.Random(7))
    street.render(scale=2).show()       # sharp at any scale
    street.mask(street.signs[0])        # exact, (h, w) bool

Houses, trees and lamps are there to be looked at; signs, cars and doors can be asked about (see tiny/questions.py).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tiny.boards import SHAPES, Thing, board_items, make_text, text_size
from tiny.canvas import COLORS, SIDES, canvas_size
from tiny.drawing import Box, Drawing, Item, apart, inside, rectangle, shaded
from tiny.scenery import Plan, car_items, door_items, ground_items, house_items, lit, poles, sky, tree_items

TRIES = 100  # to place any sign at all
CAR_ASPECT = 1.15  # of cars, seen from behind


@dataclass(frozen=True)
class Street:
    """A drawing and what can be asked about in it; the number of a thing is its owner number in the drawing."""

    drawing: Drawing
    things: Sequence[Thing]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the canvas in pixels."""
        return self.drawing.size

    @property
    def signs(self) -> list[Thing]:
        return [thing for thing in self.things if thing.is_sign]

    def render(self, window: Box | None = None, scale: float = 1.0, smooth: int = 2) -> Image.Image:
        """RGB picture of a window (see tiny.drawing.Drawing.render)."""
        return self.drawing.render(window, scale, smooth)

    def labels(self, window: Box | None = None, scale: float = 1.0) -> np.ndarray:
        """(h, w) uint8: 1 + index in `things` of what is seen at each pixel, 0: none of them."""
        return self.drawing.labels(window, scale)

    def mask(self, thing: Thing, scale: float = 1.0) -> np.ndarray:
        """(h, w) bool: where a thing is seen."""
        return self.labels(scale=scale) == 1 + self.things.index(thing)


def make_street(
    rng: random.Random,
    side: float = 640,
    count: int | None = None,
    sides: tuple[float, float] = SIDES,
    min_cap_px: float = 0,
    aspect: float | None = None,
    crowded: bool = False,
) -> Street:
    """A random street, a function of the state of `rng` alone.

    Args:
        side: sqrt of the canvas area in pixels.
        count: how many signs to try to place; 2 to 5 if None. Signs never overlap, so fewer may fit (never none).
        sides: range of sqrt(width * height) of a sign relative to `side`, sampled log-uniformly.
        min_cap_px: no character is lower than so many canvas pixels.
        aspect: width / height of the canvas; drawn from ASPECTS if None.
        crowded: let signs share colour and shape (for training the vision tower; questions need unique ones).
    Raises:
        ValueError: no sign fits.
    """
    for _ in range(TRIES):
        size = canvas_size(rng, side, aspect)
        plan = Plan.draw(rng, size)
        signs = place_signs(rng, size, side, count or rng.randint(2, 5), sides, min_cap_px, crowded)
        if signs:
            break
    else:
        raise ValueError(f"no sign of {sides[0]:g} to {sides[1]:g} of the side, with characters of {min_cap_px} px, "
                         f"fits on a canvas of {side:g} px a side")  # fmt: skip
    taken = [sign.box for sign in signs]
    cars = place_cars(rng, plan, side, signs, taken)
    stands = [pole for sign in signs for pole in poles(plan, sign.box, side)]
    doors = place_doors(rng, plan, taken + stands + [car.box for car in cars])
    things = [*doors, *cars, *signs]
    items = ground_items(rng, plan)
    for house in plan.houses:
        items += house_items(house)
    for owner, door in enumerate(doors):
        items += door_items(door, owner)
    items += tree_items(rng, plan, [door.box for door in doors])
    items += [Item("polygon", rectangle(pole), lit((128, 130, 134), plan.light)) for pole in stands]
    for owner, car in enumerate(cars, len(doors)):
        items += car_items(car, owner)
    for owner, sign in enumerate(signs, len(doors) + len(cars)):
        items += board_items(sign, owner)
    return Street(Drawing(size, sky(rng, plan), items), things)


def place_signs(
    rng: random.Random,
    size: tuple[int, int],
    side: float,
    count: int,
    sides: tuple[float, float],
    min_cap_px: float,
    crowded: bool,
) -> list[Thing]:
    """Up to `count` signs that do not overlap; unless `crowded`, no two have the same colour and the same shape."""
    looks = [(color, shape) for color in COLORS for shape in SHAPES]
    if crowded:  # with many plates, which are the hardest to read
        looks = rng.choices(looks + 2 * [look for look in looks if look[1] == "plate"], k=count)
    elif rng.random() < 0.6:  # all colours differ
        looks = [(color, rng.choice(list(SHAPES))) for color in rng.sample(list(COLORS), count)]
    else:
        looks = rng.sample(looks, count)
    signs = []
    for color, shape in looks:
        sign = place_sign(rng, size, side, color, shape, sides, min_cap_px, [sign.box for sign in signs])
        if sign:
            signs.append(sign)
    return signs


def place_sign(
    rng: random.Random,
    size: tuple[int, int],
    side: float,
    color: str,
    shape: str,
    sides: tuple[float, float],
    min_cap_px: float,
    taken: Sequence[Box],
) -> Thing | None:
    """A sign that overlaps none of the boxes that are `taken`; None if no place was found."""
    text, (low, high) = make_text(rng, shape), SHAPES[shape].aspects
    for _ in range(25):
        aspect = rng.uniform(low, high)
        long = side * math.exp(rng.uniform(math.log(sides[0]), math.log(sides[1])))
        wide, tall = long * math.sqrt(aspect), long / math.sqrt(aspect)
        grow = max(1.0, min_cap_px / text_size(shape, text, wide, tall)[1])
        wide, tall = wide * grow, tall * grow
        if wide >= 0.97 * size[0] or tall >= 0.97 * size[1]:
            continue
        x, y = rng.uniform(0, size[0] - wide), rng.uniform(0, size[1] - tall)
        box = (x, y, x + wide, y + tall)
        if all(apart(box, other, 0.01 * side) for other in taken):
            cap = text_size(shape, text, wide, tall)[1]
            return Thing(shape, color, box, shaded(rng, COLORS[color]), text, cap)
    return None


def place_cars(
    rng: random.Random, plan: Plan, side: float, signs: Sequence[Thing], taken: Sequence[Box]
) -> list[Thing]:
    """Up to two cars on the road, of different colours; where a plate hangs low, a car may be drawn around it."""
    cars, colors = [], rng.sample(list(COLORS), 2)
    plates = [sign for sign in signs if sign.shape == "plate" and sign.box[3] > plan.road]
    for color in colors[: rng.choice((0, 1, 1, 2))]:
        around = plates.pop() if plates and rng.random() < 0.7 else None
        for _ in range(8):
            if around:
                a, b, c, d = around.box
                wide = (c - a) * rng.uniform(2.1, 2.8)
                middle, bottom = (a + c) / 2, d + 0.16 * wide
            else:
                wide = side * math.exp(rng.uniform(math.log(0.07), math.log(0.3)))
                middle, bottom = rng.uniform(0, plan.size[0]), rng.uniform(plan.road + 0.02 * side, plan.size[1])
            box = (middle - wide / 2, bottom - wide / CAR_ASPECT, middle + wide / 2, bottom)
            others = [other for other in taken if not around or other != around.box]
            others += [car.box for car in cars]
            fits = inside(box, (0, 0, *plan.size)) and all(apart(box, other, 0.01 * side) for other in others)
            if fits:
                cars.append(Thing("car", color, box, shaded(rng, COLORS[color])))
                break
            around = None
    return cars


def place_doors(rng: random.Random, plan: Plan, taken: Sequence[Box]) -> list[Thing]:
    """The doors of houses that nothing covers."""
    doors = []
    for house in plan.houses:
        color = rng.choice(list(COLORS))
        box = house.door
        if box and inside(box, (0, 0, *plan.size)) and all(apart(box, other) for other in taken):
            doors.append(Thing("door", color, box, shaded(rng, COLORS[color])))
    return doors
