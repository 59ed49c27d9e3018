"""Maps to boxes, tiles and filters: numpy, scipy and PIL; no model in here.

Conventions: an image size is (width, height) in pixels, a box is (x1, y1, x2, y2) in pixels with x2 and y2 exclusive, a
map is (h, w) with row 0 at the top.
"""

import base64
import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage

from dataset import box_of
from dataset import box_xywh_to_xyxy as box_xywh_to_xyxy  # under its old name, which notebooks know
from images import load_image

WINDOW_RATIOS = (1, 1.2, 1.4, 1.6, 1.8, 2)
TILE_SIDE = 1024
TILE_ASPECT = 1.5
MAX_PIXELS = 256 * 28 * 28  # of an image for Qwen2.5-VL


# ---------------------------------------------------------------------------------------------------------- images
def pad_to_square(image, color):
    """The image in the middle of a square of its longer side; `color` is RGB. LLaVA-1.5's own preprocessing."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def multiple_size(size, factor):
    """(width, height) with both sides at the nearest multiple of `factor` pixels, at least one `factor` long."""
    return tuple(max(factor, round(side / factor) * factor) for side in size)


def resize_to_multiple(image, factor):
    """The image in its `multiple_size` (bicubic), as Qwen's own utilities resize it first."""
    return image.resize(multiple_size(image.size, factor), Image.Resampling.BICUBIC)


