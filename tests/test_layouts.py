"""Which token shows which part of an image: every layout as a picture cut up and put together again."""

import numpy as np
import pytest

from vicrop.layouts import Layout, any_resolution, center_crop_region, raster, square_region, thw, tiles, whole


def cells(h, w):
    """(h, w) numbers of a picture's cells, row by row."""
    return np.arange(h * w).reshape(h, w)


@pytest.mark.parametrize(("first", "after_row"), [(0, 0), (1, 0), (5, 1), (0, 2)])
def test_a_raster_is_the_picture_row_by_row_with_what_stands_between(first, after_row):
    picture = cells(3, 4)
    tokens = [-1] * first + [token for row in picture for token in [*row, *[-1] * after_row]]
    assert np.array_equal(np.array(tokens)[raster(3, 4, first, after_row)], picture)


def test_merged_patches_are_a_raster_of_tokens():
    assert np.array_equal(thw((6, 4), 2), cells(3, 2))


@pytest.mark.parametrize("overview", [0, 6])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (3, 1)])
def test_tiles_one_after_the_other_are_the_picture_that_they_were_cut_from(rows, columns, overview):
    h, w = 2, 3
    picture = cells(rows * h, columns * w)
    cut = [picture[y * h : (y + 1) * h, x * w : (x + 1) * w].ravel() for y in range(rows) for x in range(columns)]
    tokens = np.concatenate([np.full(overview, -1), *cut])
    index = tiles(rows, columns, h, w, overview)
    assert np.array_equal(tokens[index], picture)
    assert Layout(len(tokens), index, whole((9, 9))).grid == picture.shape


@pytest.mark.parametrize("size", [(300, 300), (300, 100), (100, 300), (640, 480), (37, 90)])
def test_any_resolution_leaves_out_the_padding_and_has_a_newline_after_each_row(size):
    index = any_resolution(2, 2, 4, size, overview=16)
    h, w = index.shape
    assert max(h, w) == 8
    assert index[0, 0] == 16
    assert (np.diff(index, axis=1) == 1).all()
    assert (np.diff(index[:, 0]) == w + 1).all()
    with pytest.raises(ValueError, match="5000 x 69 pixels is too narrow"):
        any_resolution(1, 2, 4, (5000, 69), overview=16)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 500), (1, 9)])
def test_a_padded_square_holds_the_image_in_its_middle(size):
    x1, y1, x2, y2 = square_region(size)
    assert x2 - x1 == y2 - y1 == max(size)
    assert all(abs(low + high - side) <= 1 for low, high, side in ((x1, x2, size[0]), (y1, y2, size[1])))


@pytest.mark.parametrize("resize", [{"shortest_edge": 336}, {"width": 448, "height": 336}, None])
def test_a_centre_crop_shows_the_middle(resize):
    x1, y1, x2, y2 = center_crop_region((0, 0, 640, 480), resize, (336, 336))
    assert (x1 + x2, y1 + y2) == (640, 480)
    assert (x2 - x1, y2 - y1) == ((480, 480) if resize else (336, 336))


def test_a_crop_larger_than_the_image_reaches_beyond_it():
    assert center_crop_region((0, 0, 100, 50), None, (200, 200)) == (-50, -75, 150, 125)
