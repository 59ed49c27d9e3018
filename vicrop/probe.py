"""Which token shows which part of an image, measured: for tests, and for checkpoints whose layout no formula gives.

    pixels = pixels_of(adapter, (640, 480))             # what each element of `pixel_values` shows: place, colour
    owners = token_owners(adapter, inputs)              # the token that each of them feeds
    index, edges = probed_grid(pixels, owners)          # the map's cells, and what they cover, in parts of the image
    probed_picture(pixels, owners, index, edges)        # the same pixel by pixel

Pictures that are black, white, of one colour, or whose brightness is a coordinate, go through the processor: an element
that is the same for black and white is padding, any other says by its values what it shows. Then the vision side runs
with attention in which every position sees only itself, so a token depends on its own pixels alone; gradients of sums
over tokens, each weighted by a digit of its number, say whose an element is. The weights are powers of two, which no
step of a backward pass rounds, in whatever dtype.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vicrop.adapter import Adapter, decoder_of
from vicrop.attention import FrozenModel, replaced, with_implementation
from vicrop.layouts import Size

DIGITS = 8  # a token's number is written with so many; their powers of two stay far from over- and underflow
SURE = 0.95  # the part of the gradient that must be a single token's, or tokens overlap
BESIDE = 0.02  # parts of an image's side, and
HALF = (
    0.6  # parts of a cell: the larger of both is by how much a grid may miss what tokens show (models cut cells in two)
)
Edges = tuple[float, float, float, float]  # left, top, right, bottom, in parts of the image's width and height


class Overlap(ValueError):
    """Several tokens show the same pixels, so no pixel tells whose it is."""


# ------------------------------------------------------------------------------------------------------------- pixels
class Pixels(NamedTuple):
    """What the elements of one image's `pixel_values` show; arrays of its shape."""

    x: np.ndarray  # place in parts of the image's width; in tiles also that of padding, beyond 0..1
    y: np.ndarray
    colour: np.ndarray  # 0, 1, 2, or -1 at padding
    shows: np.ndarray  # False at padding
    placed: np.ndarray  # has it a place?


def pixels_of(adapter: Adapter, size: Size) -> Pixels:
    """The Pixels of an image of that (width, height), from seven pictures of that size."""
    width, height = size

    def given(picture: np.ndarray) -> np.ndarray:
        array = np.broadcast_to(picture, (height, width, 3)).round().astype(np.uint8)
        return adapter.preprocess([Image.fromarray(array)])["pixel_values"].double().numpy()

    black, white = given(np.zeros(3)), given(np.full(3, 255))
    span = white - black
    shows = np.abs(span) > 1e-6

    def brightness(picture: np.ndarray) -> np.ndarray:
        return np.divide(given(picture) - black, span, out=np.zeros_like(span), where=shows)

    x = brightness(((np.arange(width) + 0.5) / width * 255)[None, :, None])
    y = brightness(((np.arange(height) + 0.5) / height * 255)[:, None, None])
    colour = np.where(shows, np.argmax([brightness(np.eye(3)[each] * 255) for each in range(3)], 0), -1)
    column, row = _straight(x, shows, -1), _straight(y, shows, -2)
    if column is None or row is None:
        return Pixels(x, y, colour, shows, shows)
    in_tiles = np.broadcast_to(shows.any((-1, -2, -3), keepdims=True), shows.shape)
    planes = np.moveaxis(colour, -3, 0)
    for plane in planes:
        plane[:] = plane.max()
    return Pixels(column, row, colour, shows, in_tiles)


def _straight(values: np.ndarray, shows: np.ndarray, axis: int) -> np.ndarray | None:
    """Coordinates in pictures (..., 3, H, W) as lines along an axis, so that padding has them too; None: they are none.

    That also undoes the rounding of brightness to 8 bits.
    """
    if values.ndim < 4 or values.shape[-3] != 3:
        return None
    out, numbers, other = values.copy(), np.arange(values.shape[axis]), 0 if axis == -1 else 1
    pictures = (each.reshape(-1, *values.shape[-2:]) for each in (values, shows, out))
    for found, seen, line in zip(*pictures, strict=True):
        count = seen.sum(other)
        mean, some = np.where(seen, found, 0).sum(other) / np.maximum(count, 1), count > 0
        if some.sum() < 2:
            continue
        fitted = np.polyval(np.polyfit(numbers[some], mean[some], 1), numbers)
        if np.abs(fitted - mean)[some].max() > BESIDE:
            return None
        line[:] = fitted if axis == -1 else fitted[:, None]
    return out


