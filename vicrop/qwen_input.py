"""Images and chat messages as Qwen's own utilities prepare them for Qwen2.5-VL."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from vicrop.images import load_image
from vicrop.layouts import Size

if TYPE_CHECKING:
    from transformers import BatchFeature

MAX_PIXELS = 256 * 28 * 28  # of an image


def multiple_size(size: Size, factor: int) -> Size:
    """(width, height) with both sides at the nearest multiple of `factor` pixels, at least one `factor` long."""
    width, height = (max(factor, round(side / factor) * factor) for side in size)
    return width, height


def resize_to_multiple(image: Image.Image, factor: int) -> Image.Image:
    """The image in its `multiple_size` (bicubic), as Qwen's own utilities resize it first."""
    return image.resize(multiple_size(image.size, factor), Image.Resampling.BICUBIC)


def encode_base64(image: Image.Image) -> str:
    """A PIL image as a base64 PNG string, as chat messages carry it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def pixel_range(processor: Any, min_pixels: int | None = None, max_pixels: int | None = None) -> dict[str, int]:
    """The `size` to call a Qwen2.5-VL image processor with: its own range, but at most MAX_PIXELS, or what is given."""
    own = processor.image_processor.size
    high = min(own["longest_edge"], MAX_PIXELS) if max_pixels is None else max_pixels
    low = min(own["shortest_edge"], high) if min_pixels is None else min_pixels
    return {"shortest_edge": low, "longest_edge": max(low, high)}


def refuse_bad_pixel_range(low: int | None, high: int | None) -> None:
    """ValueError unless images can be scaled into a range of numbers of pixels; None: no limit is given."""
    low = 1 if low is None else low
    if low < 1 or (high is not None and high < low):
        raise ValueError(f"min_pixels is at least 1, not {low}, and max_pixels at least min_pixels, not {high}")


def prepare_qwen2_5_input(
    messages: Sequence[dict[str, Any]], processor: Any, min_pixels: int | None = None, max_pixels: int | None = None
) -> "BatchFeature":
    """What a Qwen2.5-VL model is given for chat messages: token ids, mask, pixels and grid, ready for `generate`.

    Args:
        messages: [{"role", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]}]; an image is
            PIL, a path (with or without file://), or a data URI with the base64 of `encode_base64`.
        processor: with or without its video half.
        min_pixels, max_pixels: images are scaled into this range; default: as `pixel_range`.
    """
    settings, images = processor.image_processor, []
    for message in messages:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                image = part["image"]
                if isinstance(image, str) and image.startswith("data:image"):
                    image = Image.open(io.BytesIO(base64.b64decode(image.partition("base64,")[2])))
                elif isinstance(image, str):
                    image = image.removeprefix("file://")
                images.append(resize_to_multiple(load_image(image), settings.patch_size * settings.merge_size))
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images_kwargs = {"size": pixel_range(processor, min_pixels, max_pixels)}
    return processor(images=images or None, text=[text], return_tensors="pt", padding=True, images_kwargs=images_kwargs)
