"""What a street is made of besides its signs: sky, ground, houses, trees, lamps, cars. Muted: signs shall stand out."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tiny.boards import Thing
from tiny.drawing import Box, Item, Paint, apart, inside, rectangle

# (top of the sky, bottom of the sky, light on everything else)
SKIES = (
    ((118, 165, 214), (206, 222, 232), 1.0),  # noon
    ((150, 170, 190), (198, 204, 208), 0.92),  # clouds
    ((112, 128, 176), (236, 196, 164), 0.88),  # evening
    ((176, 196, 216), (240, 226, 206), 0.98),  # morning
    ((34, 40, 66), (84, 84, 112), 0.5),  # night
)
FRONTS = (
    (201, 186, 166), (176, 138, 120), (208, 204, 196), (158, 166, 172), (188, 188, 166), (140, 132, 132),
    (214, 200, 178), (166, 152, 142), (182, 172, 186), (150, 160, 150),
)  # fmt: skip
ROOFS = ((96, 78, 74), (82, 86, 94), (118, 94, 84), (70, 70, 76), (104, 106, 100))
LEAVES = ((84, 112, 78), (98, 120, 84), (74, 100, 82), (116, 122, 82))


@dataclass(frozen=True)
class House:
    """A front and what is on it, canvas pixels."""

    front: Box
    roof: str  # "gable" or "flat"
    paint: Paint
    roof_paint: Paint
    glass: Paint
    floors: int
    columns: int
    door: Box | None


@dataclass(frozen=True)
class Plan:
    """Where things stand: y of the house line (`base`) and of the road's upper edge, the houses, the light."""

    size: tuple[int, int]
    base: float
    road: float
    houses: list[House]
    sky: tuple[Paint, Paint]
    light: float

    @classmethod
    def draw(cls, rng: random.Random, size: tuple[int, int]) -> "Plan":
        width, height = size
        base = height * rng.uniform(0.52, 0.74)
        road = base + (height - base) * rng.uniform(0.15, 0.4)
        top, bottom, light = rng.choice(SKIES)
        jitter = lambda paint: tuple(int(min(255, max(0, c + rng.uniform(-14, 14)))) for c in paint)  # noqa: E731
        houses, x = [], rng.uniform(-0.15, 0.1) * width
        while x < width:
            wide = rng.uniform(0.16, 0.36) * (width * height) ** 0.5
            if rng.random() < 0.8:
                houses.append(make_house(rng, x, wide, base, height, light))
            x += wide * (1.0 if rng.random() < 0.6 else rng.uniform(1.05, 1.5))
        return cls(size, base, road, houses, (jitter(top), jitter(bottom)), light * rng.uniform(0.92, 1.05))


def lit(paint: Paint, light: float) -> Paint:
    return tuple(int(min(255, light * channel)) for channel in paint)


def make_house(rng: random.Random, x: float, wide: float, base: float, height: float, light: float) -> House:
    floors = rng.randint(1, 3)
    storey = min(wide * rng.uniform(0.34, 0.5), 0.8 * base / floors)
    front = (x, base - floors * storey, x + wide, base)
    columns = rng.randint(2, 4)
    glass = (236, 212, 140) if light < 0.7 and rng.random() < 0.6 else lit((126, 146, 164), light)
    door = None
    if rng.random() < 0.75:
        middle, half = x + wide * (rng.randrange(columns) + 0.5) / columns, 0.3 * wide / columns
        door = (middle - half, base - 0.72 * storey, middle + half, base)
    return House(
        front, rng.choice(("gable", "flat")), lit(rng.choice(FRONTS), light * rng.uniform(0.9, 1.06)),
        lit(rng.choice(ROOFS), light), glass, floors, columns, door,
    )  # fmt: skip


def sky(rng: random.Random, plan: Plan) -> Image.Image:
    """A column of colours for the whole canvas; below `base` it is covered by the ground."""
    rows = 32
    top, bottom = (np.array(paint, dtype=float) for paint in plan.sky)
    share = np.clip(np.linspace(0, 1, rows) * plan.size[1] / plan.base, 0, 1)[:, None]
    return Image.fromarray((top + (bottom - top) * share).astype(np.uint8)[:, None].repeat(2, 1))


