"""Where an image has fine structure: the filter that pure_grad's maps go through (ViCrop, section 4)."""

import numpy as np
from PIL import Image
from scipy import ndimage


def edge_strength(pixels: np.ndarray, km: int = 7, kh: int = 3) -> np.ndarray:
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


def edge_mask(pixels: np.ndarray, km: int = 7, kh: int = 3) -> np.ndarray:
    """(H, W) bool: pixels whose `edge_strength` is above the median of the whole image."""
    strength = edge_strength(pixels, km, kh)
    return strength > np.median(strength)


def high_pass_filter(
    image: Image.Image, resolution: int | tuple[int, ...], km: int = 7, kh: int = 3, reduce: bool = True
) -> np.ndarray:
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
