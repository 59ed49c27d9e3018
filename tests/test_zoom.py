"""A search by views keeps to its budget, finds what only a close view shows, and ends where it is sure."""

import json

import numpy as np
import pytest
from builders import KINDS, photo

from vicrop.crop import QuestionBatch, build_methods, model_module
from vicrop.evaluation import command as run
from vicrop.layouts import whole
from vicrop.session import ImageSession
from vicrop.tiles import tile_grid
from vicrop.zoom import View, inner_windows, search

SIZE, BASE, CELLS, LEAST = (4096, 3072), 336, 24, 4  # LEAST: pixels of a view's 336 that a thing needs to be seen


class Scene:
    """A picture with one thing in it, and a model that sees the thing where a view shows it large enough.

    Its map then has a peak there; its confidence grows with the part of the thing that the view shows, and its size.
    """

    def __init__(self, thing, seed=0):
        self.thing, self.rng, self.boxes = thing, np.random.default_rng(seed), []

    def look(self, box):
        self.boxes.append(box)
        att_map, confidence = 1 + 0.2 * self.rng.random((CELLS, CELLS)), 0.2 + 0.1 * self.rng.random()
        x1, y1, x2, y2 = self.thing
        left, top, right, bottom = box
        shown = max(0, min(x2, right) - max(x1, left)) * max(0, min(y2, bottom) - max(y1, top))
        side = (x2 - x1) * BASE / max(right - left, bottom - top)
        if shown and side >= LEAST:
            x, y = (x1 + x2) / 2 - left, (y1 + y2) / 2 - top
            column, row = int(x * CELLS / (right - left)), int(y * CELLS / (bottom - top))
            att_map[min(max(row, 0), CELLS - 1), min(max(column, 0), CELLS - 1)] += 20
            confidence = min(0.99, 0.3 + 0.05 * side) * shown / ((x2 - x1) * (y2 - y1))
        return View(box, box, att_map, confidence)


def things(side, count=12):
    rng = np.random.default_rng(side)
    corners = ((rng.integers(0, SIZE[0] - side), rng.integers(0, SIZE[1] - side)) for _ in range(count))
    return [(x, y, x + side, y + side) for x, y in corners]


def holds(view, thing):
    return all(a <= b for a, b in zip(view.box[:2], thing[:2], strict=True)) and all(
        a >= b for a, b in zip(view.box[2:], thing[2:], strict=True)
    )


