"""Several regions: each place that stands out has its box, all crops are in one prompt, and one region is as before."""

import json

import numpy as np
import pytest
from builders import KINDS, build_llava, photo
from families import FAMILIES
from test_run import checkpoint, dataset, options, results  # noqa: F401

from vicrop.baselines import grid_crops, gt_crops, random_crop, random_crops
from vicrop.boxes import (
    bbox_from_att_image_adaptive,
    bbox_in_region,
    bboxes_from_att_image,
    bboxes_in_region,
)
from vicrop.choices import MethodChoice, ModelChoice, Regions
from vicrop.crop import QuestionBatch, vicrop_qa
from vicrop.dataset import load_task
from vicrop.evaluation import command as run
from vicrop.evaluation.batching import answer_batch
from vicrop.files import ROOT
from vicrop.loaded import load_chosen
from vicrop.models import llava as llava_module
from vicrop.models.llava import LlavaAdapter
from vicrop.plots import finding_figure
from vicrop.session import ImageSession
from vicrop.verify import own_logits, relative_error, stock_logits, verify

SIZE, BASE, CELLS = (960, 720), 120, 24


# --------------------------------------------------------------------------------------------------------------- boxes
def blobs(*places, seed=0):
    """A map of little noise with a blob of 2 x 2 cells at each (row, column, weight)."""
    att_map = 0.01 * np.random.default_rng(seed).random((CELLS, CELLS))
    for row, column, weight in places:
        att_map[row : row + 2, column : column + 2] += weight
    return att_map


def middle(row, column):
    """The point in the middle of a blob, in pixels."""
    return (column + 1) * SIZE[0] / CELLS, (row + 1) * SIZE[1] / CELLS


