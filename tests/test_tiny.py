"""The embedded model and its scenes: fair data, a real checkpoint, and answers that it generates."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import tiny.train
from get_score import exact
from info import GENERAL_PROMPT
from records import ROOT, load_task
from run import load_model, vicrop_qa
from tiny.models import make_llava
from tiny.scenes import SIZE_CLASSES, describe, make_scene, write_dataset
from tiny.train import GRID, IGNORE, PROMPT, STAGES, Language, pack, patch_labels, pixels, window_around
from tools.findings import attention_ratio

TINY = ROOT / "data/tiny/llava"
DEMO = ROOT / "data/demo"


@pytest.fixture(scope="module")
def untrained():
    return make_llava([PROMPT.format(question=GENERAL_PROMPT)])


# ------------------------------------------------------------------------------------------------------------ scenes
def test_a_scene_is_a_function_of_its_seed():
    first, again, other = (make_scene(random.Random(seed)).render() for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert first.size != other.size or not np.array_equal(first, other)


def test_signs_never_overlap_and_lie_inside():
    for seed in range(40):
        scene = make_scene(random.Random(seed))
        assert 1 <= len(scene.signs) <= 5
        assert len({sign.color for sign in scene.signs}) == len(scene.signs)
        for number, sign in enumerate(scene.signs):
            a, b, c, d = sign.box
            assert 0 <= a < c <= scene.size[0]
            assert 0 <= b < d <= scene.size[1]
            for other in scene.signs[number + 1 :]:
                e, f, g, h = other.box
                assert c <= e or g <= a or d <= f or h <= b


def test_a_window_shows_the_same_scene():
    scene = make_scene(random.Random(3))
    window = (100, 50, 300, 250)
    whole = np.asarray(scene.render().crop(window), dtype=int)
    assert np.abs(whole - np.asarray(scene.render(window), dtype=int)).mean() < 4


def test_a_crop_holds_the_sign_that_it_was_drawn_around():
    for seed in range(50):
        rng = random.Random(seed)
        scene = make_scene(rng)
        box = rng.choice(scene.signs).box
        x1, y1, x2, y2 = window_around(scene, rng, box)
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        assert x1 <= centre[0] <= x2
        assert y1 <= centre[1] <= y2
        assert min(x1, y1) >= -1e-6
        assert x2 <= scene.size[0] + 1e-6
        assert y2 <= scene.size[1] + 1e-6


def test_patch_labels_name_the_sign_under_the_patch():
    scene = make_scene(random.Random(5), sides=(0.2, 0.4))
    labels = patch_labels(scene)
    for sign in scene.signs:
        x, y = (sign.box[0] + sign.box[2]) / 2 / scene.size[0], (sign.box[1] + sign.box[3]) / 2 / scene.size[1]
        assert labels[int(y * GRID), int(x * GRID), 1] == int(sign.digit)
    assert (labels[..., 1] == IGNORE).sum() == (labels[..., 0] == 0).sum()


def test_a_dataset_has_all_sizes_and_is_reproducible(tmp_path):
    first = write_dataset(tmp_path / "a", seed=5, per_size=4)
    assert first == write_dataset(tmp_path / "b", seed=5, per_size=4)
    assert [r["question"] for r in first] != [r["question"] for r in write_dataset(tmp_path / "c", seed=6, per_size=4)]
    assert load_task(tmp_path / "a" / "data.json") == first
    for name, (low, high) in SIZE_CLASSES.items():
        members = [record for record in first if record["size"] == name]
        assert len(members) == 4
        for record in members:
            x1, y1, x2, y2 = record["gt_bbox"]
            assert (x2 - x1) * (y2 - y1) >= low * 450 * 450
            assert high == 1.0 or (x2 - x1 - 2) * (y2 - y1 - 2) <= high * 1300 * 1300


# ---------------------------------------------------------------------------------------------------------- training
def test_packed_turns_equal_turns_alone(untrained):
    model, processor = untrained
    language, rng = Language(processor.tokenizer), random.Random(0)
    scene = make_scene(rng)
    values = torch.from_numpy(pixels(scene, rng)).permute(2, 0, 1)[None].float() / 255
    prefix = [processor.tokenizer.bos_token_id] + [processor.tokenizer.image_token_id] * GRID**2
    turns = [language.turn(question, answer) for question, answer, _ in language.turns(scene, rng)]

    def logits(turns):
        length = len(prefix) + sum(len(prompt) + len(answer) for prompt, answer in turns)
        ids, labels, positions, mask = pack(prefix, turns, length, 0)
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": mask[None, None]}
        with torch.no_grad():
            return model(pixel_values=values, **inputs).logits[0][labels.roll(-1) != IGNORE]

    together = logits(turns)
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together, torch.cat([logits([turn]) for turn in turns]), atol=1e-4, rtol=1e-4)


def test_prompts_are_tokenised_as_the_processor_does(untrained):
    _, processor = untrained
    scene = make_scene(random.Random(1))
    prompt, _ = Language(processor.tokenizer).turn(GENERAL_PROMPT, describe(scene))
    whole = processor(images=scene.render(), text=PROMPT.format(question=GENERAL_PROMPT), return_tensors="pt")
    assert whole.input_ids[0, 1 + GRID**2 :].tolist() == prompt
    assert (whole.input_ids[0, 1 : 1 + GRID**2] == processor.tokenizer.image_token_id).all()


def test_crops_are_drawn_without_the_question(untrained):
    """The pixels of a pair are the same whatever is asked about them."""
    stage = STAGES["llava"][-1]
    language = Language(untrained[1].tokenizer)
    asked = stage.data(stage, 0, language)[7]
    language.turns = lambda scene, rng: [("is there a red sign in the image?", "no", None)]
    other = stage.data(stage, 0, language)[7]
    first = slice(0, 2 if asked["pair"] else 1)
    assert torch.equal(asked["pixels"][first], other["pixels"][first])


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    short = [dataclasses.replace(stage, steps=4, batch=2) for stage in STAGES["llava"]]
    monkeypatch.setitem(STAGES, "llava", short)
    monkeypatch.setattr("tiny.train.SAVE_EVERY", 2)
    monkeypatch.setattr("tiny.train.held_out", lambda *_: {})
    save = tiny.train.save_atomically

    def run(name, kill_at=None):
        """Train; if asked to, die right after the checkpoint of that number and begin again."""
        saved = []

        def save_and_die(state, path):
            save(state, path)
            saved.append(path)
            if len(saved) == kill_at:
                raise KeyboardInterrupt

        monkeypatch.setattr("tiny.train.save_atomically", save_and_die)
        arguments = ("llava", tmp_path / name, tmp_path / f"{name}.pt", torch.device("cpu"), 0)
        if kill_at:
            with pytest.raises(KeyboardInterrupt):
                tiny.train.train(*arguments)
        tiny.train.train(*arguments)
        return LlavaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()

    whole = run("whole")
    for kill_at in (1, 5):  # within the first stage, and after a later stage's first checkpoint
        resumed = run(f"killed{kill_at}", kill_at)
        assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


# ------------------------------------------------------------------------------------------------ what is committed
def test_the_demo_dataset_is_what_the_command_makes(tmp_path):
    records = load_task(DEMO / "data.json")
    assert len(records) >= 300
    seed = int(records[0]["id"].split("-")[0])
    again = write_dataset(tmp_path, seed, per_size=len(records) // 3)
    assert again == records
    assert sorted(path.name for path in (DEMO / "images").iterdir()) == sorted({r["image_path"] for r in records})


def test_the_checkpoint_loads_with_stock_transformers_and_is_small():
    assert isinstance(LlavaForConditionalGeneration.from_pretrained(TINY), LlavaForConditionalGeneration)
    assert AutoProcessor.from_pretrained(TINY).tokenizer.padding_side == "left"
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 10e6
    text = json.loads((TINY / "config.json").read_text())["text_config"]
    assert text["num_hidden_layers"] >= 6
    assert text["num_attention_heads"] >= 8


def test_the_crop_repairs_answers_about_small_signs():
    """A slice of what the README reports: on small signs the crop helps, and large ones are read without it."""
    model, processor = load_model("llava_tiny", device="cpu")
    records = load_task(DEMO / "data.json")
    scores = {}
    for size in ("small", "large"):
        for record in [record for record in records if record["size"] == size][:40]:
            picture = DEMO / "images" / record["image_path"]
            original, crop, _ = vicrop_qa("llava_tiny", "rel_att", picture, record["question"], model, processor)
            scores.setdefault(size, []).append((exact(original, record), exact(crop, record)))
    small, large = (np.mean(scores[size], axis=0) for size in ("small", "large"))
    assert small[1] >= small[0] + 20
    assert large.min() >= 80


# ---------------------------------------------------------------------------------------------------- attention ratio
def test_attention_ratio_of_an_even_map_is_one_and_of_a_planted_spot_is_large():
    region, box = (0, 0, 280, 140), (30, 40, 61, 85)
    assert attention_ratio(np.ones((14, 14)), region, box) == pytest.approx(1)
    spot = np.full((14, 14), 1e-3)
    spot[5, 2] = 1  # x 40 to 60, y 50 to 60
    assert attention_ratio(spot, region, box) > 10
    assert attention_ratio(spot, region, (200, 40, 231, 85)) < 0.5


def test_attention_ratio_equals_its_definition():
    rng = np.random.default_rng(0)
    att_map, region, box = rng.random((5, 7)), (10, 0, 52, 20), (17, 3, 29, 9)
    fine = np.kron(att_map, np.ones((4, 6)))  # one value per pixel
    sums = [fine[y : y + 6, x : x + 12].sum() for y in range(20 - 6 + 1) for x in range(42 - 12 + 1)]
    assert attention_ratio(att_map, region, box) == pytest.approx(fine[3:9, 7:19].sum() / np.mean(sums))
