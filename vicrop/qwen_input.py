"""Images and chat messages as Qwen's own utilities prepare them for Qwen2.5-VL."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from PIL import Image

from vicrop.images import ImageSource, load_image
from vicrop.layouts import Size

if TYPE_CHECKING:
    from transformers import BatchFeature

MAX_PIXELS = 256 * 28 * 28  # of an image
LIMITS = ("resized_height", "resized_width", "min_pixels", "max_pixels")  # that may stand beside an image in a message
UNLIMITED = {"min_pixels": 1, "max_pixels": 1 << 60}  # only to the nearest multiple: the processor has the limits


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
            PIL, a path (with or without file://), an http(s) address, or a data URI with the base64 of `encode_base64`.
            Beside it LIMITS may stand, which qwen_vl_utils reads.
        processor: with or without its video half.
        min_pixels, max_pixels: images are scaled into this range; default: as `pixel_range`.
    Raises:
        ValueError: a message with a video; LIMITS where qwen_vl_utils cannot be imported.
        OSError: an image that cannot be read or fetched.
    """
    images = [resized(part, processor.image_processor) for part in image_parts(messages)]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images_kwargs = {"size": pixel_range(processor, min_pixels, max_pixels)}
    return processor(images=images or None, text=[text], return_tensors="pt", padding=True, images_kwargs=images_kwargs)


def image_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of chat messages that are images; a ValueError names a video."""
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    parts = [part for content in contents for part in content if part["type"] != "text"]
    for part in parts:
        if part["type"] != "image":
            raise ValueError(f"a part of a message is an image or a text, and this one is of type {part['type']!r}")
    return parts


def resized(part: dict[str, Any], settings: Any) -> Image.Image:
    """The image of a part of a message, at a multiple of a token's side: by Qwen's own utilities if they can be loaded.

    Without torchvision they cannot. What they would do then is done here, and comes to the same.

    Args:
        settings: the image processor, with the sides of patches.
    """
    image, limits = opened(part["image"]), {name: part[name] for name in LIMITS if name in part}
    try:
        from qwen_vl_utils import fetch_image
    except ImportError:
        if limits:
            raise ValueError(f"{', '.join(limits)} in a message is read by qwen_vl_utils, which needs torchvision: "
                             "install that, or give min_pixels and max_pixels") from None  # fmt: skip
        return resize_to_multiple(image, settings.patch_size * settings.merge_size)
    message: dict[str, Any] = {**UNLIMITED, **limits, "image": image}
    return fetch_image(message, image_patch_size=settings.patch_size)


def opened(source: ImageSource) -> Image.Image:
    """The image, as a person sees it, that a message names: PIL, path, http(s) address or data URI."""
    if isinstance(source, str) and source.startswith("data:image"):
        source = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        with urlopen(source, timeout=60) as answer:
            source = Image.open(io.BytesIO(answer.read()))
    return load_image(source.removeprefix("file://") if isinstance(source, str) else source)
