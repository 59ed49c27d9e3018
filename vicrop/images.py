"""Image files as a person sees them: upright, RGB, 8 bits, transparency over white. No model in here."""

import hashlib
import io
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # tags
WHITE_IS_ZERO = 0
# EXIF orientation -> what turns the image upright
UPRIGHT: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
LYING = (5, 6, 7, 8)  # orientations that exchange width and height
WHITES = {"I;12": 4095, "I;16S": 32767, "I;16BS": 32767}  # how samples are stored -> which value is white
ImageSource = str | Path | Image.Image  # what `load_image` takes
MOST_PIXELS = 2 * 89_478_485  # where Pillow, by itself, refuses a picture whatever a program says to its warning


# ------------------------------------------------------------------------------------------------------------ the door
def load_image(source: ImageSource) -> Image.Image:
    """An image as a person sees it: upright RGB.

    The orientation is applied, transparency is laid over white, other depths are scaled to 8 bits (16 bits, floats from
    0 to 1, ...), CMYK and palettes are converted.

    Args:
        source: path or PIL image, also one that was opened and not yet loaded.
    Raises:
        FileNotFoundError, ValueError: the file does not exist, is no readable image, or has more pixels than
            PIL.Image.MAX_IMAGE_PIXELS (None: any number); the sentence names it.
    """
    if isinstance(source, Image.Image):
        return _as_seen(source)
    if not Path(source).is_file():
        raise FileNotFoundError(f"no image file at {source}")
    try:
        with _opened(source) as image:
            refuse_too_many_pixels(source, image.width * image.height)
            return _as_seen(image)
    except TooManyPixels:
        raise
    except Exception as error:  # a broken file may raise anything in a decoder
        raise ValueError(f"cannot read {source} as an image: {error}") from error


