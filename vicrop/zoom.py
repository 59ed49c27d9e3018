"""The `_zoom` methods: look at the whole image, go into the windows that matter most, and look again there.

Of a large image a model sees little at once, and tiles (`_high`) show it everything, one tile after the other. Here
each view of a window tells where to look next, and how sure the model is of the answer that it would give there:

    view = search(look, image_size, base, budget)[0]       # look(box) -> View

Best first: the next window is that which holds most of what was found important, weighted with how sure the model was
in the view that found it. What a window holds is its share of that view's map, times what the view's own window holds,
or times 1 where the model is sure there: it has found what it looks for. So a path goes on where the model gets surer;
where it does not, what is left of the windows around it follows soon.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image
from transformers import PreTrainedModel

from vicrop.boxes import window_sums
from vicrop.choices import Regions
from vicrop.layouts import Region, Size, whole
from vicrop.methods import Found, MapMethod, Method, Questions
from vicrop.session import ImageSession
from vicrop.tiles import TILE_ASPECT, TILE_SIDE

SURE = 0.9  # of an answer: from here on a search ends where it would only become less sure


class View(NamedTuple):
    """What was seen in a window of an image.

    Attributes:
        box: the window; region: the rectangle that the map covers (both xyxy pixels of the image).
        att_map: (h, w) importance, row 0 at the top.
        confidence: the probability of the answer that the window alone would give.
    """

    box: Region
    region: Region
    att_map: np.ndarray
    confidence: float

    @property
    def sides(self) -> Size:
        """(width, height) of the window."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


class Window(NamedTuple):
    """A window that may be looked at; the lowest of several comes first."""

    rank: float  # minus (how much it holds, times how sure the view is that led to it)
    number: int  # in which order it was found
    box: Region
    inside: View | None  # the view that led to it; None for the whole image
    holds: float  # 1 for the whole image; see above


def search(look: Callable[[Region], View], size: Size, base: float, budget: int) -> tuple[View, int]:
    """(the view in which the model is surest, how many views that took).

    Args:
        look: sees a window; size: (width, height) of the image in pixels.
        base: windows no larger than this, in pixels, are not looked into further.
        budget: views at most.
    """
    waiting, found, views, best, settled = [Window(-1.0, 0, whole(size), None, 1.0)], 1, 0, None, set()
    while waiting and views < budget:
        window = heapq.heappop(waiting)
        view, views = look(window.box), views + 1
        if best is None or view.confidence >= best.confidence:  # of two that are as sure the closer one
            best = view
        if window.inside is not None and view.confidence < window.inside.confidence:
            settled.add(window.inside.box)
        if max(view.sides) <= base:
            settled.add(view.box)
        if best.confidence >= SURE and best.box in settled:
            break
        for share, box in inner_windows(view, base) if max(view.sides) > base else ():
            holds = share * (1.0 if view.confidence >= SURE else window.holds)
            heapq.heappush(waiting, Window(-holds * view.confidence, found, box, view, holds))
            found += 1
    assert best is not None  # a budget is at least one view
    return best, views


def inner_windows(view: View, base: float) -> list[tuple[float, Region]]:
    """[(share of the map, box)]: the window of half the sides around what stands out, and those that cover the rest.

    A side is not halved where the other one is much longer, nor below `base`. What the first window holds counts for no
    other one.
    """
    left, top, right, bottom = view.box
    inner = _halved(view.sides, base)
    first_x, first_y, last_x, last_y = view.region
    values = np.asarray(view.att_map, dtype=np.float64)
    values = values - values.min()
    values = values if values.sum() > 0 else np.ones_like(values)
    (rows, columns), total = values.shape, values.sum()
    cell_w, cell_h = (last_x - first_x) / columns, (last_y - first_y) / rows
    n_x, n_y = (max(1, min(round(side / cell), count))
                for side, cell, count in zip(inner, (cell_w, cell_h), (columns, rows), strict=True))  # fmt: skip
    # A window of windows weighs its middle most, so that what stands out does not lie at the edge and is not cut.
    half_x, half_y = (n_x + 1) // 2, (n_y + 1) // 2
    sums = window_sums(window_sums(values, half_x, half_y), half_x, half_y)
    y, x = np.unravel_index(sums.argmax(), sums.shape)
    corner = round(first_x + x * cell_w), round(first_y + y * cell_h)
    corner = min(max(corner[0], left), right - inner[0]), min(max(corner[1], top), bottom - inner[1])
    here = np.s_[y : y + n_y, x : x + n_x]
    found = {_box(corner, inner): values[here].sum() / total}
    values[here] = 0
    for edge_x in dict.fromkeys((left, right - inner[0])):
        for edge_y in dict.fromkeys((top, bottom - inner[1])):
            i, j = round((edge_x - first_x) / cell_w), round((edge_y - first_y) / cell_h)
            rest = values[max(0, j) : max(0, j + n_y), max(0, i) : max(0, i + n_x)].sum()
            found.setdefault(_box((edge_x, edge_y), inner), rest / total)
    return [(float(share), box) for box, share in found.items()]