# ------------------------------------------------------------------------------------------------------------- owners
class Owners(NamedTuple):
    """Which of `count` tokens each element of one image's `pixel_values` feeds; -1: none, or several."""

    token: np.ndarray
    weight: np.ndarray  # how much the tokens depend on it
    count: int


def _own_value(module, query, key, value, attention_mask=None, **options):
    """The attention function in which a position sees only itself; of other positions (a resampler's) all evenly."""
    if query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query * 0, key, value, attention_mask, **options)
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


AttentionInterface.register("own_value", _own_value)
AttentionMaskInterface.register("own_value", lambda *_, **__: None)


@contextmanager
def seeing_only_themselves(model: Any) -> Iterator[None]:
    """In a model's parts besides its decoder every position sees only itself for the moment."""
    within, attend, softmax = set(decoder_of(model).modules()), F.scaled_dot_product_attention, F.softmax
    outside = [each for each in model.modules() if isinstance(each, PreTrainedModel) and each not in within]
    able = [each for each in outside if each._can_set_attn_implementation()]

    def own(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
        positions, keys, shape = query.shape[-2], key.shape[-2], (*query.shape[:-1], value.shape[-1])
        if positions < keys:  # a resampler's
            return attend(query, key, value, *more, **options)
        # Heads may share a value. Where keys are pooled, none is a position's own.
        return value.expand(shape) if positions == keys else value.new_zeros(shape)

    def alone(scores: Tensor, *more: Any, **options: Any) -> Tensor:
        length, square = scores.shape[-1], scores.dim() > 2 and scores.shape[-2] == scores.shape[-1]
        return torch.eye(length).to(scores).expand_as(scores) if square else softmax(scores, *more, **options)

    with ExitStack() as stack:
        stack.enter_context(with_implementation("own_value", able))
        for name, function in {"scaled_dot_product_attention": own, "softmax": alone}.items():
            stack.enter_context(replaced(F, name, function))  # towers that call it by themselves
        yield


@contextmanager
def token_scores(adapter: Adapter, inputs: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(a number for each token, the pixels that they are made of): in autograd's graph, while this lasts.

    Args:
        inputs: of one image, on the vision side's device.
    """
    with FrozenModel(adapter.model).frozen_eval(), torch.enable_grad(), seeing_only_themselves(adapter.model):
        pixels = inputs["pixel_values"].detach().clone().requires_grad_()
        (features,) = adapter.encode_images({**inputs, "pixel_values": pixels}, 1)
        tokens = features.pooled.flatten(0, -2).float()
        direction = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(0))
        yield tokens @ direction.to(tokens.device), pixels


def token_owners(adapter: Adapter, inputs: dict[str, Tensor]) -> Owners:
    """The Owners of one image's pixels; `inputs` as `token_scores` takes them."""
    with token_scores(adapter, inputs) as (scores, pixels):
        number = torch.arange(len(scores), device=scores.device)

        def gradient(weights: Tensor) -> np.ndarray:
            return torch.autograd.grad((scores * weights).sum(), pixels, retain_graph=True)[0].double().cpu().numpy()

        whole = gradient(torch.ones_like(scores))
        places = int(np.ceil(np.log(max(2, len(scores))) / np.log(DIGITS)))
        digits = [gradient(2.0 ** (number // DIGITS**place % DIGITS)) for place in range(places)]
    felt = np.abs(whole) > 1e-5 * np.abs(whole).max()
    ratios = [np.abs(np.divide(each, whole, out=np.full_like(whole, 0.7), where=felt)) for each in digits]
    exponents = [np.log2(each + 1e-9) for each in ratios]
    whole_numbers = [each.round() for each in exponents]
    clear = np.all([(np.abs(each - rounded) < 1e-3) & (rounded >= 0) & (rounded < DIGITS)
                    for each, rounded in zip(exponents, whole_numbers, strict=True)], 0)  # fmt: skip
    token = np.where(clear, sum(each.astype(int) * DIGITS**place for place, each in enumerate(whole_numbers)), -1)
    return Owners(np.where(token < len(scores), token, -1), np.abs(whole), len(scores))


def owned(pixels: Pixels, owners: Owners) -> np.ndarray:
    """The token of each element that has a place, also where its gradient happened to vanish.

    Raises:
        Overlap: much of the gradient is not a single token's.
    """
    token = np.where(pixels.placed, owners.token, -1)
    planes = [pixels.colour == each for each in range(3)]
    if len({int(plane.sum()) for plane in planes}) == 1:  # a pixel's colours have one owner
        best = np.max([token[plane] for plane in planes], 0)
        for plane in planes:
            token[plane] = best
    rows, placed = token.reshape(-1, token.shape[-1]), pixels.placed.reshape(-1, token.shape[-1])
    most = rows.max(1, keepdims=True)
    if ((rows == most) | (rows < 0)).all():  # a row is a patch, or lies within one
        token = np.where(placed, most, -1).reshape(token.shape)
    total = owners.weight[pixels.placed].sum()
    sure = owners.weight[token >= 0].sum() / total if total else 0.0
    if sure < SURE:
        raise Overlap(f"only {sure:.0%} of what tokens depend on is a single token's: they overlap")
    return token


# --------------------------------------------------------------------------------------------------------------- grid
def probed_grid(pixels: Pixels, owners: Owners) -> tuple[np.ndarray, Edges]:
    """((h, w) token numbers, what they cover): the largest grid that tokens make.

    Raises:
        Overlap: tokens overlap.
        ValueError: tokens make no grid, or one that leaves out much of what they show.
    """
    token = owned(pixels, owners)
    boxes = np.full((owners.count, 4), np.nan)  # x, y of the centre; extent in x and y
    for number in range(owners.count):
        mine = token == number
        if mine.any():
            x, y = pixels.x[mine], pixels.y[mine]
            boxes[number] = x.mean(), y.mean(), np.ptp(x), np.ptp(y)
    index, edges = _without_padding(*_largest_grid(boxes))
    refuse_hidden(pixels, token, index.shape, edges)
    return index, edges


def probed_picture(pixels: Pixels, owners: Owners, index: np.ndarray, edges: Edges) -> np.ndarray | None:
    """(3, H, W): the number of the element of `pixel_values` that is each pixel of a map's tokens.

    None where they are no pictures (rows of patches), or where cells are not of one size.

    Args:
        index, edges: the grid, as from `probed_grid`.
    """
    if pixels.x.ndim < 4 or pixels.x.shape[-3] != 3:
        return None
    token = owned(pixels, owners).reshape(-1, *pixels.x.shape[-3:])
    numbers = np.arange(token.size).reshape(token.shape)
    places: dict[int, list[np.ndarray]] = {}
    for plane, own in zip(token.max(1), numbers, strict=True):
        for number, box in enumerate(ndimage.find_objects(plane + 1)):
            if box is not None:
                places.setdefault(number, []).append(own[:, *box])
    cells = [[places[number] for number in row] for row in index.tolist()]
    if len({(len(cell), cell[0].shape) for row in cells for cell in row}) > 1 or len(cells[0][0]) > 1:
        return None
    picture = np.concatenate([np.concatenate([cell for (cell,) in row], 2) for row in cells], 1)
    return picture if _in_its_place(pixels, picture, edges) else None


def _in_its_place(pixels: Pixels, picture: np.ndarray, edges: Edges) -> bool:
    """Does each pixel of a picture show what lies there between its edges, within a pixel?"""
    (left, top, right, bottom), (_, height, width) = edges, picture.shape
    wide, high = (right - left) / width, (bottom - top) / height
    x, y = left + (np.arange(width) + 0.5) * wide, top + (np.arange(height) + 0.5) * high
    beside = np.abs(pixels.x.take(picture) - x).max(), np.abs(pixels.y.take(picture) - y[:, None]).max()
    return bool(beside[0] <= max(BESIDE, wide) and beside[1] <= max(BESIDE, high))


def tolerances(grid: tuple[int, ...], edges: Edges) -> tuple[float, float]:
    """By how much (x, y) the edges of a grid may be wrong, in parts of a side."""
    (h, w), (left, top, right, bottom) = grid, edges
    return max(BESIDE, HALF * (right - left) / w), max(BESIDE, HALF * (bottom - top) / h)


def refuse_hidden(pixels: Pixels, token: np.ndarray, grid: tuple[int, ...], edges: Edges) -> None:
    """ValueError if a visible pixel that a token shows lies outside of a grid's edges."""
    seen, (left, top, right, bottom) = (token >= 0) & pixels.shows, edges
    x, y = pixels.x[seen], pixels.y[seen]
    beside = max(left - x.min(), x.max() - right), max(top - y.min(), y.max() - bottom)
    for part, allowed, side in zip(beside, tolerances(grid, edges), ("width", "height"), strict=True):
        if part > allowed:
            raise ValueError(f"{part:.0%} of the image's {side} is shown to the model, and no cell covers it")


def _largest_grid(boxes: np.ndarray) -> tuple[np.ndarray, Edges]:
    """Tokens of one scale make a lattice; smaller ones beside it, of which padding hides a part, complete it."""
    sizes, seen = boxes[:, 2:] + 1e-3, [number for number in range(len(boxes)) if not np.isnan(boxes[number, 0])]
    scales: list[list[int]] = []
    for number in sorted(seen, key=lambda each: -sizes[each].prod()):
        near = (group for group in scales if np.abs(np.log2(sizes[number] / sizes[group[0]])).max() < 0.3)
        group = next(near, None)
        scales.append([number]) if group is None else group.append(number)
    found = [grid for group in scales if (grid := _grid_of_scale(boxes, sizes, group, seen)) is not None]
    if not found:
        raise ValueError(
            f"the {len(boxes)} tokens of an image make no grid: {[len(group) for group in scales]} by scale"
        )
    return max(found, key=lambda grid: grid[0].size)


def _grid_of_scale(boxes: np.ndarray, sizes: np.ndarray, group: list[int],
                   seen: Sequence[int]) -> tuple[np.ndarray, Edges] | None:  # fmt: skip
    """The grid of tokens that are of one size, completed by smaller ones; None if they leave holes."""
    cell, first = np.zeros(2), np.zeros(2)
    for axis in (0, 1):
        values, step = np.sort(boxes[group, axis]), np.median(sizes[group, axis]) / 2
        lines = [part.mean() for part in np.split(values, np.flatnonzero(np.diff(values) > step) + 1)]
        cell[axis] = np.diff(lines).mean() if len(lines) > 1 else sizes[group, axis].max()
        first[axis] = lines[0] - cell[axis] / 2
    whole = sizes[group[0]]
    smaller = [each for each in seen if (sizes[each] < 1.1 * whole).all() and (sizes[each] < 0.8 * whole).any()]
    cells: dict[tuple[int, ...], int] = {}
    places = [tuple(place) for place in np.floor((boxes[:, 1::-1] - first[::-1]) / cell[::-1])[[*group, *smaller]]]
    for number, (row, column) in zip([*group, *smaller], places, strict=True):
        cells.setdefault((int(row), int(column)), number)  # of an overview as fine as the tiles the first counts
    (top, left), (bottom, right) = np.min(list(cells), 0), np.max(list(cells), 0) + 1
    uneven = len(set(Counter(places[: len(group)]).values())) > 1
    if len(cells) != (bottom - top) * (right - left) or uneven:
        return None
    index = np.array([[cells[row, column] for column in range(left, right)] for row in range(top, bottom)])
    x1, y1, x2, y2 = first[[0, 1, 0, 1]] + np.array([left, top, right, bottom]) * cell[[0, 1, 0, 1]]
    return index, (float(x1), float(y1), float(x2), float(y2))


def _without_padding(index: np.ndarray, edges: Edges) -> tuple[np.ndarray, Edges]:
    """The same without rows and columns that show nothing but padding."""
    (h, w), (x1, y1, x2, y2) = index.shape, edges
    wide, high = (x2 - x1) / w, (y2 - y1) / h

    def spare(low: float, past: float, cell: float) -> tuple[int, int]:
        return max(0, int(-low / cell + BESIDE)), max(0, int((past - 1) / cell + BESIDE))

    (left, right), (top, bottom) = spare(x1, x2, wide), spare(y1, y2, high)
    kept = x1 + left * wide, y1 + top * high, x2 - right * wide, y2 - bottom * high
    return index[top : h - bottom, left : w - right], kept


# ---------------------------------------------------------------------------------------------- where tokens overlap
def token_centres(adapter: Adapter, inputs: dict[str, Tensor], pixels: Pixels, tokens: Sequence[int]) -> np.ndarray:
    """(tokens, 2): x and y of the middle of what some tokens depend on, in parts of the image."""
    centres = []
    with token_scores(adapter, inputs) as (scores, values):
        for number in tokens:
            gradient = torch.autograd.grad(scores[number], values, retain_graph=True)[0].double().cpu().numpy()
            weight = np.where(pixels.placed, gradient**2, 0).ravel()
            centres.append([_middle(axis.ravel(), weight) for axis in (pixels.x, pixels.y)])
    return np.array(centres)


def _middle(values: np.ndarray, weight: np.ndarray) -> float:
    """The value on either side of which there is half of the weight: what is far and faint does not count."""
    order = np.argsort(values)
    total = weight[order].cumsum()
    return float(values[order][np.searchsorted(total, total[-1] / 2)])
