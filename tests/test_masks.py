"""Masks: polygons, RLE and PNG are one; overlaps by hand and by pycocotools; SAM is asked about the right place."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from builders import photo
from PIL import Image
from pycocotools import mask as coco
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel, SamProcessor

from vicrop.evaluation.statistics import bootstrap_interval
from vicrop.files import ROOT
from vicrop.localization import evaluate_masks, ground_command, refcoco, refine
from vicrop.localization.coco_masks import mask_of

SIZE = (40, 30)  # width, height


def rectangle(x1, y1, x2, y2):
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def polygon(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def rle(mask, compressed=False):
    """RLE of a mask: the lengths of runs, column by column, beginning with that of zeros."""
    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    if compressed:
        return {"size": code["size"], "counts": code["counts"].decode()}
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask.T.ravel()]))) + 0
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, mask.size]).tolist()}


def picture(mask, path, mode="L"):
    Image.fromarray(mask.astype(np.uint8) * 255).convert(mode).save(path)
    return path.name


def written(tmp_path, truths, predictions, **fields):
    """(GT.jsonl, folder of predictions) of {id: segmentation} and {id: mask}."""
    lines = [{"id": key, "segmentation": each, "width": SIZE[0], "height": SIZE[1]} | fields
             for key, each in truths.items()]  # fmt: skip
    (tmp_path / "gt.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "found").mkdir(exist_ok=True)
    for key, mask in predictions.items():
        picture(mask, tmp_path / "found" / f"{key}_mask.png")
    return tmp_path / "gt.jsonl", tmp_path / "found"


# ------------------------------------------------------------------------------------------------------------ one mask
def test_all_ways_to_write_a_mask_are_one(tmp_path):
    own = rectangle(5, 6, 20, 18)
    forms = [polygon(5, 6, 20, 18), rle(own), rle(own, compressed=True)]
    forms += [picture(own, tmp_path / f"{mode}.png", mode) for mode in ("1", "L", "P", "RGB")]
    for form in forms:
        assert (mask_of(form, SIZE, "it", tmp_path) == own).all()
    assert (mask_of(rle(own), None, "it") == own).all()
    parts = polygon(5, 6, 12, 18) + polygon(12, 6, 20, 18)  # an object in two pieces
    assert (mask_of(parts, SIZE, "it") == own).all()


@pytest.mark.parametrize("seed", range(3))
def test_polygons_and_areas_are_those_of_pycocotools(seed):
    """Stars, whose edges cut pixels."""
    rng = np.random.default_rng(seed)
    angles, radius = np.linspace(0, 2 * np.pi, 15)[:-1], rng.uniform(3, 14, 14)
    points = np.stack([20 + radius * np.cos(angles), 15 + radius * np.sin(angles)], 1).clip(0, (40, 30))
    star = [points.ravel().tolist()]
    (code,) = coco.frPyObjects(star, SIZE[1], SIZE[0])
    mask = mask_of(star, SIZE, "it")
    assert mask.sum() == coco.area(code)
    assert (mask == coco.decode(code)).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (None, "a mask is polygons"), ([], "a mask is polygons"), ([[1, 2, 3, 4]], "a mask is polygons"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a mask is polygons"), ([[1, 2, 3, 4, 5, "6"]], "a mask is polygons"),
        ([1, 2, 3, 4, 5, 6], "a mask is polygons"), (7, "a mask is polygons"), ({}, "RLE is"),
        ({"size": [30, 40]}, "RLE is"), ({"size": [30], "counts": [1200]}, "RLE is"),
        ({"size": [30, 40], "counts": [1199]}, "must be the 1200 pixels"),
        ({"size": [30, 40], "counts": [1300, -100]}, "must be the 1200 pixels"),
        ({"size": [30, 40], "counts": []}, "must be the 1200 pixels"),
        ({"size": [40, 30], "counts": [1200]}, "is of an image of 30 x 40, not 40 x 30"),
        ("none.png", "no mask at"), ("text.png", "cannot read"), ("other.png", "is of an image of 10 x 10, not 40 x"),
    ],
)  # fmt: skip
def test_what_is_no_mask_is_named(tmp_path, wrong, says):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (10, 10)).save(tmp_path / "other.png")
    with pytest.raises((ValueError, FileNotFoundError), match=f"record 7: .*{says}"):
        mask_of(wrong, SIZE, "record 7", tmp_path)


def test_polygons_without_a_size_or_a_reader_are_one_sentence(monkeypatch):
    with pytest.raises(ValueError, match="it: polygons need the width and height"):
        mask_of(polygon(1, 1, 5, 5), None, "it")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match=r"pip install 'vicrop\[masks\]'"):
        mask_of(polygon(1, 1, 5, 5), SIZE, "it")


# ----------------------------------------------------------------------------------------------------------- many masks
def test_masks_against_themselves_are_100(tmp_path):
    masks = {"a": rectangle(5, 6, 20, 18), "b": rectangle(0, 0, 40, 30), "c/d": rectangle(39, 29, 40, 30)}
    for form in (rle, lambda mask: rle(mask, compressed=True)):
        truth, root = written(tmp_path, {key: form(mask) for key, mask in masks.items()}, {})
        for key, mask in masks.items():
            picture(mask, root / f"{key.replace('/', '%2F')}_mask.png")
        report = evaluate_masks.evaluate(truth, root)
        assert [report[name] for name in ("cIoU", "gIoU", "pr@0.5", "pr@0.7", "pr@0.9")] == [100] * 5
        assert report["intervals"] == {"cIoU": (100, 100), "gIoU": (100, 100)}
        assert not report["wrong"]


def test_shifted_masks_by_hand(tmp_path, capsys):
    """10 x 10 shifted by 5 (50 of 150 pixels), 20 x 10 shifted by 2 (180 of 220), and one that is missing (0 of 40)."""
    truths = {"half": polygon(0, 0, 10, 10), "near": polygon(10, 10, 30, 20), "gone": polygon(0, 20, 4, 30)}
    truth, root = written(tmp_path, truths, {"half": rectangle(5, 0, 15, 10), "near": rectangle(12, 10, 32, 20)})
    evaluate_masks.main(["--dataset-jsonl", str(truth), "--pred-root", str(root), "--format", "json"])
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 3
    assert report["cIoU"] == pytest.approx(100 * (50 + 180 + 0) / (150 + 220 + 40))
    assert report["gIoU"] == pytest.approx(100 * (50 / 150 + 180 / 220 + 0) / 3)
    assert [report[f"pr@{share}"] for share in (0.5, 0.7, 0.9)] == pytest.approx([100 / 3, 100 / 3, 0])
    assert report["wrong"] == {"gone": "missing"}
    evaluate_masks.main(["--dataset-jsonl", str(truth), "--pred-root", str(root), "--iou-thresholds", "0.3"])
    printed = capsys.readouterr().out
    assert "pr@0.3     66.67" in printed
    assert "1 predictions count as masks without a pixel: gone (missing)" in printed


def test_overlaps_equal_the_areas_of_pycocotools(tmp_path):
    rng = np.random.default_rng(5)
    truths, found = {}, {}
    for number in range(12):
        masks = rng.random((2, *SIZE[::-1])) < rng.uniform(0.1, 0.9)
        truths[str(number)], found[str(number)] = rle(masks[0], number % 2 == 0), masks[1]
    truth, root = written(tmp_path, truths, found)
    pairs = [(mask_of(truths[key], SIZE, key), found[key]) for key in truths]
    codes = [[coco.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in pair] for pair in pairs]
    both = np.array([coco.area(coco.merge(pair, intersect=True)) for pair in codes], dtype=float)
    either = np.array([coco.area(coco.merge(pair)) for pair in codes], dtype=float)
    report = evaluate_masks.evaluate(truth, root)
    assert report["cIoU"] == pytest.approx(100 * both.sum() / either.sum())
    assert report["gIoU"] == pytest.approx(100 * np.mean([coco.iou([one], [other], [0])[0, 0] for one, other in codes]))


def test_a_prediction_may_be_rle_or_polygons_and_a_broken_one_is_listed(tmp_path):
    own = rectangle(0, 0, 10, 10)
    truth, root = written(tmp_path, dict.fromkeys(["rle", "polygons", "text", "list", "large"], rle(own)), {})
    content = {"rle": {"segmentation": rle(own, True)}, "polygons": {"segmentation": polygon(0, 0, 10, 10)},
               "text": {"segmentation": 3}, "list": [],
               "large": {"segmentation": rle(np.ones((50, 50), bool))}}  # fmt: skip
    for key, each in content.items():
        (root / f"{key}_mask.json").write_text(json.dumps(each))
    report = evaluate_masks.evaluate(truth, root)
    assert report["gIoU"] == pytest.approx(40)
    assert report["wrong"].keys() == {"text", "list", "large"}
    assert report["wrong"]["large"] == "its mask is of an image of 50 x 50, not 40 x 30"


def test_predictions_that_cannot_be_read_here_are_not_counted_as_wrong(tmp_path, monkeypatch):
    picture(rectangle(0, 0, 10, 10), tmp_path / "own.png")
    truth, root = written(tmp_path, {"1": "own.png"}, {})
    (root / "1_mask.json").write_text(json.dumps({"segmentation": rle(rectangle(0, 0, 10, 10))}))
    assert evaluate_masks.evaluate(truth, root)["cIoU"] == 100
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(SystemExit, match=r"evaluate_masks: polygons and RLE .* pip install 'vicrop\[masks\]'"):
        evaluate_masks.main(["--dataset-jsonl", str(truth), "--pred-root", str(root)])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"segmentation": None}, "'1' has no segmentation"), ({"segmentation": [[1, 2]]}, "'1': a mask is polygons"),
        ({"segmentation": {"size": [30, 40], "counts": [1200]}}, "'1': its mask has no pixel"),
        ({"width": None}, "'1': polygons need the width"), ({"segmentation": "none.png"}, "'1': no mask at"),
        ({"width": "40"}, "'1': width is a number of pixels, not '40'"),
    ],
)  # fmt: skip
def test_a_wrong_ground_truth_is_named(tmp_path, fields, says):
    truth, root = written(tmp_path, {"1": polygon(0, 0, 10, 10)}, {"1": rectangle(0, 0, 10, 10)}, **fields)
    with pytest.raises(SystemExit, match=says):
        evaluate_masks.main(["--dataset-jsonl", str(truth), "--pred-root", str(root)])


def test_the_interval_of_a_ratio_draws_images():
    """Of one image there is nothing to draw; and it equals that of drawing the images themselves."""
    rng = np.random.default_rng(0)
    images, either = rng.integers(0, 40, 200), rng.integers(1, 100, 200).astype(float)
    both = either * rng.random(200)
    low, high = bootstrap_interval(both, images, 20_000, 0, either)
    ratios = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(images == image) for image in rng.integers(0, 40, 40)])
        ratios.append(both[rows].sum() / either[rows].sum())
    np.testing.assert_allclose((low, high), np.percentile(ratios, (2.5, 97.5)), atol=0.01)
    assert bootstrap_interval([1.0, 2.0], ["a", "a"], 100, 0, np.array([4.0, 2.0])) == (0.5, 0.5)


# -------------------------------------------------------------------------------------------------------------- RefCOCO
def test_masks_of_refer_are_kept_as_they_are(tmp_path):
    from more_releases import RLE, TRIANGLE, refer

    refer(tmp_path, "refcoco", "unc")
    path = str(tmp_path / "refcoco" / "refs(unc).p")
    for split, masks in (("val", [TRIANGLE, TRIANGLE]), ("testA", [RLE])):
        refcoco.main([path, "--images", str(tmp_path / "train2014"), "--out", str(tmp_path), "--split", split])
        rows = list(map(json.loads, (tmp_path / f"refcoco_{split}_gt.jsonl").read_text().splitlines()))
        assert [row["segmentation"] for row in rows] == masks
        for row in rows:
            mask = evaluate_masks.true_mask(row, row["question_id"], tmp_path / "gt.jsonl")
            code = coco.frPyObjects(row["segmentation"], 30, 40)
            assert mask.sum() == coco.area(coco.merge(code) if isinstance(code, list) else code)
    with pytest.raises(SystemExit, match="has no phrase of the split 'testB'"):
        refcoco.main([path, "--images", str(tmp_path / "train2014"), "--out", str(tmp_path), "--split", "testB"])


def test_masks_in_mdetrs_annotations_are_kept(tmp_path):
    from more_releases import RLE, TRIANGLE

    images = [{"id": number, "caption": "it", "file_name": "COCO_train2014_000000000009.jpg", "width": 40, "height": 30}
              for number in range(3)]  # fmt: skip
    boxes = [{"image_id": number, "bbox": [1, 2, 3, 4]} for number in range(3)]
    boxes[0]["segmentation"], boxes[1]["segmentation"] = TRIANGLE, RLE
    (tmp_path / "finetune_refcoco_val.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    refcoco.main([str(tmp_path / "finetune_refcoco_val.json"), "--images", str(tmp_path), "--out", str(tmp_path)])
    rows = list(map(json.loads, (tmp_path / "finetune_refcoco_val_gt.jsonl").read_text().splitlines()))
    assert [row.get("segmentation") for row in rows] == [TRIANGLE, RLE, None]


# ------------------------------------------------------------------------------------------------------------------ SAM
SIDE = 64  # of what the small SAM sees


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """The folder of a small SAM with random weights."""
    torch.manual_seed(0)
    image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8,
             "mlp_dim": 32, "output_channels": 16, "window_size": 2, "global_attn_indexes": [0],
             "num_pos_feats": 8}  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "iou_head_hidden_dim": 16, "iou_head_depth": 2}  # fmt: skip
    folder = tmp_path_factory.mktemp("sam")
    config = SamConfig(vision_config=image, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(folder)
    settings = {"image_processor_type": "SamImageProcessor", "size": {"longest_edge": SIDE}, "do_pad": True,
                "pad_size": {"height": SIDE, "width": SIDE}, "mask_size": {"longest_edge": SIDE // 4},
                "mask_pad_size": {"height": SIDE // 4, "width": SIDE // 4}, "do_resize": True, "do_rescale": True,
                "do_normalize": True, "do_convert_rgb": True, "processor_class": "SamProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


PLACES = {"box": [[5, 6, 30, 20], [0, 0, 59, 39]], "peak": [[10, 12], [50, 30]]}


@pytest.mark.parametrize("prompt", PLACES)
def test_a_mask_is_what_sam_gives_for_this_box_or_point_alone(sam, prompt):
    """Asked together, each mask is that of the model called by hand: the one of a box, the best of three of a point."""
    image, model, processor = photo(60, 40), SamModel.from_pretrained(sam).eval(), SamProcessor.from_pretrained(sam)
    together = refine.Refiner(str(sam), "cpu").masks(image, PLACES[prompt], prompt)
    for place, mask in zip(PLACES[prompt], together, strict=True):
        asked = {"input_boxes": [[place]]} if prompt == "box" else {"input_points": [[[place]]]}
        inputs = processor(image, **asked, return_tensors="pt")
        scaled = torch.tensor(place, dtype=torch.float64) * SIDE / 60  # the longer side fills what SAM sees
        given = inputs["input_boxes"][0, 0] if prompt == "box" else inputs["input_points"][0, 0, 0]
        torch.testing.assert_close(given.double(), scaled, atol=0.6, rtol=0)
        own = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()
               if name not in ("original_sizes", "reshaped_input_sizes")}  # fmt: skip
        with torch.inference_mode():
            answer = model(**own, multimask_output=prompt == "peak")
        assert answer.pred_masks.shape[2] == {"box": 1, "peak": 3}[prompt]
        best = int(answer.iou_scores[0, 0].argmax())
        whole = torch.nn.functional.interpolate(answer.pred_masks[0], (SIDE, SIDE), mode="bilinear")
        shown = torch.nn.functional.interpolate(whole[..., :43, :], (40, 60), mode="bilinear")  # 40 * 64 / 60 = 42.7
        assert mask.shape == (40, 60)
        assert (mask == (shown[0, best] > 0).numpy()).mean() > 0.999


def test_a_sam_without_all_its_weights_is_refused(sam, tmp_path):
    """transformers would fill in random ones, and masks would be made of them."""
    content = {"bbox": [1, 2, 30, 20], "peak": [10, 10], "image_file": str(tmp_path / "a.png")}
    (tmp_path / "1_bbox.json").write_text(json.dumps(content))
    shutil.copytree(sam, tmp_path / "sam")
    weights = load_file(tmp_path / "sam" / "model.safetensors")
    gone = next(name for name in weights if "vision_encoder.layers" in name)
    save_file({name: each for name, each in weights.items() if name != gone}, tmp_path / "sam" / "model.safetensors")
    arguments = ["--pred-root", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit, match=f"lacks 1 of its model's weights: {gone}"):
        refine.main([*arguments, "--sam", str(tmp_path / "sam")])
    with pytest.raises(SystemExit, match=f"^refine: {tmp_path} cannot be used: "):
        refine.main([*arguments, "--sam", str(tmp_path)])


def test_boxes_become_masks_in_files(sam, tmp_path, capsys):
    photo(60, 40).save(tmp_path / "a.png")
    photo(30, 50, seed=1).save(tmp_path / "b.png")
    boxes = {"1": ("a.png", [5, 6, 30, 20]), "2": ("b.png", [1, 1, 20, 40]), "3": ("a.png", [0, 0, 9, 9]),
             "none": ("a.png", None)}  # fmt: skip
    for name, (image, box) in boxes.items():
        content = {"bbox": box, "peak": [10, 10], "image_file": str(tmp_path / image)}
        (tmp_path / f"{name}_bbox.json").write_text(json.dumps(content))
    (tmp_path / "broken_bbox.json").write_text("{")
    arguments = ["--pred-root", str(tmp_path), "--sam", str(sam), "--device", "cpu"]
    refine.main([*arguments, "--out", str(tmp_path / "out")])
    report = json.loads(capsys.readouterr().out)
    assert (report["masks"], report["left_out"]) == (
        3,
        {"broken": "broken", "none": "it has no bbox with an image_file"},
    )
    refiner = refine.Refiner(str(sam), "cpu")
    for name, (image, box) in list(boxes.items())[:3]:
        with Image.open(tmp_path / image) as opened:
            (mask,) = refiner.masks(opened.convert("RGB"), [box], "box")
        assert (mask_of(f"{name}_mask.png", mask.shape[::-1], "it", tmp_path / "out") == mask).all()
    refine.main([*arguments, "--out", str(tmp_path / "points"), "--prompt", "peak"])
    assert json.loads(capsys.readouterr().out)["masks"] == 4
    with pytest.raises(SystemExit, match="has the masks of the heads themselves"):
        refine.main([*arguments, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no _bbox.json in"):
        refine.main(["--pred-root", str(tmp_path / "out"), "--out", str(tmp_path / "x"), "--sam", str(sam)])


def test_a_rerun_makes_only_the_masks_that_are_missing(sam, tmp_path, capsys, monkeypatch):
    """An image that cannot be read is left out alone; what is there is kept, and is of the same SAM and prompt."""
    (tmp_path / "broken.png").write_text("no picture")
    photo(60, 40).save(tmp_path / "right.png")
    for name, image in {"1": "broken", "2": "right", "3": "right"}.items():
        content = {"bbox": [5, 6, 30, 20], "peak": [10, 10], "image_file": str(tmp_path / f"{image}.png")}
        (tmp_path / f"{name}_bbox.json").write_text(json.dumps(content))
    out, asked, masks = tmp_path / "out", [], refine.Refiner.masks
    monkeypatch.setattr(refine.Refiner, "masks", lambda own, *asks: asked.append(len(asks[1])) or masks(own, *asks))
    arguments = ["--pred-root", str(tmp_path), "--sam", str(sam), "--device", "cpu", "--out", str(out)]
    refine.main(arguments)
    report = json.loads(capsys.readouterr().out)
    assert (report["masks"], asked) == (2, [2])
    assert report["left_out"].keys() == {"1"}
    assert f"cannot read {tmp_path / 'broken.png'} as an image" in report["left_out"]["1"]
    (out / "2_mask.png").unlink()
    (out / "3_mask.png").write_bytes(b"kept")
    photo(60, 40).save(tmp_path / "broken.png")
    refine.main(arguments)
    assert (json.loads(capsys.readouterr().out)["masks"], asked[1:]) == (3, [1, 1])
    assert (out / "3_mask.png").read_bytes() == b"kept"
    os.utime(tmp_path / "3_bbox.json", (9e9, 9e9))  # grounded again
    refine.main(arguments)
    assert (asked[3:], (out / "3_mask.png").read_bytes() == b"kept") == ([1], False)
    with pytest.raises(SystemExit, match="out has masks that were made otherwise .prompt was 'box' and is now 'peak'"):
        refine.main([*arguments, "--prompt", "peak"])


def test_what_localization_heads_leave_is_judged_and_refined(sam, tmp_path, monkeypatch):
    """A phrase in a picture through `ground`: its mask is 100 against itself as RLE, and SAM is shown its box."""
    monkeypatch.setattr(sys, "argv", ["vicrop ground"])  # Hydra reads it, and leaves it changed
    picture_of_signs = ROOT / "data/demo/images/scene_00006.jpg"
    ground_command.main([str(picture_of_signs), "the green sign", "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    (name,) = (path.name.removesuffix("_bbox.json") for path in folder.glob("*_bbox.json"))
    with Image.open(folder / f"{name}_mask.png") as image:
        own, size = np.asarray(image) > 0, image.size
    truth = {"id": name, "segmentation": rle(own), "width": size[0], "height": size[1]}
    (tmp_path / "gt.jsonl").write_text(json.dumps(truth) + "\n")
    assert evaluate_masks.evaluate(tmp_path / "gt.jsonl", folder)["cIoU"] == 100
    refine.main(["--pred-root", str(folder), "--out", str(tmp_path / "refined"), "--sam", str(sam), "--device", "cpu"])
    report = evaluate_masks.evaluate(tmp_path / "gt.jsonl", tmp_path / "refined")
    assert not report["wrong"]
    with Image.open(tmp_path / "refined" / f"{name}_mask.png") as image:
        new = np.asarray(image) > 0
    assert report["gIoU"] == pytest.approx(100 * (own & new).sum() / (own | new).sum())
    assert new.any()

    # A prediction that has become worse than nothing leaves no mask that would be scored in its place.
    (folder / f"{name}_bbox.json").write_text("{}")
    refine.main(["--pred-root", str(folder), "--out", str(tmp_path / "refined"), "--sam", str(sam), "--device", "cpu"])
    assert not (tmp_path / "refined" / f"{name}_mask.png").exists()
