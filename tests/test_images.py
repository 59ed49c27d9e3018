"""Pictures in every format are read as a person sees them: upright, with white where it is white, and not too large."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from builders import photo
from PIL import Image, features

from vicrop import images
from vicrop.images import load_image, size_as_seen

TURNS = {1: None, **images.UPRIGHT}
BACK = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}
PICTURE = photo(24, 16)


def lying(image, orientation):
    """An image as a file with that orientation stores it."""
    turn = TURNS[orientation]
    return image if turn is None else image.transpose(BACK.get(turn, turn))


def exif(orientation):
    tags = Image.Exif()
    tags[images.ORIENTATION] = orientation
    return tags


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(path, size, bits, kind, rows, before=(), after=()):
    """A PNG by hand: `rows` are bytes; before and after are further chunks, (name, content), around the pixels."""
    header = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, *after, (b"IEND", b"")]))
    return path


def tiff(path, size, bits, content, photometric=1, sample_format=1, order="<", more=()):
    """A grey TIFF by hand, in one strip; `more` are further tags: (number, value)."""
    tags = dict([(256, size[0]), (257, size[1]), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1),
                 (278, size[1]), (279, len(content)), (339, sample_format), *more])  # fmt: skip
    tags = {number: value for number, value in sorted(tags.items()) if value is not None}
    entries = b"".join(struct.pack(f"{order}HHII", number, 4, 1, value) for number, value in tags.items())
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    body = struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0"
    path.write_bytes(magic + struct.pack(f"{order}I", 8 + len(content) + len(content) % 2) + content
                     + b"\0" * (len(content) % 2) + body)  # fmt: skip
    return path


def grey(path):
    """The grey levels of a picture, row by row."""
    pixels = np.asarray(load_image(path))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


# --------------------------------------------------------------------------------------------------------- orientation
SAVED = {"jpg": {"quality": 100, "subsampling": 0}, "png": {}, "webp": {"lossless": True}, "tif": {},
         "mpo": {"quality": 100, "subsampling": 0}}  # fmt: skip
if features.check("avif"):
    SAVED["avif"] = {"quality": 100, "subsampling": "4:4:4"}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", SAVED)
def test_a_picture_is_turned_once_in_every_format(tmp_path, ending, orientation):
    path = tmp_path / f"x.{ending}"
    smooth = PICTURE.resize((96, 64), Image.Resampling.BICUBIC)
    lying(smooth, orientation).save(path, exif=exif(orientation), **SAVED[ending])
    near = 0 if ending in ("png", "webp", "tif") else 40
    with Image.open(path) as lazy:
        for seen in (load_image(path), load_image(load_image(path)), load_image(lazy)):
            assert seen.size == smooth.size
            assert np.abs(np.asarray(seen, int) - np.asarray(smooth, int)).max() <= near
    with Image.open(path) as loaded:
        loaded.load()
        assert np.array_equal(np.asarray(load_image(loaded)), np.asarray(load_image(path)))
    assert size_as_seen(path) == smooth.size


@pytest.mark.parametrize("orientation", [2, 5, 6, 8])
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_tiff_is_turned_once(tmp_path, compression, orientation):
    lying(PICTURE, orientation).save(tmp_path / "x.tif", compression=compression, tiffinfo={274: orientation})
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.tif")), np.asarray(PICTURE))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "I;16", "F"])
def test_a_tiff_that_lies_is_turned_once_in_every_mode(tmp_path, mode, orientation):
    grey = np.asarray(PICTURE.convert("L"))
    deep = {"I;16": Image.fromarray(grey.astype(np.uint16) * 257), "F": Image.fromarray(grey.astype(np.float32))}
    image = deep[mode] if mode in deep else PICTURE.convert(mode)
    lying(image, orientation).save(tmp_path / "x.tif", tiffinfo={274: orientation})
    with Image.open(tmp_path / "x.tif") as lazy:
        for seen in (load_image(tmp_path / "x.tif"), load_image(lazy)):
            assert np.array_equal(np.asarray(seen), np.asarray(load_image(image)))


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_a_tiff_of_tiles_is_turned_once(tmp_path, orientation):
    level = np.asarray(PICTURE.resize((16, 32)).convert("L"))
    stored = np.asarray(lying(Image.fromarray(level), orientation))
    height, width = stored.shape
    full = np.zeros((32, 32), np.uint8)  # one tile, larger than the picture
    full[:height, :width] = stored
    tiles = [(322, 32), (323, 32), (324, 8), (325, 1024), (273, None), (278, None), (279, None), (274, orientation)]
    path = tiff(tmp_path / "x.tif", (width, height), 8, full.tobytes(), more=tiles)
    assert grey(path) == level.tolist()
    assert size_as_seen(path) == (16, 32)


@pytest.mark.parametrize("orientation", [4, 6, 8])
def test_an_orientation_behind_the_pixels_of_a_png_counts(tmp_path, orientation):
    level = np.asarray(PICTURE.convert("L"))
    stored = np.asarray(lying(Image.fromarray(level), orientation))
    tags = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    rows = [row.tobytes() for row in stored]
    path = png(tmp_path / "x.png", stored.shape[::-1], 8, 0, rows, after=[(b"eXIf", tags)])
    assert grey(path) == level.tolist()
    assert size_as_seen(path) == PICTURE.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("broken", [b"Exif\0\0no tags at all", b"Exif\0\0MM\0*\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_a_broken_tag_costs_no_picture(tmp_path, ending, broken):
    PICTURE.save(tmp_path / f"x.{ending}", exif=broken)
    assert load_image(tmp_path / f"x.{ending}").size == size_as_seen(tmp_path / f"x.{ending}") == PICTURE.size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("tag", [34665, 34853, 40965])  # where more tags should be, and are not
def test_a_broken_tag_costs_no_tiff(tmp_path, tag):
    level = np.asarray(PICTURE.convert("L"))
    path = tiff(tmp_path / "x.tif", PICTURE.size, 8, level.tobytes(), more=[(tag, 999_999)])
    assert grey(path) == level.tolist()


# -------------------------------------------------------------------------------------------------------------- depths
def test_floats_up_to_one_are_shares_of_white(tmp_path):
    for top, white in ((1.0, 255), (0.5, 128), (0.2, 51)):
        Image.fromarray(np.array([[0, top / 2, top]], np.float32)).save(tmp_path / "x.tif")
        assert grey(tmp_path / "x.tif")[0][::2] == [0, white]
    values = np.array([[0.25, 1, np.nan, np.inf, -np.inf, -3]], np.float32)
    assert grey(Image.fromarray(values)) == [[64, 255, 0, 255, 0, 0]]
    (tmp_path / "x.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + np.array([0.5, 1], "<f4").tobytes())
    assert grey(tmp_path / "x.pfm") == [[128, 255]]


def test_floats_that_overshoot_white_a_little_are_white_there(tmp_path):
    for values in ([0, 0.5, 1, 1.04], [0, 127.5, 255, 262]):
        assert grey(Image.fromarray(np.array([values], np.float32))) == [[0, 128, 255, 255]]
    edge = Image.fromarray(np.repeat(np.float32([[0, 1]]), 20, 1)).resize((80, 4), Image.Resampling.LANCZOS)
    assert np.asarray(edge).max() > 1
    assert np.asarray(load_image(edge)).max() == 255
    assert grey(Image.fromarray(np.array([[0, 25700, 65535]], np.float32))) == [[0, 100, 255]]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "bits", "sample_format", "values", "levels"),
    [
        ("f4", 32, 3, [0, 0.5, 1], [0, 128, 255]),
        ("i4", 32, 2, [0, 7, 255], [0, 7, 255]),
        ("i2", 16, 2, [0, 16384, 32767], [0, 128, 255]),
        ("u2", 16, 1, [0, 25700, 65535], [0, 100, 255]),
    ],
)
def test_a_compressed_tiff_is_read_in_either_order(tmp_path, order, kind, bits, sample_format, values, levels):
    content = np.array(values, order + kind).tobytes()
    for deflate in (False, True):
        more = {"more": [(259, 8)]} if deflate else {}
        packed = zlib.compress(content) if deflate else content
        path = tiff(tmp_path / "x.tif", (3, 1), bits, packed, sample_format=sample_format, order=order, **more)
        assert grey(path) == [levels]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_in_memory_are_bytes_up_to_255_and_16_bits_beyond(kind):
    assert grey(Image.fromarray(np.array([[0, 7, 255]], kind))) == [[0, 7, 255]]
    assert grey(Image.fromarray(np.array([[-5, 257, 25700, 65535]], kind))) == [[0, 1, 100, 255]]


@pytest.mark.parametrize(
    ("most", "levels"), [(65535, [0, 1, 1, 255]), (1023, [0, 50, 64, 255]), (4095, [0, 12, 16, 255])]
)
def test_a_grey_map_of_16_bits_is_one_though_all_is_dark(tmp_path, most, levels):
    values = np.array([0, 200, 256, most], ">u2")
    header = b"P5\n4 1\n%d\n" % most
    (tmp_path / "x.pgm").write_bytes(header + values.tobytes())
    assert grey(tmp_path / "x.pgm") == [levels]
    (tmp_path / "dark.pgm").write_bytes(b"P5\n3 1\n%d\n" % most + values[:3].tobytes())
    assert grey(tmp_path / "dark.pgm") == [levels[:3]]
    (tmp_path / "plain.pgm").write_text(f"P2\n3 1\n{most}\n0 200 256\n")
    assert grey(tmp_path / "plain.pgm") == [levels[:3]]


@pytest.mark.parametrize("order", "<>")
def test_signed_numbers_of_a_file_are_white_at_their_largest(tmp_path, order):
    values = np.array([-9, 0, 257, 16384, 32767], f"{order}i2")
    path = tiff(tmp_path / "x.tif", (5, 1), 16, values.tobytes(), sample_format=2, order=order)
    assert grey(path) == [[0, 0, 2, 128, 255]]
    dark = tiff(
        tmp_path / "dark.tif", (5, 1), 16, (values // 200).astype(values.dtype).tobytes(), sample_format=2, order=order
    )
    assert grey(dark) == [[0, 0, 0, 1, 1]]
    values = np.array([-9, 0, 2**30, 2**31 - 1], f"{order}i4")
    path = tiff(tmp_path / "y.tif", (4, 1), 32, values.tobytes(), sample_format=2, order=order)
    assert grey(path) == [[0, 0, 128, 255]]
    small = np.array([0, 9, 255], f"{order}i4")  # 32 bits are what a program has, not how deep a picture is
    assert grey(tiff(tmp_path / "z.tif", (3, 1), 32, small.tobytes(), sample_format=2, order=order)) == [[0, 9, 255]]


def test_unsigned_numbers_of_32_bits_and_samples_of_12_are_white_at_their_largest(tmp_path):
    values = np.array([0, 2**31, 2**32 - 1], "<u4")
    assert grey(tiff(tmp_path / "x.tif", (3, 1), 32, values.tobytes())) == [[0, 128, 255]]
    assert grey(tiff(tmp_path / "y.tif", (4, 1), 12, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10]))) == [[0, 128, 255, 1]]


@pytest.mark.parametrize(
    ("bits", "values", "levels"),
    [
        (8, np.array([0, 55, 255], np.uint8), [255, 200, 0]),
        (16, np.array([0, 257 * 55, 65535], "<u2"), [255, 200, 0]),
        (16, np.array([0, 9, 100], "<u2"), [255, 255, 255]),
        (1, np.array([0b01000000], np.uint8), [255, 0, 255]),
        (4, np.array([0x0F, 0x30], np.uint8), [255, 0, 204]),
    ],
)  # fmt: skip
def test_where_white_is_zero_it_is(tmp_path, bits, values, levels):
    assert grey(tiff(tmp_path / "x.tif", (3, 1), bits, values.tobytes(), photometric=0)) == [levels]


# -------------------------------------------------------------------------------------------------------- transparency
@pytest.mark.parametrize(
    ("bits", "row", "clear", "levels"),
    [
        (1, bytes([0b01100000]), 0, [255, 255, 255, 255]),
        (1, bytes([0b01100000]), 1, [0, 255, 255, 0]),
        (2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        (4, bytes([0x03, 0x5F]), 3, [0, 255, 85, 255]),
        (8, bytes([0, 3, 51, 255]), 3, [0, 255, 51, 255]),
        (16, struct.pack(">4H", 0, 257, 258, 65535), 257, [0, 255, 1, 255]),
    ],
)
def test_a_transparent_grey_is_white_in_every_depth(tmp_path, bits, row, clear, levels):
    path = png(tmp_path / "x.png", (4, 1), bits, 0, [row], before=[(b"tRNS", struct.pack(">H", clear))])
    assert grey(path) == [levels]
    with Image.open(path) as lazy:
        assert grey(lazy) == [levels]


@pytest.mark.parametrize("from_file", [True, False])
def test_a_transparent_colour_is_white_and_its_neighbours_are_not(tmp_path, from_file):
    red, near = (0x8010, 0x2020, 0x3030), (0x8011, 0x2020, 0x3030)
    rows = [struct.pack(">6H", *red, *near), struct.pack(">6H", *near, 65535, 65535, 65535)]
    path = png(tmp_path / "x.png", (2, 2), 16, 2, rows, before=[(b"tRNS", struct.pack(">3H", *red))])
    with Image.open(path) as lazy:
        seen = np.asarray(load_image(path if from_file else lazy)).tolist()
    shown = [0x80, 0x20, 0x30]
    assert seen == [[[255] * 3, shown], [shown, [255] * 3]]
    rows = [bytes([9, 8, 7, 9, 8, 6])]
    path = png(tmp_path / "y.png", (2, 1), 8, 2, rows, before=[(b"tRNS", struct.pack(">3H", 9, 8, 7))])
    assert np.asarray(load_image(path)).tolist() == [[[255] * 3, [9, 8, 6]]]


@pytest.mark.parametrize("alphas", [bytes([255, 0, 255]), bytes([255, 0]), bytes([255, 0, 128])])
def test_a_transparent_colour_of_a_palette_is_white(tmp_path, alphas):
    palette = [(b"PLTE", bytes([1, 1, 1, 2, 2, 2, 3, 3, 3])), (b"tRNS", alphas)]
    path = png(tmp_path / "x.png", (3, 1), 2, 3, [bytes([0b00011000])], before=palette)
    assert grey(path) == [[1, 255, 3 if alphas != bytes([255, 0, 128]) else 129]]


@pytest.mark.parametrize(
    ("mode", "pixel", "level"), [("LA", (100, 0), 255), ("La", (50, 128), 177), ("PA", (0, 0), 255)]
)
def test_other_modes_with_transparency_are_laid_over_white(mode, pixel, level):
    assert grey(Image.new(mode, (1, 1), pixel))[0][0] == pytest.approx(level, abs=1)


# ---------------------------------------------------------------------------------------------------------- large ones
def test_too_large_a_picture_is_refused_by_name_and_the_way_to_open_it_is_said(tmp_path, monkeypatch):
    path = tmp_path / "wide.png"
    photo(40, 30).save(path)
    for limit in (1199, 599, 1):  # the last two are those that Pillow itself refuses
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=rf"wide.png is refused: it has 1200 pixels.*{limit}; --max_image_pixels"):
            load_image(path)
    for limit in (1200, None):
        monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", limit)
        assert load_image(path).size == (40, 30)


def test_the_size_of_a_large_picture_is_read_without_a_warning(tmp_path, monkeypatch):
    photo(40, 30).save(tmp_path / "x.jpg")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert size_as_seen(tmp_path / "x.jpg") == (40, 30)


@pytest.mark.parametrize("number", [0, -1, 178956971, 1.5, "many", True])
def test_a_limit_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match=f"must be 1 to 178956970, got {number}"):
        images.allow_pixels(number)


def test_a_limit_holds_from_then_on(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 5)
    images.allow_pixels(None)
    assert Image.MAX_IMAGE_PIXELS == 5
    images.allow_pixels(178956970)
    assert Image.MAX_IMAGE_PIXELS == 178956970