def ground_items(rng: random.Random, plan: Plan) -> list[Item]:
    """Clouds or stars, hills behind the houses, pavement, kerb, road and its dashes."""
    (width, height), base, road, light = plan.size, plan.base, plan.road, plan.light
    items = []
    white = tuple(int(0.5 * c + 0.5 * 250 * min(1, light + 0.1)) for c in plan.sky[1])
    for _ in range(rng.randint(0, 3)):
        x, y, reach = rng.uniform(0, width), rng.uniform(0.03, 0.4) * base, rng.uniform(0.04, 0.1) * width
        for shift, size in ((-0.9, 0.6), (0, 1), (0.9, 0.65)):
            at = x + shift * reach
            corners = [(at - size * reach, y - 0.45 * size * reach), (at + size * reach, y + 0.4 * size * reach)]
            items.append(Item("ellipse", corners, white))
    for _ in range(rng.randint(0, 2)):
        x, reach = rng.uniform(0, width), rng.uniform(0.2, 0.5) * width
        hill = tuple(int(0.6 * c + 0.4 * g) for c, g in zip(plan.sky[1], lit((96, 116, 100), light), strict=True))
        items.append(Item("ellipse", [(x - reach, base - 0.3 * reach), (x + reach, base + 0.4 * reach)], hill))
    pavement, asphalt = lit((172, 168, 162), light * rng.uniform(0.85, 1.02)), lit((92, 94, 100), light)
    items.append(Item("polygon", rectangle((0, base, width, height)), pavement))
    items.append(Item("polygon", rectangle((0, road, width, height)), asphalt))
    kerb = 0.02 * (height - base)
    items.append(Item("polygon", rectangle((0, road - kerb, width, road + kerb)), lit((200, 198, 192), light)))
    middle, dash = (road + height) / 2, rng.uniform(0.06, 0.12) * width
    x = rng.uniform(-dash, 0)
    while x < width:
        half = 0.012 * (height - road)
        items.append(
            Item("polygon", rectangle((x, middle - half, x + 0.55 * dash, middle + half)), lit((206, 204, 190), light))
        )
        x += dash
    return items


def house_items(house: House) -> list[Item]:
    """Front, roof and windows; the door comes apart, since it can be asked about."""
    x1, y1, x2, y2 = house.front
    wide, storey = x2 - x1, (y2 - y1) / house.floors
    items = [Item("polygon", rectangle(house.front), house.paint)]
    if house.roof == "gable":
        peak = y1 - 0.32 * wide
        eaves = 0.05 * wide
        items.append(Item("polygon", [(x1 - eaves, y1), ((x1 + x2) / 2, peak), (x2 + eaves, y1)], house.roof_paint))
    else:
        items.append(Item("polygon", rectangle((x1, y1 - 0.06 * wide, x2, y1 + 0.01 * wide)), house.roof_paint))
    frame = tuple(min(255, channel + 28) for channel in house.paint)
    for floor in range(house.floors):
        for column in range(house.columns):
            x, half = x1 + wide * (column + 0.5) / house.columns, 0.26 * wide / house.columns
            top = y1 + storey * (floor + 0.24)
            pane = (x - half, top, x + half, top + 0.46 * storey)
            at_door = house.door and floor == house.floors - 1 and house.door[0] < x < house.door[2]
            if not at_door:
                edge = 0.14 * half
                border = (pane[0] - edge, pane[1] - edge, pane[2] + edge, pane[3] + edge)
                items.append(Item("polygon", rectangle(border), frame))
                items.append(Item("polygon", rectangle(pane), house.glass))
    return items


def door_items(door: Thing, owner: int) -> list[Item]:
    x1, y1, x2, y2 = door.box
    wide, dark = x2 - x1, tuple(int(0.78 * channel) for channel in door.paint)
    panel = (x1 + 0.2 * wide, y1 + 0.16 * wide, x2 - 0.2 * wide, y1 + 0.7 * wide)
    x, y, radius = x2 - 0.2 * wide, (y1 + y2) / 2 + 0.05 * (y2 - y1), 0.06 * wide  # of the knob
    return [
        Item("polygon", rectangle(door.box), door.paint, owner=owner),
        Item("polygon", rectangle(panel), dark, owner=owner),
        Item("ellipse", [(x - radius, y - radius), (x + radius, y + radius)], (222, 214, 190), owner=owner),
    ]