def _halved(sides: Size, base: float) -> Size:
    longest = max(sides)
    halves = (side if side * TILE_ASPECT < longest else math.ceil(max(side / 2, min(base, side))) for side in sides)
    width, height = halves
    return width, height


def _box(corner: Size, sides: Size) -> Region:
    return corner[0], corner[1], corner[0] + sides[0], corner[1] + sides[1]


class ZoomMethod(Method):
    """A map method that searches large images view by view. The best view's map gives the boxes, however many.

    Args:
        method: what makes a view's map; views: of an image, at most.
    """

    makes_map = True

    def __init__(self, method: MapMethod, views: int):
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.method, self.views = method, views
        self.__name__, self.reads = f"{method.__name__} in windows", method.reads
        self.regions = method.regions

    def bind(self, model: PreTrainedModel, layer: Any = None, heads: Any = None) -> "ZoomMethod":
        """See Method."""
        return ZoomMethod(self.method.bind(model, layer, heads), self.views)

    def with_regions(self, regions: Regions) -> Self:
        """See Method."""
        twin = super().with_regions(regions)
        twin.method = self.method.with_regions(regions)
        return twin

    def layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See Method."""
        return self.method.layers(model)

    def prefill_layers(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See Method; a view of the whole image may be that of the original answer."""
        return self.method.prefill_layers(model)

    def find(self, questions: Questions) -> list[Found]:
        """See Method; one question after the other, as each goes its own way."""
        session, found = questions.session, []
        for place, number in enumerate(questions.of):
            image, base = session.images[number], session.adapter.bbox_size
            best, views = search(self._looker(questions, place), image.size, base, self.views)
            boxes = self.method.boxes(session, number, best.att_map, best.region)
            found.append(Found(boxes, best.att_map, best.region, views))
        return found

    def _looker(self, questions: Questions, place: int) -> Callable[[Region], View]:
        """What looks at windows of an image with the question at a place in mind."""
        session, number, prompt = questions.session, questions.of[place], questions.prompts[place]
        image, general = session.images[number], questions.general_prompt

        def look(box: Region) -> View:
            if box == whole(image.size) == session.layouts[number].region:
                return self._seen(session, number, prompt, general, box, box, questions.sure[place : place + 1])
            part, region = image.crop(box), box
            if session.adapter.square_tiles:  # else something would be cut off
                side = min(max(part.size), TILE_SIDE)
                part = part.resize((side, side), Image.Resampling.BICUBIC)
            most, given = session.max_new_tokens, session.adapter.given
            single = ImageSession([part], session.model, session.processor, most, **given)
            if not session.adapter.square_tiles:
                (x1, y1, x2, y2), (left, top, *_) = single.layouts[0].region, box
                region = left + x1, top + y1, left + x2, top + y2
            return self._seen(single, 0, prompt, general, box, region)

        return look

    def _seen(self, session: ImageSession, number: int, prompt: str, general: str, box: Region, region: Region,
              known: Sequence[float] = ()) -> View:  # fmt: skip
        if not known:
            known = [each.confidence for each in
                     session.answers([prompt], layers=self.prefill_layers(session.model), of=[number])]  # fmt: skip
        (att_map,) = self.method.maps(session, [prompt], general, [number])
        return View(box, region, att_map, known[0])