def holds(box, point):
    return all(low <= at <= high for low, at, high in zip(box[:2], point, box[2:], strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_two_places_have_a_box_each_and_one_place_has_one(seed):
    both, one = (3, 4, 1.0), (17, 18, 0.8)
    found = bboxes_from_att_image(blobs(both, one, seed=seed), SIZE, BASE, Regions(3))
    assert len(found) == 2
    assert holds(found[0], middle(*both[:2]))
    assert holds(found[1], middle(*one[:2]))
    for place in (both, one):
        assert len(bboxes_from_att_image(blobs(place, seed=seed), SIZE, BASE, Regions(3))) == 1


def test_a_further_place_counts_by_its_share_of_the_first_one():
    att_map = blobs((3, 4, 1.0), (17, 18, 0.4))
    for share, count in ((0.5, 1), (0.35, 2)):
        assert len(bboxes_from_att_image(att_map, SIZE, BASE, Regions(2, share))) == count


@pytest.mark.parametrize("shape", [(24, 24), (16, 9), (3, 4), (1, 7)])
@pytest.mark.parametrize("size", [(960, 720), (200, 900), (130, 120), (40, 30)])
def test_the_boxes_of_fewer_regions_are_the_first_ones_of_more(shape, size):
    rng = np.random.default_rng(shape[0])
    for att_map in (rng.random(shape), rng.random(shape) ** 6, np.ones(shape), np.zeros(shape)):
        found = [bboxes_from_att_image(att_map, size, BASE, Regions(most, 0.2)) for most in range(1, 6)]
        assert found[0] == [bbox_from_att_image_adaptive(att_map, size, BASE)]
        for fewer, more in zip(found, found[1:], strict=False):
            assert more[: len(fewer)] == fewer
            assert len(more) <= len(fewer) + 1
        assert len(set(found[-1])) == len(found[-1])
        assert all(0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1] for x1, y1, x2, y2 in found[-1])


@pytest.mark.parametrize("even", [0, 1, 7.5])
def test_where_nothing_stands_out_there_is_one_box(even):
    assert len(bboxes_from_att_image(np.full((9, 9), even), SIZE, BASE, Regions(4, 0))) == 1


def test_a_map_stays_as_it_was():
    att_map = blobs((3, 4, 1.0), (17, 18, 0.8))
    before = att_map.copy()
    bboxes_from_att_image(att_map, SIZE, BASE, Regions(3))
    assert np.array_equal(att_map, before)


def test_boxes_in_a_region_are_shifted_clipped_and_differ():
    att_map, region = blobs((0, 4, 1.0), (1, 18, 0.9), (20, 2, 0.9)), (0, -300, 960, 660)
    found = bboxes_in_region(att_map, region, (960, 360), BASE, Regions(3))
    assert found[0] == bbox_in_region(att_map, region, (960, 360), BASE)
    assert len(set(found)) == len(found)
    assert all(0 <= y1 < y2 <= 360 for _, y1, _, y2 in found)


@pytest.mark.parametrize("size", [(960, 720), (500, 1100), (7, 3), (1000, 40)])
@pytest.mark.parametrize("most", [1, 2, 3, 4, 6])
def test_a_grid_covers_the_image_once_in_parts_alike(size, most):
    parts = grid_crops({}, size, BASE, most)
    seen = np.zeros(size[::-1], int)
    for x1, y1, x2, y2 in parts:
        seen[y1:y2, x1:x2] += 1
    assert len(parts) == most
    assert (seen == 1).all()
    wide, high = ({box[axis + 2] - box[axis] for box in parts} for axis in (0, 1))
    assert max(wide) - min(wide) <= 1
    assert max(high) - min(high) <= 1


def test_a_grid_has_the_least_oblong_parts_and_none_without_pixels():
    assert grid_crops({}, (900, 600), BASE, 2) == [(0, 0, 450, 600), (450, 0, 900, 600)]
    assert grid_crops({}, (600, 600), BASE, 4)[3] == (300, 300, 600, 600)
    with pytest.raises(ValueError, match="an image of 2 x 1 pixels has no 3 parts"):
        grid_crops({}, (2, 1), BASE, 3)


def test_random_windows_are_the_first_ones_of_more():
    found = [random_crops({"id": "a"}, SIZE, BASE, most) for most in (1, 2, 3)]
    assert found[0] == [random_crop({"id": "a"}, SIZE, BASE)] == found[2][:1]
    assert found[1] == found[2][:2]


def test_true_places_have_a_crop_each_where_there_are_not_too_many():
    boxes = [[10, 10, 40, 40], [800, 600, 850, 650]]
    record = {"id": "a", "gt_bbox": [10, 10, 850, 650], "gt_bboxes": boxes}
    (whole,) = gt_crops(record, SIZE, BASE, 1)
    assert holds(whole, (11, 11))
    assert holds(whole, (849, 649))
    assert [holds(crop, box[:2]) for crop, box in zip(gt_crops(record, SIZE, BASE, 3), boxes, strict=True)] == [
        True
    ] * 2
    assert gt_crops(record | {"gt_bboxes": boxes * 2}, SIZE, BASE, 3) == [whole]
    assert len(gt_crops(record | {"gt_bboxes": boxes[:1] * 2}, SIZE, BASE, 3)) == 1  # one crop is not shown twice


@pytest.mark.parametrize(
    ("regions", "says"),
    [
        ((0,), "^regions must be at least 1, got 0"),
        ((2, 1.5), "^region_share must be 0 to 1, got 1.5"),
        ((2, float("nan")), "^region_share must be 0 to 1, got nan"),
    ],
)
def test_regions_that_cannot_be_are_refused(regions, says):
    with pytest.raises(ValueError, match=says):
        Regions(*regions)


# -------------------------------------------------------------------------------------------------------------- models
MODELS = {**{name: lambda name=name: KINDS[name](layers=3) for name in KINDS}, **FAMILIES}


@pytest.fixture(scope="module", params=MODELS)
def small(request):
    """(model, processor) of each family, with random weights."""
    return MODELS[request.param]()


CROPS = [photo(50, 30, seed=5), photo(33, 90, seed=6), photo(64, 64, seed=7)]


@pytest.mark.parametrize("count", [2, 3])
def test_logits_with_several_crops_are_the_stock_models(small, count):
    session = ImageSession([photo()], *small)
    prompt, crops = session.adapter.prompt("what number is on the red sign?"), CROPS[:count]
    found = own_logits(session, prompt, crops)
    assert relative_error(found, stock_logits(session, prompt, [*session.images, *crops])) <= 3e-5
    for number in range(count):  # each of them is seen
        others = [photo(40, 40, seed=9) if at == number else crop for at, crop in enumerate(crops)]
        assert relative_error(own_logits(session, prompt, others), found) > 1e-4


def test_questions_with_different_numbers_of_crops_are_answered_together_as_alone(small):
    model, processor = small
    images, of = [photo(90, 70), photo(40, 130, seed=1)], [1, 0, 1, 0]
    session = ImageSession(images, model, processor, 6)
    prompts = [
        session.adapter.prompt(each) for each in ("what number is on the red sign?", "why?", "who?", "where is it?")
    ]
    crops = [CROPS[:2], CROPS[2], CROPS, [CROPS[1]]]
    found = session.answers(prompts, crops=crops, of=of)
    again = session.answers(prompts, crops=crops, of=of, drafts=[answer.tokens for answer in found])
    for number, (prompt, image) in enumerate(zip(prompts, of, strict=True)):
        (alone,) = ImageSession([images[image]], model, processor, 6).answers([prompt], crops=[crops[number]])
        for answer in (found[number], again[number]):
            assert answer.tokens == alone.tokens
            assert answer.confidence == pytest.approx(alone.confidence, rel=1e-3)


class UnseenSecondCrop(LlavaAdapter):
    """A family of which the first crop is seen, and no further one."""

    def forward_inputs(self, prompt, ids, images):
        return super().forward_inputs(prompt, ids, [*images[:2], *images[1:2] * (len(images) - 2)])


def test_a_family_that_ignores_a_second_crop_is_found(monkeypatch):
    model, processor = build_llava()
    monkeypatch.setattr(llava_module, "ADAPTER", UnseenSecondCrop)
    assert any("a second crop changes nothing" in sentence for sentence in verify(model, processor).differs)


# ------------------------------------------------------------------------------------------------------------- methods
EMBEDDED = ["llava_tiny", "blip_tiny", "qwen2_5_tiny"]
METHODS = ("rel_att", "question_att", "loc_att_high", "rel_att_zoom", "grid_crops", "random_crop", "center_crop")


class Asked:
    """An embedded model and a few questions of the demo."""

    def __init__(self, name):
        self.name, self.records = name, load_task(ROOT / "data/demo/data.json")[:3]
        self.images = [ROOT / "data/demo/images" / record["image_path"] for record in self.records]

    def found(self, most, size=1, share=0.0, crop_below=None, names=METHODS):
        """{method: what is added to each record} with so many regions, in batches."""
        choice = MethodChoice(names, regions=Regions(most, share))
        loaded, found = load_chosen(ModelChoice(self.name, device="cpu"), choice), {name: [] for name in names}
        for start in range(0, len(self.records), size):
            batch = self.records[start : start + size]
            session = loaded.session(self.images[start : start + size]), list(range(len(batch)))
            for name, fields in answer_batch(batch, lambda: session, None, loaded.methods, crop_below).items():  # noqa: B023
                found[name] += fields
        return found


@pytest.fixture(scope="module", params=EMBEDDED)
def asked(request):
    return Asked(request.param)


def test_one_region_is_the_first_of_several_and_lists_none(asked):
    one, three = asked.found(1), asked.found(3)
    for name in METHODS:
        for plain, several in zip(one[name], three[name], strict=True):
            assert "bboxes" not in plain
            assert several["bboxes"][0] == several["bbox"]
            assert len(several["bboxes"]) <= (1 if name == "center_crop" else 3)
            assert name == "grid_crops" or several["bbox"] == plain["bbox"]
            assert several.get("views") == plain.get("views")
            assert several["original_answer"] == plain["original_answer"]
            if several["bboxes"] == [plain["bbox"]]:
                assert several["crop_answer"] == plain["crop_answer"]
    assert {len(fields["bboxes"]) for fields in three["rel_att"]} == {3}


def test_batches_give_what_each_question_gives_alone(asked):
    alone, together = (asked.found(3, size, share=0.8, names=("rel_att",))["rel_att"] for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        for field in ("crop_answer", "bbox", "bboxes", "num_img_tokens"):
            assert one.get(field) == other.get(field)
        assert one["confidence"] == pytest.approx(other["confidence"], rel=1e-3)


def test_gated_questions_have_no_boxes(asked):
    for fields in asked.found(2, crop_below=0.0, names=("rel_att",))["rel_att"]:
        assert (fields["gated"], fields["bbox"], fields["bboxes"]) == (True, None, [])


def test_a_notebook_asks_with_several_crops_and_sees_them_all(asked):
    loaded = load_chosen(ModelChoice(asked.name, device="cpu"), MethodChoice(("rel_att",), regions=Regions(2, 0.0)))
    session, question = loaded.session(asked.images[:1]), asked.records[0]["question"]
    batch = QuestionBatch(session, [question])
    (result,) = batch.results(loaded.methods["rel_att"], batch.original_answers(loaded.methods))
    ask = (asked.name, "rel_att", asked.images[0], question, loaded.model, loaded.processor)
    wanted = (result.original_answer, result.crop_answer, result.bbox)
    assert vicrop_qa(*ask, regions=2, region_share=0) == wanted
    assert len(result.bboxes) == 2
    figure = finding_figure(session.images[0], question, "rel_att", result)
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 4
    assert len(figure.axes[0].lines) == 2 * 2  # two lines around each box
    assert titles[2] == f"with 2 crops: {result.crop_answer}"
    assert titles[3] == "crop 2 of 2"


# --------------------------------------------------------------------------------------------------------------- a run
def test_one_region_without_a_gate_writes_the_files_of_the_plain_run(checkpoint, dataset):  # noqa: F811
    told = options(checkpoint, dataset, "--method", "rel_att,random_crop,rel_att_high")
    run.main(told)
    plain = {path.name: path.read_bytes() for path in (dataset / "out").glob("*[!a].json")}
    assert len(plain) == 3
    where = told.index("--save_path") + 1
    run.main([*told[:where], str(dataset / "again"), *told[where + 1 :], "--regions", "1", "--region_share", "0.3"])
    assert {path.name: path.read_bytes() for path in (dataset / "again").glob("*[!a].json")} == plain
    made = [json.loads((dataset / name / "llava-demo-rel_att.meta.json").read_text()) for name in ("out", "again")]
    assert made[0]["settings"] == made[1]["settings"]
    assert not {"regions", "region_share"} & made[0]["settings"].keys()


def test_regions_are_settings_of_a_result(checkpoint, dataset, capsys):  # noqa: F811
    run.main(options(checkpoint, dataset, "--regions", "2", "--region_share", "0.25"))
    assert all(1 <= len(record["bboxes"]) <= 2 for record in results(dataset, "rel_att"))
    for more, says in (([], "regions was 2 and is now None"),
                       (["--regions", "3", "--region_share", "0.25"], "regions was 2 and is now 3"),
                       (["--regions", "2"], "region_share was 0.25 and is now 0.5")):  # fmt: skip
        with pytest.raises(SystemExit, match=says):
            run.main(options(checkpoint, dataset, *more))
    with pytest.raises(SystemExit):
        run.main(options(checkpoint, dataset, "--regions", "0"))
    with pytest.raises(SystemExit):
        run.main(options(checkpoint, dataset, "--region_share", "0.25"))
    said = capsys.readouterr().err
    assert "regions must be at least 1, got 0" in said
    assert "--region_share 0.25 is about further regions, and needs --regions" in said


def test_a_single_picture_has_all_boxes_printed(checkpoint, dataset, capsys):  # noqa: F811
    ask = ["--image", str(dataset / "images" / "a.png"), "--question", "one?", "--save_path", str(dataset / "drawn")]
    common = ["--model", "llava", "--model_id", str(checkpoint), "--device", "cpu", "--method", "grid_crops"]
    run.main([*common, *ask, "--regions", "2"])
    printed = capsys.readouterr().out
    assert "boxes (0, 0, 60, 90), (60, 0, 120, 90), drawn in" in printed
    assert "with 2 crops:" in printed