def tree_items(rng: random.Random, plan: Plan, clear: Sequence[Box]) -> list[Item]:
    """Trees and street lamps on the pavement; none in front of what shall be kept clear."""
    (width, _), base, unit = plan.size, plan.base, (plan.size[0] * plan.size[1]) ** 0.5
    items = []
    for _ in range(rng.randint(0, 3)):
        x, tall = rng.uniform(0, width), rng.uniform(0.12, 0.3) * unit
        foot = base + rng.uniform(0.1, 0.9) * (plan.road - base)
        trunk, leaf = lit((104, 84, 70), plan.light), lit(rng.choice(LEAVES), plan.light)
        if not all(apart((x - 0.36 * tall, foot - 1.06 * tall, x + 0.36 * tall, foot), box) for box in clear):
            continue
        items.append(Item("polygon", rectangle((x - 0.04 * tall, foot - 0.5 * tall, x + 0.04 * tall, foot)), trunk))
        for shift, rise, size in ((-0.14, 0.62, 0.22), (0.14, 0.6, 0.22), (0, 0.8, 0.26)):
            cx, cy, r = x + shift * tall, foot - rise * tall, size * tall
            items.append(Item("ellipse", [(cx - r, cy - r), (cx + r, cy + r)], leaf))
    if rng.random() < 0.4:
        x, tall, metal = rng.uniform(0, width), rng.uniform(0.3, 0.5) * unit, lit((112, 114, 118), plan.light)
        foot, arm = (base + plan.road) / 2, rng.choice((-1, 1)) * 0.07 * unit
        lamp = (x + arm - 0.018 * unit, foot - tall, x + arm + 0.018 * unit, foot - tall + 0.02 * unit)
        if all(apart((x - 0.01 * unit, foot - tall, x + 0.01 * unit, foot), box) and apart(lamp, box) for box in clear):
            items.append(Item("line", [(x, foot), (x, foot - tall), (x + arm, foot - tall)], metal, 0.009 * unit))
            items.append(Item("ellipse", [lamp[:2], lamp[2:]], (250, 240, 200)))
    return items


def poles(plan: Plan, box: Box, unit: float) -> list[Box]:
    """What a board stands on: one pole, two for a large one; none if it hangs on a wall."""
    x1, y1, x2, y2 = box
    wide, middle = x2 - x1, ((x1 + x2) / 2, (y1 + y2) / 2)
    if any(inside((*middle, *middle), house.front) for house in plan.houses):
        return []
    foot = max(y2 + 0.25 * (y2 - y1), plan.base + 0.3 * (plan.road - plan.base))
    thick = max(0.05 * min(wide, y2 - y1), 0.004 * unit)
    places = (0.5,) if wide < 0.16 * unit else (0.22, 0.78)
    return [(x1 + p * wide - thick / 2, middle[1], x1 + p * wide + thick / 2, foot) for p in places]


def car_items(car: Thing, owner: int) -> list[Item]:
    """A car from behind, with room for a plate."""
    x1, y1, x2, y2 = car.box
    w, h = x2 - x1, y2 - y1
    at = lambda a, b, c, d: (x1 + a * w, y1 + b * h, x1 + c * w, y1 + d * h)  # noqa: E731
    dark = tuple(int(0.7 * channel) for channel in car.paint)
    tyre, glass, lamp = (30, 30, 32), (108, 124, 138), (150, 60, 54)
    corners = lambda box: [(box[0], box[1]), (box[2], box[3])]  # noqa: E731
    cabin = [(x1 + 0.14 * w, y1 + 0.45 * h), (x1 + 0.26 * w, y1), (x1 + 0.74 * w, y1), (x1 + 0.86 * w, y1 + 0.45 * h)]
    pane = [(x1 + 0.22 * w, y1 + 0.4 * h), (x1 + 0.31 * w, y1 + 0.08 * h), (x1 + 0.69 * w, y1 + 0.08 * h),
            (x1 + 0.78 * w, y1 + 0.4 * h)]  # fmt: skip
    return [
        Item("rounded", corners(at(0.06, 0.75, 0.24, 1)), tyre, 0.04 * w, owner),
        Item("rounded", corners(at(0.76, 0.75, 0.94, 1)), tyre, 0.04 * w, owner),
        Item("polygon", cabin, car.paint, owner=owner),
        Item("polygon", pane, glass, owner=owner),
        Item("rounded", corners(at(0, 0.38, 1, 0.9)), car.paint, 0.08 * w, owner),
        Item("rounded", corners(at(0.02, 0.78, 0.98, 0.9)), dark, 0.03 * w, owner),
        Item("rounded", corners(at(0.03, 0.44, 0.15, 0.56)), lamp, 0.02 * w, owner),
        Item("rounded", corners(at(0.85, 0.44, 0.97, 0.56)), lamp, 0.02 * w, owner),
    ]