@pytest.mark.parametrize("side", [120, 240])
def test_a_thing_that_the_overview_shows_is_found_in_half_of_the_tiles(side):
    rows, columns = tile_grid(SIZE)
    for number, thing in enumerate(things(side)):
        view, views = search(Scene(thing, number).look, SIZE, BASE, rows * columns // 2)
        assert holds(view, thing)
        assert views <= rows * columns // 2
        assert max(view.sides) < max(SIZE) / 2


def test_a_thing_that_the_overview_does_not_show_is_found_with_more_views():
    scenes = [(Scene(thing, number), thing) for number, thing in enumerate(things(30))]
    for scene, thing in scenes:
        view, views = search(scene.look, SIZE, BASE, 400)
        assert holds(view, thing)
        assert views > 4
        assert view.confidence > 0.5


def test_windows_that_tell_nothing_do_not_use_up_the_views():
    """Things that sixteenths of the picture show at most: a search that first goes to the bottom finds few."""
    found = [search(Scene(thing, number).look, SIZE, BASE, 100)[0] for number, thing in enumerate(things(12, 30))]
    assert sum(holds(view, thing) for view, thing in zip(found, things(12, 30), strict=True)) >= 20


@pytest.mark.parametrize("budget", [1, 2, 5, 13])
@pytest.mark.parametrize("side", [30, 120])
def test_no_search_takes_more_views_than_it_may(budget, side):
    scene = Scene(things(side)[0])
    view, views = search(scene.look, SIZE, BASE, budget)
    assert views == len(scene.boxes) <= budget
    assert len(set(scene.boxes)) == len(scene.boxes)
    assert scene.boxes[0] == whole(SIZE)
    assert view.box in scene.boxes


def test_more_views_are_never_less_sure():
    for number, thing in enumerate(things(60, 4)):
        found = [search(Scene(thing, number).look, SIZE, BASE, budget)[0].confidence for budget in (1, 2, 4, 8, 16, 32)]
        assert found == sorted(found)


@pytest.mark.parametrize("size", [(336, 336), (300, 100), (17, 5)])
def test_an_image_no_larger_than_the_base_is_looked_at_once(size):
    scene = Scene((0, 0, 2, 2))
    assert search(scene.look, size, BASE, 9)[1] == 1


@pytest.mark.parametrize("size", [(4096, 3072), (500, 400), (5000, 300), (337, 336), (1001, 77)])
def test_inner_windows_cover_the_view_and_lie_in_it(size):
    att_map = np.zeros((7, 9))
    att_map[5, 2] = 1
    shift = (100, 40, 100, 40)
    box = tuple(a + b for a, b in zip(whole(size), shift, strict=True))
    found = inner_windows(View(box, box, att_map, 0.5), BASE)
    covered = np.zeros(size[::-1], bool)
    for _, (x1, y1, x2, y2) in found:
        assert 100 <= x1 < x2 <= 100 + size[0]
        assert 40 <= y1 < y2 <= 40 + size[1]
        assert (x2 - x1, y2 - y1) != size
        covered[y1 - 40 : y2 - 40, x1 - 100 : x2 - 100] = True
    assert covered.all()
    assert max(found)[0] == found[0][0] == 1  # all of the map is in the first one
    assert len({where for _, where in found}) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_searches_its_pictures_and_says_how_often_it_looked(kind):
    model, processor = KINDS[kind](layers=3)
    image = photo(430, 310)
    session = ImageSession([image, photo(40, 30, seed=1)], model, processor)
    methods = build_methods(model_module(kind), ["rel_att_zoom", "grad_att_zoom"], model, 1, views=4)
    batch = QuestionBatch(session, ["why?", "who?"], [0, 1], [None, None], [{}, {}])
    for method in methods.values():
        results = batch.results(method, batch.original_answers(methods))
        assert 1 <= results[0].views <= 4
        for result in results:
            x1, y1, x2, y2 = result.region
            assert result.att_map.ndim == 2
            assert x1 < x2
            assert y1 < y2
        assert results[0].bbox[2] <= 430
        again = QuestionBatch(ImageSession([image], model, processor), ["why?"])
        (alone,) = again.results(method, again.original_answers(methods))
        assert (alone.bbox, alone.views, alone.crop_answer) == tuple(
            getattr(results[0], name) for name in ("bbox", "views", "crop_answer")
        )


def test_views_answer_as_long_as_the_question_does(monkeypatch):
    """Else the confidence of a view would be that of another number of tokens."""
    model, processor = KINDS["llava"](layers=3)
    session, made = ImageSession([photo(430, 310)], model, processor, 3), []
    methods = build_methods(model_module("llava"), ["rel_att_zoom"], model, 1, views=3)
    answers = ImageSession.answers
    monkeypatch.setattr(
        ImageSession, "answers", lambda each, *a, **k: made.append(each.max_new_tokens) or answers(each, *a, **k)
    )
    batch = QuestionBatch(session, ["why?"])
    batch.results(methods["rel_att_zoom"], batch.original_answers(methods))
    assert len(made) > 2
    assert set(made) == {3}


def test_records_say_how_many_views_they_took_and_a_resumed_run_compares_the_budget(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    photo(700, 400).save(images / "a.png")
    records = [{"id": "1", "question": "what number is on the red sign?", "labels": ["1"], "image_path": "a.png"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    where = [
        "--task",
        "demo",
        "--question_path",
        tmp_path / "data.json",
        "--image_path",
        images,
        "--save_path",
        tmp_path / "out",
    ]
    told = [str(each) for each in [*where, "--model", "llava_tiny", "--method", "rel_att_zoom,rel_att_high"]]
    run.main([*told, "--views", "3"])
    (zoomed,) = json.loads((tmp_path / "out" / "llava_tiny-demo-rel_att_zoom.json").read_text())
    (tiled,) = json.loads((tmp_path / "out" / "llava_tiny-demo-rel_att_high.json").read_text())
    assert 1 <= zoomed["views"] <= 3
    assert tiled["views"] == np.prod(tile_grid((700, 400)))
    with pytest.raises(SystemExit, match="views was 3 and is now 4"):
        run.main([*told, "--views", "4"])
