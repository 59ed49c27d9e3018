"""Pictures of localization heads: their maps on the image, mask and box, and all heads of a model at a glance."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vicrop.files import atomic_path
from vicrop.heads import FIRST_LAYER, chord_elbow, head_name
from vicrop.layouts import Region
from vicrop.localization.grounding import Grounding, Head
from vicrop.plots import overlay

MASK_COLOR = (0, 158, 115)  # a green that colour-blind people can tell from the box's red
PANEL = 3.4  # inches: the longer side of a picture
LETTER, LINE = 0.07, 0.15  # inches: about the width of a letter and the height of a line of a panel's title
SHOWN_HEADS = 6  # of the heads that made a map: logic.selection=all has hundreds


def masked(image: Image.Image, mask: np.ndarray, strength: float = 0.45) -> Image.Image:
    """The image with a mask (height, width) laid over it."""
    tinted = Image.blend(image, Image.new("RGB", image.size, MASK_COLOR), strength)
    return Image.composite(tinted, image, Image.fromarray(mask.astype(np.uint8) * 255))


def grounding_figure(image: Image.Image, query: str, attention: np.ndarray, region: Region, found: Grounding) -> Figure:
    """A Figure: the image with its box, the map of each head on it, and the map that they make together.

    Args:
        attention: (layers, heads, h, w); region: xyxy pixels of the image that a map covers.
    """
    panels = [(image, query)]
    for head in found.heads[:SHOWN_HEADS]:
        entropy, share = found.measures.entropy[head], found.measures.sums[head]
        name = f"layer {head[0]}, head {head[1]}\nentropy {entropy:.2f}, attention {share:.2f}"
        panels.append((overlay(image, attention[head], region), name))
    more = len(found.heads) - SHOWN_HEADS
    together = f"{len(found.heads)} heads together" + (f", {more} of them not shown" if more > 0 else "")
    panels += [(overlay(image, found.att_map, region), together), (masked(image, found.shown), "mask and box")]
    scale = PANEL / max(image.size)
    width, height = max(image.width * scale, 0.65 * PANEL), max(image.height * scale, PANEL / 2)  # room for the titles
    panels = [(picture, wrapped(title, width / LETTER)) for picture, title in panels]
    lines = max(title.count("\n") + 1 for _, title in panels)
    figure = Figure(figsize=(width * len(panels), height + 0.45 + lines * LINE), layout="constrained")
    for axes, (picture, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.imshow(picture)
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_axis_off()
        axes.set(xlim=(0, image.width), ylim=(image.height, 0))
        if found.box and axes in (figure.axes[0], figure.axes[-1]):
            x1, y1, x2, y2 = found.box
            for color, line in (("white", 3.5), ("crimson", 1.8)):
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=line))
    return figure


def wrapped(text: str, letters: float) -> str:
    """A text in lines of at most `letters` letters. Matplotlib's own wrapping would read "$" as mathematics."""
    return "\n".join(textwrap.fill(line, max(8, int(letters))) for line in text.split("\n"))


def draw_mask(mask: np.ndarray, path: Path) -> None:
    """Write <id>_mask.png: white where the mask (height, width) is true, black elsewhere."""
    with atomic_path(path) as temporary:
        Image.fromarray(mask.astype(np.uint8) * 255).save(temporary)


def heads_figure(
    sums: np.ndarray, entropy: np.ndarray, heads: Sequence[Head], counts: np.ndarray | None = None, title: str = ""
) -> Figure:
    """A Figure of all heads of a model: S and entropy of each, the elbow of S, and frames around the chosen heads.

    Args:
        sums, entropy: (layers, heads), of one sample or means over many; infinite entropy stays blank.
        heads: the heads to frame.
        counts: (layers, heads), in how many samples each head counts; shown in a further panel.
    """
    grids = [(sums, "attention to the image (S)", "viridis"), (entropy, "spatial entropy", "viridis_r")]
    if counts is not None:
        grids.append((counts, "samples in which it counts", "viridis"))
    figure = Figure(figsize=(4.4 * (len(grids) + 1), 4.2), layout="constrained")
    figure.suptitle(title, parse_math=False)
    *all_axes, curve = figure.subplots(1, len(grids) + 1)
    for axes, (values, name, colors) in zip(all_axes, grids, strict=True):
        shown = axes.imshow(np.ma.masked_invalid(values), cmap=colors, aspect="auto", interpolation="nearest")
        figure.colorbar(shown, ax=axes)
        axes.set(title=name, xlabel="head", ylabel="layer")
        axes.locator_params(integer=True)
        axes.axhline(FIRST_LAYER - 0.5, color="crimson", linewidth=1, linestyle="--")
        for layer, head in heads[:SHOWN_HEADS]:
            axes.add_patch(Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, color="crimson", linewidth=2))
    values = np.sort(sums[FIRST_LAYER:], axis=None)
    curve.plot(values, ".-", markersize=3, linewidth=1)
    curve.plot([0, len(values) - 1], values[[0, -1]], linewidth=1, color="grey")
    curve.axhline(chord_elbow(values), color="crimson", linewidth=1, linestyle="--")
    curve.set(title=f"S of layers from {FIRST_LAYER} on, sorted; its elbow", xlabel="heads", ylabel="S")
    named = [head for head in heads[:SHOWN_HEADS] if head[0] >= FIRST_LAYER]
    chosen = [sums[head] for head in named]
    curve.plot(np.searchsorted(values, chosen), chosen, "o", color="crimson", label=", ".join(map(head_name, named)))
    if named:
        curve.legend(loc="lower right", fontsize=8)
    return figure