def encode_base64(image):
    """A PIL image as a base64 PNG string, as chat messages carry it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def pixel_range(processor, min_pixels=None, max_pixels=None):
    """The `size` to call a Qwen2.5-VL image processor with: its own range, but at most MAX_PIXELS, or what is given."""
    own = processor.image_processor.size
    high = min(own["longest_edge"], MAX_PIXELS) if max_pixels is None else max_pixels
    low = min(own["shortest_edge"], high) if min_pixels is None else min_pixels
    return {"shortest_edge": low, "longest_edge": max(low, high)}


def prepare_qwen2_5_input(messages, processor, min_pixels=None, max_pixels=None):
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


# ----------------------------------------------------------------------------------------------------------- boxes
def bbox_from_att_image_adaptive(att_map, image_size, bbox_size=336):
    """The crop window that stands out most from its neighbours (ViCrop, section 5: bounding box selection).

    Windows of `bbox_size` times 1 to 2 slide over the map cell by cell; each size proposes its largest sum; the size
    whose proposal exceeds its neighbours by most, per cell, wins.

    Args:
        att_map: (h, w) importance of the cells, row 0 at the top; it covers the whole image.
        image_size: (width, height) of the image in pixels.
        bbox_size: base side of the window in pixels of the image.
    Returns:
        (x1, y1, x2, y2) ints, pixels, inside the image.
    Raises:
        ValueError: the map is empty, not two-dimensional, or holds NaN or inf (says how many cells).
    """
    att_map = np.asarray(att_map, dtype=np.float64)
    if att_map.ndim != 2 or att_map.size == 0:
        raise ValueError(f"an importance map has shape (h, w) with at least one cell, not {att_map.shape}")
    broken = int(np.count_nonzero(~np.isfinite(att_map)))
    if broken:
        raise ValueError(f"{broken} of the importance map's {att_map.size} cells are NaN or inf")
    width, height = image_size
    if width < 1 or height < 1 or bbox_size <= 0:
        raise ValueError(f"image size {image_size} and bbox_size {bbox_size} must be positive")
    rows, columns = att_map.shape
    cell_w, cell_h = width / columns, height / rows
    # Sums from an integral image carry rounding noise that grows with the total; below it, two windows are equal.
    noise = 1e-12 * np.abs(att_map).sum()
    best = None
    for ratio in WINDOW_RATIOS:
        n_x = max(1, min(int(bbox_size * ratio / cell_w), columns))
        n_y = max(1, min(int(bbox_size * ratio / cell_h), rows))
        if (n_x, n_y) == (columns, rows):
            if ratio == 1:
                return 0, 0, int(width), int(height)
            continue
        sums = _window_sums(att_map, n_x, n_y)
        x, y = np.argwhere(sums.max() - noise <= sums.T)[0]  # smallest x first, then smallest y
        neighbours = [sums[j, i] for i, j in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1))
                      if 0 <= i < sums.shape[1] and 0 <= j < sums.shape[0]]  # fmt: skip
        sharpness = (sums[y, x] - np.mean(neighbours)) / (n_x * n_y)
        if best is None or sharpness > best[0] + noise:
            best = sharpness, ratio, int(x * cell_w + cell_w * n_x / 2), int(y * cell_h + cell_h * n_y / 2)
    _, ratio, x, y = best
    return square_around(x, y, bbox_size * ratio, image_size)


def _window_sums(att_map, n_x, n_y):
    """Sum of every n_y x n_x window, (h - n_y + 1, w - n_x + 1), from one integral image."""
    integral = np.pad(att_map.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return integral[n_y:, n_x:] - integral[:-n_y, n_x:] - integral[n_y:, :-n_x] + integral[:-n_y, :-n_x]


def square_around(x, y, side, image_size):
    """(x1, y1, x2, y2) ints: a square of `side` around (x, y), moved into the image, clipped where it cannot fit."""
    width, height = image_size
    half = int(side // 2)
    x, y = min(max(x, half), width - half), min(max(y, half), height - half)
    return max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half)


def bbox_in_region(att_map, region, image_size, bbox_size):
    """`bbox_from_att_image_adaptive` for a map that covers `region` (xyxy pixels), clipped to the image."""
    left, top, right, bottom = region
    x1, y1, x2, y2 = bbox_from_att_image_adaptive(att_map, (right - left, bottom - top), bbox_size)
    return clip_box((x1 + left, y1 + top, x2 + left, y2 + top), image_size)


def clip_box(box, image_size):
    """The part of a box inside the image; a box wholly outside (in padding) is first moved to the nearest edge."""
    clipped = []
    for low, high, limit in ((box[0], box[2], image_size[0]), (box[1], box[3], image_size[1])):
        if high <= 0 or low >= limit:
            shift = -low if high <= 0 else limit - high
            low, high = low + shift, high + shift
        clipped.append((int(max(0, low)), int(min(limit, high))))
    (x1, x2), (y1, y2) = clipped
    return x1, y1, x2, y2


# Boxes that no map chooses: baselines for a data record (see info.METHODS). They take windows of the sizes that the
# methods choose from, so that the comparison is one of place; only gt_crop goes beyond where its box does not fit.
def gt_crop(record, image_size, bbox_size):
    """The smallest of the methods' windows around `gt_bbox` that holds it (or the square that does)."""
    if not record.get("gt_bbox"):
        whose = f"record {record['id']!r}" if "id" in record else "a single picture"
        raise ValueError(f"gt_crop crops at the gt_bbox of a dataset's record, and {whose} has none")
    x1, y1, x2, y2 = box_of(record, image_size=image_size)
    longest = max(x2 - x1, y2 - y1)
    side = next((bbox_size * ratio for ratio in WINDOW_RATIOS if bbox_size * ratio >= longest), longest)
    return square_around(int(x1 + x2) // 2, int(y1 + y2) // 2, side, image_size)


def center_crop(record, image_size, bbox_size):
    """The base window in the middle of the image."""
    return square_around(image_size[0] // 2, image_size[1] // 2, bbox_size, image_size)


def random_crop(record, image_size, bbox_size):
    """A window of random size and place; the same one for the same record id."""
    rng = np.random.default_rng(list(str(record.get("id", "")).encode()) or 0)
    side = bbox_size * rng.choice(WINDOW_RATIOS)
    half = side / 2
    x, y = (int(rng.uniform(min(half, size / 2), max(size - half, size / 2))) for size in image_size)
    return square_around(x, y, side, image_size)


# ---------------------------------------------------------------------------------------------------- high resolution
def high_res_split_threshold(image, res_threshold=TILE_SIDE):
    """Cut an image into a grid of equal tiles (ViCrop, section 5: high-resolution inputs).

    No overlap, no padding; tiles are at most `res_threshold` px on a side and at most 1.5 times as long as wide.
    Returns:
        (tiles, vertical_split, horizontal_split): PIL images row by row, number of rows, number of columns.
    """
    width, height = image.size
    columns, rows = math.ceil(width / res_threshold), math.ceil(height / res_threshold)
    while max(width / columns, height / rows) > TILE_ASPECT * min(width / columns, height / rows):
        if width / columns > height / rows:
            columns += 1
        else:
            rows += 1
    xs = [round(column * width / columns) for column in range(columns + 1)]
    ys = [round(row * height / rows) for row in range(rows + 1)]
    tiles = [image.crop((xs[i], ys[j], xs[i + 1], ys[j + 1])) for j in range(rows) for i in range(columns)]
    return tiles, rows, columns


def same_size(tiles, square=False):
    """Tiles (PIL) resized to one common size, so that their maps fit together; `square` for centre-cropping models."""
    size = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    if square:
        size = (max(size), max(size))
    return [tile if tile.size == size else tile.resize(size, Image.Resampling.BICUBIC) for tile in tiles]


def join_maps(maps, rows, columns):
    """(rows * h, columns * w) float32 from rows * columns maps (h, w), given row by row."""
    maps = np.stack(list(maps)).astype(np.float32)  # (tiles, h, w)
    h, w = maps.shape[1:]
    return maps.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)


def high_res(map_func, image, prompt, general_prompt, model, processor, *, geometry="exact", **options):
    """An importance map of the whole image made of one map per tile.

    Args:
        map_func: any `(image, prompt, general_prompt, model, processor) -> (h, w)`, e.g. `rel_attention_llava`. Ours
            take all tiles through the model together; any other function is called tile by tile.
        image: PIL image of any size.
        geometry: "exact" stretches tiles to squares where the processor would crop their centre; "upstream" does not.
        options: further keywords for map_func (`layer=`, ...).
    Returns:
        (rows * h, columns * w) float32 array that covers the image.
    """
    rest = (prompt, general_prompt, model, processor)
    if hasattr(map_func, "high_res"):  # a maps.MapFunction
        return map_func.high_res(load_image(image), *rest, geometry=geometry, **options)
    tiles, rows, columns = high_res_split_threshold(load_image(image))
    cuts = getattr(getattr(processor, "image_processor", None), "do_center_crop", False)
    tiles = same_size(tiles, square=geometry == "exact" and bool(cuts))
    return join_maps([map_func(tile, *rest, **options) for tile in tiles], rows, columns)


# --------------------------------------------------------------------------------------------------------- filters
def edge_strength(pixels, km=7, kh=3):
    """How much fine structure there is around each pixel.

    Args:
        pixels: (H, W, 3) float array.
        km: side of the median filter; kh: side of the Gaussian whose blur is subtracted.
    Returns:
        (H, W) float array.
    """
    sigma = 0.3 * ((kh - 1) * 0.5 - 1) + 0.8
    offsets = np.arange(kh) - (kh - 1) / 2
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    blurred = pixels
    for axis in (0, 1):
        blurred = ndimage.correlate1d(blurred, kernel, axis=axis, mode="mirror")
    return ndimage.median_filter(np.linalg.norm(pixels - blurred, axis=-1), size=km)


def edge_mask(pixels, km=7, kh=3):
    """(H, W) bool: pixels whose `edge_strength` is above the median of the whole image."""
    strength = edge_strength(pixels, km, kh)
    return strength > np.median(strength)


def high_pass_filter(image, resolution, km=7, kh=3, reduce=True):
    """The high-frequency content of an image (ViCrop, section 4, for pure gradients).

    Args:
        image: PIL image; it is squashed to `resolution` (bilinear), an int or (height, width) in pixels.
        km, kh: sides of the median filter and of the Gaussian kernel.
        reduce: sum over blocks of 14 x 14 pixels.
    Returns:
        float32 (height, width), or (height // 14, width // 14) if reduced.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    squashed = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    strength = edge_strength(np.asarray(squashed, dtype=np.float64) / 255, km, kh)
    if reduce:
        h, w = height // 14, width // 14
        strength = strength[: h * 14, : w * 14].reshape(h, 14, w, 14).sum((1, 3))
    return strength.astype(np.float32)
