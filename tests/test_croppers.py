"""External croppers: the searches equal exhaustive ones, and the models are what transformers makes of them."""

import json
import shutil

import numpy as np
import pytest
import torch
from builders import build_llava, photo
from outsiders import build_rt_detr
from safetensors.torch import load_file, save_file
from transformers.image_transforms import center_to_corners_format
from transformers.models.sam.image_processing_pil_sam import _batched_mask_to_box

from vicrop import vicrop_qa
from vicrop.choices import Regions
from vicrop.crop import QuestionBatch, build_methods, model_module
from vicrop.croppers import STEPS, most_similar, narrowed, shorter, whole_pixels
from vicrop.evaluation import command as run
from vicrop.layouts import whole
from vicrop.outside import KINDS, SURE, distinct
from vicrop.session import ImageSession

CPU = torch.device("cpu")
SIZES = [(640, 480), (300, 17), (5, 9), (1, 1)]


def scorer(seed):
    """Scores that look random, and are the same for the same box."""
    return lambda boxes: [float(np.random.default_rng([seed, *box]).random()) for box in boxes]


# ------------------------------------------------------------------------------------------------------- the searches
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_the_way_of_clip_is_the_exhaustive_one(size, seed):
    """At each step all four cuts are tried; the best of all that were taken is kept."""
    score, box, taken = scorer(seed), np.array(whole(size)), []
    for _ in range(STEPS):
        wide, high = max(1, round((box[2] - box[0]) / 10)), max(1, round((box[3] - box[1]) / 10))
        cuts = [box + (wide, 0, 0, 0), box + (0, high, 0, 0), box - (0, 0, wide, 0), box - (0, 0, 0, high)]
        cuts = [tuple(cut.tolist()) for cut in cuts if cut[0] < cut[2] and cut[1] < cut[3]]
        if not cuts:
            break
        box = np.array(max(cuts, key=lambda cut: score([cut])[0]))
        taken.append(tuple(box.tolist()))
    wanted = max(taken, key=lambda cut: score([cut])[0]) if taken else whole(size)
    assert narrowed(size, score) == wanted


def test_the_way_of_clip_ends_around_what_is_alike():
    target = (150, 120, 450, 380)  # 20 cuts can lead there

    def score(boxes):
        return [-sum(abs(a - b) for a, b in zip(box, target, strict=True)) for box in boxes]

    found = narrowed((640, 480), score)
    assert max(abs(a - b) for a, b in zip(found, target, strict=True)) < 640 / 10


def test_no_cut_leaves_the_image_or_takes_more_than_a_tenth():
    for box in ((0, 0, 100, 50), (3, 4, 14, 6), (7, 7, 8, 8)):
        for cut in shorter(box):
            assert box[0] <= cut[0] < cut[2] <= box[2]
            assert box[1] <= cut[1] < cut[3] <= box[3]
            lost = [box[2] - box[0] - cut[2] + cut[0], box[3] - box[1] - cut[3] + cut[1]]
            assert sorted(lost)[0] == 0 < sorted(lost)[1] <= max(1, 0.1 * max(box[2] - box[0], box[3] - box[1]))


@pytest.mark.parametrize("seed", range(5))
def test_the_most_similar_box_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-20, 120, (30, 4))  # some are turned inside out, or lie outside
    score, size = scorer(seed), (100, 80)
    inside = [[max(0, int(np.floor(a))), max(0, int(np.floor(b))), min(100, int(np.ceil(c))), min(80, int(np.ceil(d)))]
              for a, b, c, d in boxes]  # fmt: skip
    inside = [tuple(box) for box in inside if box[0] < box[2] and box[1] < box[3]]
    assert most_similar(boxes.tolist(), size, score) == max(inside, key=lambda box: score([box])[0])


def test_without_a_box_the_whole_image_is_taken():
    assert most_similar([], (30, 20), scorer(0)) == (0, 0, 30, 20)
    assert most_similar([[40, 5, 60, 9]], (30, 20), scorer(0)) == (0, 0, 30, 20)


def test_of_boxes_that_nearly_coincide_the_surest_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 6]], dtype=float)
    assert distinct(boxes, np.array([0.8, 0.9, 0.7, 0.6]), 0.7) == [1, 2, 3]
    assert distinct(boxes, np.array([0.9, 0.8, 0.7, 0.6]), 0.5) == [0, 2]
    assert distinct(boxes[:0], np.zeros(0), 0.7) == []


