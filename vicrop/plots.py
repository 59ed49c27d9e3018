"""Pictures of what a method found, and plots of what was measured (matplotlib)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from PIL import Image

from vicrop.files import atomic_path
from vicrop.layouts import Region

if TYPE_CHECKING:
    from vicrop.crop import CropResult

Estimate = Mapping[str, float]  # "mean", "low", "high"
HEAT = "inferno"  # matplotlib's colours of importance
TICK_WIDTH = 14  # characters in a line below a group of bars


def from_0_to_1(att_map: np.ndarray) -> np.ndarray:
    """A map (h, w) scaled so that its smallest value is 0 and its largest 1."""
    low, high = float(np.min(att_map)), float(np.max(att_map))
    return (np.asarray(att_map) - low) / (high - low if high > low else 1)


def overlay(image: Image.Image, att_map: np.ndarray, region: Region, strength: float = 0.55) -> Image.Image:
    """The image with an importance map laid exactly over the region that it covers.

    Args:
        image: PIL image.
        att_map: (h, w) array, row 0 at the top.
        region: xyxy pixels of the image; may reach beyond it.
        strength: opacity of the map, 0 to 1.
    Returns:
        PIL image of the same size; what the map does not cover stays as it is.
    """
    heat = matplotlib.colormaps[HEAT](from_0_to_1(att_map))[..., :3]
    left, top, right, bottom = region
    heat = Image.fromarray((heat * 255).astype(np.uint8)).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    covered = image.crop(region)
    mixed = image.copy()
    mixed.paste(Image.blend(covered, heat, strength), (left, top))
    return mixed


def heat_over(image: Image.Image, att_map: np.ndarray, region: Region, most: float = 0.4) -> Image.Image:
    """As `overlay`, but opacity follows the map: its smallest value hides nothing, its largest `most` of the image."""
    share = from_0_to_1(att_map)
    heat = Image.fromarray((255 * matplotlib.colormaps[HEAT](share)[..., :3]).round().astype(np.uint8))
    left, top, right, bottom = region
    size, nearest = (right - left, bottom - top), Image.Resampling.NEAREST
    opacity = Image.fromarray((255 * most * share).round().astype(np.uint8)).resize(size, nearest)
    mixed = image.copy()
    mixed.paste(heat.resize(size, nearest), (left, top), opacity)
    return mixed


def finding_figure(image: Image.Image, question: str, title: str, finding: "CropResult") -> Figure:
    """A Figure of a panel each: the picture and the map, both with the boxes, and the crops, as far as there are any.

    Args:
        image: PIL image; question: the text above.
        title: what made the map; finding: a crop.CropResult.
    """
    whole = [(image, f"without crop: {finding.original_answer}")]
    if finding.att_map is not None:
        whole.append((overlay(image, finding.att_map, finding.region), f"where it looks ({title})"))
    count = len(finding.bboxes)
    captions = [f"with {'crop' if count == 1 else f'{count} crops'}: {finding.crop_answer}"]
    captions += [f"crop {number} of {count}" for number in range(2, count + 1)]
    cropped = [(image.crop(box), caption) for box, caption in zip(finding.bboxes, captions, strict=False)]
    panels = [*whole, *cropped]
    figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
    figure.suptitle(question, fontsize=14, fontweight="bold", parse_math=False)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (picture, caption) in zip(all_axes, panels, strict=True):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=12, parse_math=False)
        axes.set_axis_off()
    for axes in all_axes[: len(whole)]:
        for x1, y1, x2, y2 in finding.bboxes or [(0, 0, *image.size)]:
            for color, width in (("white", 4), ("crimson", 2)):
                axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=color, linewidth=width)
    return figure


def bars_figure(rows: Mapping[str, Mapping[str, Estimate]], unit: str, title: str) -> Figure:
    """A Figure of grouped bars with 95 % intervals.

    Args:
        rows: {group: {series: {"mean", "low", "high"}}}.
    """
    series = list(next(iter(rows.values())))
    figure = Figure(figsize=(max(6, 1.2 * len(rows) + 0.2 * len(rows) * len(series)), 4), layout="constrained")
    axes, width = figure.subplots(), 0.85 / len(series)
    for number, name in enumerate(series):
        means, low, high = intervals([found[name] for found in rows.values()])
        places = np.arange(len(rows)) + (number - (len(series) - 1) / 2) * width
        ends = np.maximum(0, (means - low, high - means))  # where nothing varies they are off by rounding
        axes.bar(places, means, width, yerr=ends, label=name, error_kw={"linewidth": 1})
    axes.set_xticks(range(len(rows)), [fill(str(row), TICK_WIDTH) for row in rows], parse_math=False)
    axes.set_ylabel(unit)
    if all(found["mean"] is None or found["mean"] >= 0 for of_row in rows.values() for found in of_row.values()):
        axes.set_ylim(0, None)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(title, parse_math=False)
    if len(series) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def curves_figure(
    rows: Mapping[float | str, Mapping[str, Estimate]], label: str, unit: str, title: str, even: float | None = None
) -> Figure:
    """A Figure of curves with 95 % bands over rows that are numbers; a row with a name is a level, dashed.

    Args:
        rows: {number or name: {series: {"mean", "low", "high"}}}.
        even: a value that means nothing in particular (a dotted line); then the axis is logarithmic.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, numbers = figure.subplots(), [row for row in rows if not isinstance(row, str)]
    for name, dashes in zip(next(iter(rows.values())), cycle(("--", "-.", ":"))):
        means, low, high = intervals([rows[number][name] for number in numbers])
        (line,) = axes.plot(numbers, means, "o-", markersize=4, label=name)
        axes.fill_between(numbers, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        for row in rows.keys() - set(numbers):
            axes.axhline(rows[row][name]["mean"], color=line.get_color(), linestyle=dashes, label=f"{name}, {row}")
    if even is not None:
        axes.axhline(even, color="grey", linestyle=":")
        axes.set_yscale("log")
    axes.set(xlabel=label, ylabel=unit)
    axes.set_title(title, parse_math=False)
    axes.locator_params(axis="x", integer=all(float(number).is_integer() for number in numbers))
    axes.legend(frameon=False)
    return figure


def points_figure(
    rows: Mapping[str, Mapping[str, Estimate]], across: Sequence[str], up: str, title: str
) -> Figure:  # fmt: skip
    """A Figure with a panel for each series of `across`: the series `up` over it, with 95 % intervals.

    Args:
        rows: {point: {series: {"mean", "low", "high"}}}; points "A at 1" and "A at 2" are on one curve, A.
    """
    figure = Figure(figsize=(5 * len(across), 4.2), layout="constrained")
    figure.suptitle(title, parse_math=False)
    curves: dict[str, list[Mapping[str, Estimate]]] = {}
    for point, found in rows.items():
        curves.setdefault(point.rpartition(" at ")[0], []).append(found)
    all_axes = figure.subplots(1, len(across), squeeze=False, sharey=True)[0]
    for axes, name in zip(all_axes, across, strict=True):
        for curve, points in curves.items():
            places, _, _ = intervals([found[name] for found in points])
            means, low, high = intervals([found[up] for found in points])
            ends = np.maximum(0, (means - low, high - means))
            axes.errorbar(places, means, ends, fmt="o-", markersize=4, capsize=2, linewidth=1, label=curve)
        axes.set(xlabel=name, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    all_axes[0].set(ylabel=up)
    all_axes[-1].legend(frameon=False)
    return figure


def intervals(estimates: Sequence[Estimate]) -> Iterator[np.ndarray]:
    """(means, lower ends, upper ends) arrays; nan where nothing was measured."""
    return (np.array([found[name] for found in estimates], dtype=float) for name in ("mean", "low", "high"))


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a Figure to an image file, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
