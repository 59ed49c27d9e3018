"""Pictures of what a method found (matplotlib; the only file that draws)."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from records import renamed_to


def overlay(image, att_map, region, strength=0.55):
    """The image with an importance map laid exactly over the region that it covers.

    Args:
        image: PIL image.
        att_map: (h, w) array, row 0 at the top.
        region: xyxy pixels of the image; may reach beyond it.
        strength: opacity of the map, 0 to 1.
    Returns:
        PIL image of the same size; what the map does not cover stays as it is.
    """
    low, high = float(np.min(att_map)), float(np.max(att_map))
    heat = matplotlib.colormaps["inferno"]((np.asarray(att_map) - low) / (high - low if high > low else 1))[..., :3]
    left, top, right, bottom = region
    heat = Image.fromarray((heat * 255).astype(np.uint8)).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    covered = image.crop(region)
    mixed = image.copy()
    mixed.paste(Image.blend(covered, heat, strength), (left, top))
    return mixed


def finding_figure(image, question, title, finding):
    """A Figure of up to three panels: the picture and the map, both with the box, and the crop.

    Args:
        image: PIL image; question: the text above.
        title: what made the map; finding: a vicrop.Finding.
    """
    whole = [(image, f"without crop: {finding.original_answer}")]
    if finding.att_map is not None:
        whole.append((overlay(image, finding.att_map, finding.region), f"where it looks ({title})"))
    panels = [*whole, (image.crop(finding.bbox), f"with crop: {finding.crop_answer}")]
    figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
    figure.suptitle(question, fontsize=14, fontweight="bold", parse_math=False)
    all_axes = figure.subplots(1, len(panels))
    for axes, (picture, caption) in zip(all_axes, panels, strict=True):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=12, parse_math=False)
        axes.set_axis_off()
    x1, y1, x2, y2 = finding.bbox
    for axes in all_axes[: len(whole)]:
        for color, width in (("white", 4), ("crimson", 2)):
            axes.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=color, linewidth=width)
    return figure


def save_figure(figure, path):
    """Write a Figure to an image file, whole or not at all."""
    with renamed_to(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