# --------------------------------------------------------------------------------------------------------- the models
@pytest.fixture(scope="module")
def folders(croppers):
    return dict(zip((name.removeprefix("--") for name in croppers[::2]), croppers[1::2], strict=True))


def test_scores_are_the_cosines_of_clip(folders):
    clip, image = KINDS["clip"](folders["clip"], CPU), photo(90, 70)
    boxes = [(0, 0, 90, 70), (10, 5, 40, 60), (3, 3, 4, 8), (80, 0, 90, 3), *((n, 0, n + 20, 30) for n in range(40))]
    text = "what number is on the red sign?"
    scores = clip(image, text, boxes)
    assert len(scores) == len(boxes) > 32  # more than it sees at once
    with torch.no_grad():
        for box, score in list(zip(boxes, scores, strict=True))[:6]:
            inputs = clip.processor(text=[text], images=[image.crop(box)], return_tensors="pt")
            seen = clip.model.get_image_features(inputs.pixel_values).pooler_output
            read = clip.model.get_text_features(inputs.input_ids).pooler_output
            assert score == pytest.approx(torch.cosine_similarity(seen, read).item(), abs=1e-5)
    assert scores != clip(image, "is there a green sign?", boxes)
    assert len(clip(image, text * 9, boxes[:1])) == 1  # longer than it can read


def test_boxes_are_the_surest_ones_of_the_detector(folders):
    detector, image = KINDS["detector"](folders["detector"], CPU), photo(90, 70)
    found = detector(image)
    with torch.no_grad():
        output = detector.model(**detector.processor(images=[image], return_tensors="pt"))
    sure = output.logits[0].softmax(-1)[:, :-1].amax(-1) > SURE
    corners = center_to_corners_format(output.pred_boxes[0][sure]) * torch.tensor([90, 70, 90, 70])
    assert len(found) > 1
    assert np.allclose(found, corners.numpy(), atol=1e-3)


def test_a_detector_that_is_sure_of_nothing_proposes_nothing(tmp_path):
    for part in build_rt_detr():
        part.save_pretrained(tmp_path)
    assert KINDS["detector"](str(tmp_path), CPU)(photo(90, 70)) == []


def test_boxes_are_those_that_the_usual_detector_is_sure_of(tmp_path):
    """RT-DETR says yes or no to each kind of thing, where YOLOS says which one, or nothing."""
    for part in build_rt_detr(sure=-1.0):
        part.save_pretrained(tmp_path)
    detector = KINDS["detector"](str(tmp_path), CPU)
    found = detector(photo(90, 70))
    with torch.no_grad():
        output = detector.model(**detector.processor(images=[photo(90, 70)], return_tensors="pt"))
    scores = output.logits[0, :, 0].sigmoid()
    chosen = [number for number in scores.argsort(descending=True).tolist() if scores[number] > SURE]
    corners = center_to_corners_format(output.pred_boxes[0][chosen]) * torch.tensor([90, 70, 90, 70])
    assert 0 < len(chosen) < len(scores)
    assert np.allclose(found, corners.numpy(), atol=1e-3)


def test_boxes_of_masks_lie_in_the_image_and_differ(folders):
    segmenter = KINDS["sam"](folders["sam"], CPU)
    found = segmenter(photo(90, 70))
    assert found
    assert len({tuple(box) for box in found}) == len(found)
    for x1, y1, x2, y2 in found:
        assert 0 <= x1 <= x2 <= 90
        assert 0 <= y1 <= y2 <= 70


def test_a_box_of_a_mask_shows_its_last_row_and_column(folders, monkeypatch):
    """Of masks of a column, a row and a rectangle: SAM's boxes name their first and last pixels."""
    segmenter = KINDS["sam"](folders["sam"], CPU)
    masks = torch.zeros(3, 70, 90, dtype=torch.bool)
    masks[0, 5:20, 7], masks[1, 30, 40:90], masks[2, 50:70, 10:30] = True, True, True
    own = {"boxes": _batched_mask_to_box(masks), "iou_scores": torch.tensor([0.9, 0.8, 0.7])}
    monkeypatch.setattr(segmenter.generator, "forward", lambda inputs: own)
    monkeypatch.setattr(segmenter.generator, "preprocess", lambda image, points_per_crop: [None])
    found = [whole_pixels(box, (90, 70)) for box in segmenter(photo(90, 70))]
    assert found == [(7, 5, 8, 20), (40, 30, 90, 31), (10, 50, 30, 70)]