def size_as_seen(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image file as a person sees it, however many pixels it has; the pixels are not read.

    Raises:
        OSError, ValueError: it is no image.
    """
    with _opened(path) as image:
        turned = _orientation(image) in LYING
        already = getattr(image, "tag_v2", {}).get(ORIENTATION) in LYING  # Pillow says the size of a TIFF upright
        return (image.height, image.width) if turned and not already else image.size


class TooManyPixels(ValueError):
    """An image file has more pixels than may be opened."""


def refuse_too_many_pixels(path: str | Path, pixels: int) -> None:
    """TooManyPixels, naming the file, if it has more pixels than PIL.Image.MAX_IMAGE_PIXELS."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise TooManyPixels(f"{path} is refused: it has {pixels} pixels, more than {limit}; --max_image_pixels (in "
                            f"localization data.max_image_pixels) allows up to {MOST_PIXELS}")  # fmt: skip


def refuse_bad_limit(number: int | None) -> None:
    """ValueError unless images may be opened up to so many pixels; None leaves it as it is."""
    if number is not None and (type(number) is not int or not 1 <= number <= MOST_PIXELS):
        raise ValueError(f"max_image_pixels must be 1 to {MOST_PIXELS}, got {number}")


def allow_pixels(number: int | None) -> None:
    """Open images of up to so many pixels from now on; raises as `refuse_bad_limit`."""
    refuse_bad_limit(number)
    if number is not None:
        Image.MAX_IMAGE_PIXELS = number


@contextmanager
def _opened(path):
    """A PIL image of a file; Pillow does not warn of its size, and what it would not open at all is TooManyPixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(path)
        except Image.DecompressionBombError as error:
            refuse_too_many_pixels(path, int(re.findall(r"\d+", str(error))[0]))
            raise
        with image:
            yield image


# --------------------------------------------------------------------------------------------------------- what is seen
def _as_seen(image):
    stored = _stored_as(image)  # asked first: an image that is loaded no longer knows
    low_bytes = _low_bytes(image, stored)
    _load(image)  # before its orientation is asked for: Pillow turns a TIFF while it loads
    clear = _clear_pixels(image, stored, low_bytes)
    turn = UPRIGHT.get(_orientation(image))
    seen = _eight_bits(image, stored)
    if clear is not None:
        seen = seen.convert("RGB")
        seen.paste((255, 255, 255), mask=Image.fromarray(clear))
    elif seen.has_transparency_data:
        seen = (seen.convert("LA") if seen.mode == "La" else seen).convert("RGBA")
        seen = Image.alpha_composite(Image.new("RGBA", seen.size, (255, 255, 255, 255)), seen)
    seen = seen.convert("RGB") if turn is None else seen.convert("RGB").transpose(turn)
    seen.info.clear()  # its orientation tag would turn it once more, were it loaded again
    return seen


def _load(image):
    """Image.load, but never by Pillow's memory map, which reads the rows of a TIFF that lies as if it were upright."""
    name = getattr(image, "filename", "")
    if name and image.format == "TIFF":
        image.filename = ""  # without a name it is read, not mapped
    if getattr(image, "tile", None):  # an image that is loaded, or made in memory, has none
        image.tile = list(map(_in_native_order, image.tile))
    try:
        image.load()
    except KeyError:  # of a broken tag, which Pillow below 13 looks at when the pixels are there
        image.load()
    finally:
        if name:
            image.filename = name


def _in_native_order(tile):
    """A tile of a compressed TIFF of big-endian floats or integers as libtiff decodes it: in this machine's order.

    Pillow does so for unsigned samples of 16 bits only, and turns the bytes of all others once more.
    """
    if tile[0] != "libtiff" or not isinstance(tile[3], tuple):
        return tile
    native = re.sub(r"^([IF];\d+)B([SF]?)$", r"\1N\2", tile[3][0])
    return tile._replace(args=(native, *tile[3][1:]))


def _orientation(image):
    """The number that says how to turn an image; None if it has none, or one that cannot be read."""
    try:
        return image.getexif().get(ORIENTATION)  # not ImageOps.exif_transpose: it trips over other, broken tags
    except Exception:  # of broken tags Pillow raises whatever comes; the picture is fine without them
        return None


def _stored_as(image):
    """Pillow's name of how an image's samples are stored in its file ("L;4", "I;16BS"); "" once it is loaded."""
    tiles = getattr(image, "tile", None)
    how = tiles[0][3] if tiles else ""
    how = how if isinstance(how, str) or not how else how[0]
    return how if isinstance(how, str) else ""


# ------------------------------------------------------------------------------------------------------------- depths
def _eight_bits(image, stored):
    """The image with its values as 0 to 255, if it is of a mode that has others; else as it is."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image, dtype=np.float64)
    if stored.startswith("I;32N"):  # unsigned, which Pillow takes for signed
        values = values % 2**32
    white = _white(image, stored, values)
    values = np.nan_to_num(values, nan=0, posinf=white, neginf=0)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    return Image.fromarray((values / (white / 255)).clip(0, 255).round().astype(np.uint8))


def _white(image, stored, values):
    """The value that is white. Where nothing tells the depth, the largest value does: 1, 255, or 16 bits.

    A float picture may be brighter than white, as resizing makes it: up to 16 it is still one whose white is 1.
    """
    if stored in WHITES:
        return WHITES[stored]
    if image.mode.startswith("I;16") or image.format == "PPM" and image.mode == "I":
        return 65535
    largest = values.max(initial=0, where=np.isfinite(values))
    if image.mode == "F" and largest <= 512:
        return 1 if largest <= 16 else 255
    if largest <= 255:
        return 255
    if largest > 65535 and stored.startswith("I;32"):
        return 2**32 - 1 if stored == "I;32N" else 2**31 - 1
    return 65535


# ------------------------------------------------------------------------------------------------------- transparency
def _clear_pixels(image, stored, low_bytes):
    """(h, w) bool: pixels of the one grey or colour that is transparent (tRNS); None where Pillow knows it better."""
    key = image.info.get("transparency")
    if isinstance(key, int) and (image.mode in ("1", "L") or image.mode.startswith("I;16")):
        # Pillow scales the pixels of 1, 2 and 4 bits and not the number.
        scale = {"1": 1, "L;2": 85, "L;4": 17}.get(stored, 1)
        return np.asarray(image) == (key != 0 if image.mode == "1" else key * scale)
    if isinstance(key, tuple) and image.mode == "RGB":
        pixels = np.asarray(image).astype(int)
        if stored == "RGB;16B":  # Pillow keeps the high bytes of the pixels, and both of the number
            pixels = 256 * pixels + low_bytes
        return (pixels == key).all(-1)
    return None


def _low_bytes(image, stored):
    """(h, w, 3) the lower bytes of a picture of 16 bits per colour, if one colour of it is transparent; else None."""
    if stored != "RGB;16B" or "transparency" not in image.info:
        return None
    file = image.fp
    place = file.tell()
    file.seek(0)
    twin = Image.open(io.BytesIO(file.read()))
    file.seek(place)
    twin.tile = [tile._replace(args="RGB;16L") for tile in twin.tile]  # as if the other byte came first
    return np.asarray(twin.convert("RGB")).astype(int)


def name_of_content(content: bytes) -> str:
    """A file name for the bytes of an image: of their hash, with the ending of their format.

    Raises:
        OSError, TooManyPixels: they are no image, or one that Pillow does not open at all.
    """
    with _opened(io.BytesIO(content)) as image:
        kind = image.format or "png"
    return f"{hashlib.sha256(content).hexdigest()[:16]}.{kind.lower()}"


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side; `color` is RGB. LLaVA-1.5's own preprocessing."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
