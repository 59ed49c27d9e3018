"""Maps to boxes to crops: the integral image equals nested loops, and no size is too strange."""

import numpy as np
import pytest
from builders import photo
from PIL import Image, ImageOps

import utils
from benchmarks.boxes import nested_loops
from vicrop.boxes import bbox_from_att_image_adaptive, bbox_in_region
from vicrop.images import load_image
from vicrop.tiles import high_res, high_res_split_threshold


# ------------------------------------------------------------------------------------------------------------- boxes
@pytest.mark.parametrize("shape", [(24, 24), (16, 16), (9, 31), (1, 20), (20, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("size", [(640, 480), (1, 1), (5000, 300), (600, 2000), (336, 336), (100, 90), (2, 900)])
def test_box_equals_nested_loops(shape, size):
    rng = np.random.default_rng(hash((shape, size)) % 2**32)
    for bbox_size in (336, 224, 112, 30):
        att_map = rng.random(shape) ** 4
        assert bbox_from_att_image_adaptive(att_map, size, bbox_size) == nested_loops(att_map, size, bbox_size)


@pytest.mark.parametrize("centre", [(80, 90), (700, 500), (1150, 850), (20, 880)])
def test_a_planted_blob_ends_in_the_box(centre):
    x, y = np.meshgrid((np.arange(24) + 0.5) * 1200 / 24, (np.arange(18) + 0.5) * 900 / 18)
    att_map = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / 2 / 60**2)
    x1, y1, x2, y2 = bbox_from_att_image_adaptive(att_map, (1200, 900), 336)
    assert x1 <= centre[0] <= x2
    assert y1 <= centre[1] <= y2
    assert 336 <= x2 - x1 == y2 - y1 <= 672


@pytest.mark.parametrize("level", [1, 0.1, 1e-9, 0])
def test_ties_go_to_the_smallest_x_then_y_and_the_first_size(level):
    box = bbox_from_att_image_adaptive(np.full((24, 24), level), (1000, 800), 200)
    assert box == (0, 0, 200, 200)
    assert all(type(side) is int for side in box)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_refused(bad):
    att_map = np.ones((4, 4))
    att_map[1, 1:3] = bad
    with pytest.raises(ValueError, match="2 of the importance map's 16 cells"):
        bbox_from_att_image_adaptive(att_map, (100, 100))


@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_a_map_without_two_dimensions_is_refused(shape):
    with pytest.raises(ValueError, match="at least one cell"):
        bbox_from_att_image_adaptive(np.ones(shape), (100, 100))


def test_a_box_in_a_region_is_shifted_and_clipped():
    att_map = np.zeros((24, 24))
    att_map[2, 3] = 1
    whole = bbox_from_att_image_adaptive(att_map, (480, 480), 112)
    found = bbox_in_region(att_map, (80, 0, 560, 480), (640, 480), 112)
    assert found == (whole[0] + 80, whole[1], whole[2] + 80, whole[3])
    # A padded image: the map's top row lies above the image, and a box there is brought back to it.
    x1, y1, x2, y2 = bbox_in_region(att_map, (0, -300, 1000, 700), (1000, 400), 112)
    assert 0 <= x1 < x2 <= 1000
    assert 0 <= y1 < y2 <= 400


def test_baseline_boxes():
    size, record = (1000, 800), {"id": "a", "gt_bbox": [900, 10, 960, 90]}
    assert utils.center_crop(record, size, 112) == (444, 344, 556, 456)
    x1, y1, x2, y2 = utils.gt_crop(record, size, 112)
    assert x1 <= 900
    assert y1 <= 10
    assert x2 >= 960
    assert y2 >= 90
    assert utils.random_crop(record, size, 112) == utils.random_crop(record, size, 112)
    others = {utils.random_crop({"id": number}, size, 112) for number in range(50)}
    assert len(others) > 45
    assert all(0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 800 for x1, y1, x2, y2 in others)
    with pytest.raises(ValueError, match="record 'a' has none"):
        utils.gt_crop({"id": "a"}, size, 112)


# ------------------------------------------------------------------------------------------------------------- tiles
SIZES = [(600, 2000), (480, 640), (5000, 300), (1, 1), (1024, 1024), (1025, 1024), (3000, 3000), (7, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_cover_the_image_once(size):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    tiles, rows, columns = high_res_split_threshold(Image.fromarray(pixels))
    assert len(tiles) == rows * columns
    lines = [np.concatenate([np.asarray(t) for t in tiles[r * columns : (r + 1) * columns]], 1) for r in range(rows)]
    assert np.array_equal(np.concatenate(lines), pixels)
    width, height = size[0] / columns, size[1] / rows
    assert max(width, height) <= 1024
    assert max(width, height) <= 1.5 * min(width, height)


@pytest.mark.parametrize("size", SIZES)
def test_maps_of_tiles_join_to_a_map_of_the_image(size):
    """A stand-in that maps brightness: joined tile maps must find the bright spot of the whole image."""
    width, height = size
    spot = (width * 4 // 5, height // 5)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (spot[0], spot[1], spot[0] + max(1, width // 30), spot[1] + max(1, height // 30)))

    def brightness(tile, *_):
        return np.asarray(tile.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=np.float32)

    att_map = high_res(brightness, image, "", "", None, None)
    assert att_map.dtype == np.float32
    y, x = np.unravel_index(att_map.argmax(), att_map.shape)
    assert abs((x + 0.5) * width / att_map.shape[1] - spot[0]) <= max(2, width / 8)
    assert abs((y + 0.5) * height / att_map.shape[0] - spot[1]) <= max(2, height / 8)


# ------------------------------------------------------------------------------------------------------------ filters
def test_high_pass_filter_finds_the_edge():
    image = Image.new("RGB", (300, 200), (20, 20, 20))
    image.paste((240, 240, 240), (150, 0, 300, 200))
    strength = utils.high_pass_filter(image, 112, reduce=False)
    assert strength.shape == (112, 112)
    assert strength[:, 54:58].min() > 0
    assert max(strength[:, :40].max(), strength[:, 72:].max()) < 1e-9
    blocks = utils.high_pass_filter(image, 112)
    np.testing.assert_allclose(blocks, strength.reshape(8, 14, 8, 14).sum((1, 3)), rtol=1e-5)


def test_edge_mask_keeps_at_most_half_and_survives_a_flat_image():
    pixels = np.random.default_rng(0).random((56, 42, 3))
    assert 0.3 < utils.edge_mask(pixels).mean() <= 0.5
    assert not utils.edge_mask(np.ones((56, 42, 3))).any()


# ------------------------------------------------------------------------------------------------------------- images
def stored(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return utils.load_image(tmp_path / name)


def test_images_are_read_as_a_person_sees_them(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (20, 1))
    rgb = Image.fromarray(np.stack([ramp, ramp[:, ::-1], ramp // 2], -1))
    near = lambda a, b, by: np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= by  # noqa: E731
    assert near(stored(tmp_path, rgb, "rgb.png"), rgb, 0)
    assert near(stored(tmp_path, rgb.convert("L"), "l.png"), rgb.convert("L").convert("RGB"), 0)
    assert near(stored(tmp_path, rgb.quantize(256), "p.png"), rgb, 40)
    assert near(stored(tmp_path, rgb.convert("CMYK"), "cmyk.tif"), rgb, 2)
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    assert near(stored(tmp_path, deep, "deep.png"), Image.fromarray(ramp).convert("RGB"), 1)
    dark = np.asarray(stored(tmp_path, Image.fromarray(np.full((9, 9), 200, np.uint16)), "dark.png"))
    assert dark.max() <= 1  # 200 of 65535 is black
    glass = rgb.copy()
    glass.putalpha(Image.fromarray(np.where(np.arange(40) < 20, 255, 0).astype(np.uint8)[None].repeat(20, 0)))
    seen = np.asarray(stored(tmp_path, glass, "rgba.png"))
    assert np.array_equal(seen[:, :20], np.asarray(rgb)[:, :20])
    assert (seen[:, 20:] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated by 90 degrees clockwise
    turned = stored(tmp_path, rgb, "turned.png", exif=exif)
    assert near(turned, rgb.transpose(Image.Transpose.ROTATE_270), 0)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    cut = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    for name in ("text.jpg", "cut.png"):
        with pytest.raises(ValueError, match=name):
            utils.load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        utils.load_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_whatever_else_its_exif_holds(tmp_path, orientation):
    image = photo(20, 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "plain.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "plain.png"))
    assert np.array_equal(np.asarray(load_image(tmp_path / "plain.png")), np.asarray(upright.convert("RGB")))
    again = load_image(load_image(load_image(tmp_path / "plain.png")))  # what is upright stays so
    assert np.array_equal(np.asarray(again), np.asarray(upright.convert("RGB")))
    exif[0x0132] = 7  # a time that is no text
    image.save(tmp_path / "odd.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "odd.png")), np.asarray(upright.convert("RGB")))