def test_what_is_no_such_model_is_a_sentence(folders, tmp_path):
    with pytest.raises(ValueError, match="lacks .* of its model's weights|cannot be used"):
        KINDS["clip"](folders["sam"], CPU)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be used"):
        KINDS["detector"](str(tmp_path), CPU)


# -------------------------------------------------------------------------------------------------------- the methods
def test_the_map_s_question_is_what_clip_reads_and_questions_share_boxes(folders, monkeypatch):
    model, processor = build_llava()
    methods = build_methods(model_module("llava"), ["clip_crop", "sam_crop"], model, croppers=folders)
    session = ImageSession([photo(90, 70)], model, processor)
    asked, proposed = [], []
    for name, method in methods.items():
        monkeypatch.setattr(method, "score", lambda image, text, boxes: asked.append(text) or [0.0] * len(boxes))
        if name == "sam_crop":
            monkeypatch.setattr(method, "propose", lambda image: proposed.append(image) or [[1, 2, 30, 40]])
    batch = QuestionBatch(session, ["why?", "who is it?"], [0, 0], [None, "it"], [{}, {}])
    for method in methods.values():
        results = batch.results(method, batch.original_answers(methods))
        assert all(each.att_map is None for each in results)
    assert set(asked) == {"why?", "it"}
    assert len(proposed) == 1


def test_an_external_cropper_reads_no_layer(folders):
    model, _ = build_llava()
    with pytest.raises(ValueError, match="clip_crop reads no layer"):
        build_methods(model_module("llava"), ["clip_crop"], model, 1, croppers=folders)


def test_where_several_crops_may_be_its_only_one_is_listed(folders):
    model, processor = build_llava()
    methods = build_methods(model_module("llava"), ["clip_crop"], model, croppers=folders, regions=Regions(2))
    batch = QuestionBatch(ImageSession([photo(90, 70)], model, processor), ["why?"])
    (found,) = batch.results(methods["clip_crop"], batch.original_answers(methods))
    assert found.outputs["bboxes"] == [found.outputs["bbox"]]


def test_vicrop_qa_takes_checkpoints_of_croppers(folders):
    model, processor = build_llava()
    *_, box = vicrop_qa(
        "llava", "clip_crop", photo(90, 70), "why?", model, processor, croppers={"clip": folders["clip"]}
    )
    assert box != (0, 0, 90, 70)


def test_a_run_that_is_resumed_compares_the_checkpoints(folders, croppers, tmp_path):
    photo(120, 90).save(tmp_path / "a.png")
    record = {"id": "1", "question": "why?", "labels": ["1"], "image_path": "a.png"}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    where = ["--question_path", tmp_path / "data.json", "--image_path", tmp_path, "--save_path", tmp_path / "out"]
    asked = ["--model", "llava_tiny", "--task", "demo", "--device", "cpu", "--method", "clip_crop,detector_crop"]
    told = list(map(str, [*asked, *where]))
    croppers = croppers[: croppers.index("--sam")]  # which neither method asks
    run.main([*told, *croppers])
    for method in ("clip_crop", "detector_crop"):
        meta = json.loads((tmp_path / "out" / f"llava_tiny-demo-{method}.meta.json").read_text())
        assert ("detector" in meta["settings"]) is (method == "detector_crop")
        assert meta["settings"]["clip"].endswith("clip")
    with pytest.raises(SystemExit, match="clip was .* and is now 'another/clip'"):
        run.main([*told, *croppers, "--clip", "another/clip"])
    shutil.copytree(folders["clip"], tmp_path / "clip")
    own = [*croppers, "--clip", tmp_path / "clip", "--save_path", tmp_path / "own"]
    run.main([*told, *map(str, own)])
    weights = tmp_path / "clip" / "model.safetensors"
    save_file({name: each + 1 for name, each in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(SystemExit, match="clip_weights was '[0-9a-f]+' and is now '[0-9a-f]+'"):
        run.main([*told, *map(str, own)])


@pytest.mark.parametrize(
    ("method", "option", "says"),
    [
        ("rel_att", "clip", "rel_att asks no such model; those that do are clip_crop, detector_crop, sam_crop"),
        ("clip_crop", "detector", "clip_crop asks no such model; those that do are detector_crop"),
        ("clip_crop,detector_crop", "sam", "clip_crop, detector_crop asks no such model; those that do are sam_crop"),
    ],
)
def test_a_cropper_that_no_method_asks_is_refused(capsys, method, option, says):
    with pytest.raises(SystemExit):
        run.main(["--model", "llava_tiny", "--method", method, f"--{option}", "some/model"])
    assert f"--{option} some/model: {says}" in capsys.readouterr().err
