"""`vicrop check` and the guard at first use: what differs from the stock model is found, said, and refused."""

import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from architectures import ADAPTERS, deepstack, windowed
from builders import KINDS, build_llava, build_llava_next, photo
from strangers import STRANGERS

from vicrop import adapter as adapters
from vicrop import check, guard, load_model, verify
from vicrop.app.command import embedded
from vicrop.crop import adapter_of, vicrop_qa
from vicrop.evaluation import command as run
from vicrop.evaluation import score_table as get_score
from vicrop.evaluation.scores import ScoreOptions
from vicrop.layouts import Layout, raster
from vicrop.localization import ground_command
from vicrop.models.llava import LlavaAdapter
from vicrop.models.llava_next import LlavaNextAdapter
from vicrop.probe import Owners, Pixels, pixels_of, probed_grid, probed_picture, token_owners
from vicrop.session import ImageSession


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Verdicts of these tests are kept for these tests."""
    monkeypatch.setenv("VICROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


@pytest.fixture
def registered(monkeypatch):
    """(model_type, adapter) -> a family as a user would register it."""

    def register(kind, adapter):
        monkeypatch.setitem(sys.modules, f"adapter_of_{kind}", types.SimpleNamespace(ADAPTER=adapter))
        monkeypatch.setitem(adapters.REGISTRY, kind, f"adapter_of_{kind}")

    return register


def differs(model, processor, size=verify.SIZES[0]):
    """What is found to differ on one picture."""
    return verify.verify_picture(ImageSession([verify.picture(size)], model, processor)).differs


# ----------------------------------------------------------------------------------------------- what holds is let pass
@pytest.mark.parametrize("name", embedded())
def test_the_embedded_models_pass(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main([name, "--json", str(tmp_path / "found.json")])
    assert ended.value.code == 0
    found, said = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    assert found["differs"] == []
    assert found["seconds"] > 0
    assert "all holds" in said
    for part in ("twin", "loaded"):
        report = found[part]
        assert report["attention_layers"] == list(range(report["layers"]))
        for each in report["pictures"]:
            assert {"rows", "logits", "with crop"} <= each["errors"].keys()
            assert f"{each['tokens']} image tokens, map {each['grid'][0]} x {each['grid'][1]}" in said
    assert [each["size"] for each in found["twin"]["pictures"]] == [list(size) for size in verify.SIZES]


def test_llava_next_passes_at_two_aspect_ratios():
    report = verify.verify(*build_llava_next())
    assert report.differs == []
    assert [each.layout for each in report.pictures] == ["probed"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_finds_the_cells_of_the_formula(kind):
    model, processor = KINDS[kind]()
    session = ImageSession([photo(230, 410)], model, processor)
    pixels, owners = pixels_of(session.adapter, (230, 410)), token_owners(session.adapter, session.inputs)
    index, edges = probed_grid(pixels, owners)
    assert np.array_equal(index, session.layouts[0].index)
    sides = np.array([230, 410, 230, 410])
    assert np.abs(np.array(edges) * sides - session.layouts[0].region).max() < 1.5


def two_pictures():
    """(Pixels, Owners) of the same 4 x 8 pixels twice, each cut into 2 x 4 tokens."""
    shape = (2, 3, 4, 8)
    x, y = (np.arange(8) + 0.5) / 8, (np.arange(4)[:, None] + 0.5) / 4
    tokens = raster(2, 4).repeat(2, 0).repeat(2, 1) + np.arange(2)[:, None, None, None] * 8
    places = [np.broadcast_to(each, shape).copy() for each in (x, y, np.arange(3)[:, None, None])]
    pixels = Pixels(*places, shows=np.ones(shape, dtype=bool), placed=np.ones(shape, dtype=bool))
    return pixels, Owners(np.broadcast_to(tokens, shape).copy(), np.ones(shape), 16)


def test_an_overview_as_fine_as_the_tiles_leaves_these_their_grid():
    pixels, owners = two_pictures()
    index, edges = probed_grid(pixels, owners)
    assert np.array_equal(index, raster(2, 4))
    assert np.allclose(edges, (0, 0, 1, 1))
    pixels.placed[1, :, :2, :2] = False  # a part of it has no place
    with pytest.raises(ValueError, match="make no grid"):
        probed_grid(pixels, owners)


def test_the_probes_picture_has_each_pixel_in_its_place():
    pixels, owners = two_pictures()
    picture = probed_picture(pixels, owners, *probed_grid(pixels, owners))
    assert np.array_equal(picture, np.arange(3 * 4 * 8).reshape(3, 4, 8))
    for name in ("x", "y"):
        scattered = pixels._replace(**{name: getattr(pixels, name)[..., ::-1, ::-1]})  # rows of patches, say
        assert probed_picture(scattered, owners, raster(2, 4), (0, 0, 1, 1)) is None


# ----------------------------------------------------------------------------------------------- what is wrong is found
class ShiftedLlava(LlavaAdapter):
    def layouts(self, inputs, sizes):
        found = super().layouts(inputs, sizes)
        return [layout._replace(index=np.roll(layout.index, 1, axis=1)) for layout in found]


class WrongNewline(LlavaNextAdapter):
    def layouts(self, inputs, sizes):
        found = super().layouts(inputs, sizes)
        return [layout._replace(index=raster(*layout.grid, int(layout.index.min()))) for layout in found]


class LostEdge(LlavaAdapter):
    """A map that leaves out what the leftmost column shows."""

    def layouts(self, inputs, sizes):
        return [self.cut(layout) for layout in super().layouts(inputs, sizes)]

    def cut(self, layout):
        x1, y1, x2, y2 = layout.region
        region = x1 + (x2 - x1) // layout.grid[1], y1, x2, y2
        return Layout(layout.num_tokens, layout.index[:, 1:], region)


class IgnoredCrop(LlavaAdapter):
    """A family whose further images go unseen, as those of BLIP-2 do."""

    def forward_inputs(self, prompt, ids, images):
        return super().forward_inputs(prompt, ids, [images[0]] * len(images))


@pytest.mark.parametrize(
    ("adapter", "build", "says"),
    [(ShiftedLlava, build_llava, "16 of its 16 cells hold another token"),
     (WrongNewline, build_llava_next, "of its 32 cells hold another token"),
     (LostEdge, build_llava, "no cell covers it"),
     (IgnoredCrop, build_llava, "the crop changes nothing")],
)  # fmt: skip
def test_a_wrong_layout_and_an_unseen_crop_are_found(registered, adapter, build, says):
    model, processor = build()
    assert differs(model, processor) == []
    registered(model.config.model_type, adapter)
    assert any(says in sentence for sentence in differs(model, processor))


class DroppedDeepstack(ADAPTERS["qwen3_vl"]):
    def encode_images(self, inputs, count):
        found = super().encode_images(inputs, count)
        return [each._replace(deepstack=tuple(map(torch.zeros_like, each.deepstack))) for each in found]


class LostMask(ADAPTERS["gemma3"]):
    def forward_inputs(self, prompt, ids, images):
        found = super().forward_inputs(prompt, ids, images)
        return {name: value for name, value in found.items() if name != "token_type_ids"}


@pytest.mark.parametrize(
    ("build", "right", "wrong"),
    [(deepstack, ADAPTERS["qwen3_vl"], DroppedDeepstack), (windowed, ADAPTERS["gemma3"], LostMask)],
    ids=["deepstack", "mask"],
)
def test_a_dropped_feature_and_a_lost_mask_are_found(registered, build, right, wrong):
    model, processor = build()
    registered(model.config.model_type, right)
    assert differs(model, processor) == []
    registered(model.config.model_type, wrong)
    found = differs(model, processor)
    assert any(sentence.startswith("rows: ") for sentence in found)
    assert any(sentence.startswith("logits: ") for sentence in found)


def test_tokens_that_are_not_the_processors_are_found(registered):
    class Bare(LlavaAdapter):
        def tokenize(self, prompt, counts):
            return super().tokenize(prompt, counts)[1:]

    model, processor = build_llava()
    registered("llava", Bare)
    assert "the prompt's tokens are not those that its processor makes" in differs(model, processor)


def test_a_check_leaves_the_model_as_it_was():
    model, processor = build_llava()
    model.set_attn_implementation("sdpa")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    verify.verify_loaded(model.train(), processor)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


# --------------------------------------------------------------------------------------- families that no adapter knows
@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """(kind) -> a folder with a checkpoint of a family that no adapter knows."""
    root = tmp_path_factory.mktemp("strangers")
    for kind, build in STRANGERS.items():
        for part in build():
            part.save_pretrained(root / kind)
    return lambda kind: root / kind


@pytest.mark.parametrize("kind", STRANGERS)
def test_an_unknown_family_is_checked_once_and_used(stranger, own_cache, monkeypatch, kind):
    model, processor = load_model(str(stranger(kind)), device="cpu")
    assert len(list(own_cache.iterdir())) == 2  # of the twin, and of the loaded model
    for name in ("verify_twin", "verify_loaded"):
        monkeypatch.setattr(guard, name, lambda *_, **__: 1 / 0)
    model, processor = load_model(str(stranger(kind)), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no layer is known of it
        for method in ("rel_att", "grad_att", "pure_grad", "loc_att"):
            original, _, box = vicrop_qa(str(stranger(kind)), method, photo(), "why?", model, processor)
            assert box[0] < box[2]
    session = ImageSession([photo(), photo(60, 150)], model, processor)
    prompt = session.adapter.prompt("why?")
    alone = [ImageSession([image], model, processor).answer(prompt)[0] for image in session.images]
    assert session.answer(prompt) == alone
    assert original


def test_a_refused_one_is_refused_again_without_loading(stranger, own_cache, monkeypatch):
    folder = str(stranger("deepseek_vl"))
    module = sys.modules[adapter_of(folder).__module__]
    tokenize = module.DefaultAdapter.tokenize
    with monkeypatch.context() as patch:
        patch.setattr(module.DefaultAdapter, "tokenize", lambda *given: tokenize(*given)[1:])
        with pytest.raises(ValueError, match="gives something else than its stock model"):
            load_model(folder, device="cpu")
    for name in ("verify_twin", "verify_loaded"):
        monkeypatch.setattr(guard, name, lambda *_, **__: 1 / 0)
    monkeypatch.setattr(module, "MODEL_CLASS", None)
    with pytest.raises(ValueError, match="the prompt's tokens are not those that its processor makes") as refused:
        load_model(folder, device="cpu")
    assert "\n" not in str(refused.value)
    assert len(list(own_cache.iterdir())) == 1


def test_a_model_of_an_unknown_family_that_was_not_checked_is_refused():
    model, processor = STRANGERS["deepseek_vl"]()
    with pytest.raises(ValueError, match="no adapter knows deepseek_vl models: load it by load_model"):
        ImageSession([photo()], model, processor)


# ------------------------------------------------------------------------------------------------ any folder as --model
@pytest.fixture
def folder(tmp_path):
    for part in build_llava():
        part.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def asked(tmp_path, folder, *more):
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for name in "ab":
        photo(120, 90, seed=ord(name)).save(images / f"{name}.png")
    records = [{"id": name, "question": f"{name}?", "labels": ["1"], "image_path": f"{name}.png"} for name in "ab"]
    (tmp_path / "data.json").write_text(json.dumps(records))
    given = ["--model", folder, "--question_path", tmp_path / "data.json", "--save_path", tmp_path / "out"]
    return [str(each) for each in [*given, "--device", "cpu", "--layer", "mean", *more]]


def test_a_folder_runs_resumes_and_scores(folder, tmp_path, capsys, monkeypatch):
    run.main(asked(tmp_path, folder, "--limit", "1"))
    run.main(asked(tmp_path, folder))
    (path,) = [each for each in (tmp_path / "out").glob("*.json") if "meta" not in each.name]
    assert path.name.startswith("weights~")
    assert [record["id"] for record in json.loads(path.read_text())] == ["a", "b"]
    meta = json.loads(path.with_suffix(".meta.json").read_text())
    assert meta["settings"]["model"] == meta["settings"]["model_id"]
    monkeypatch.chdir(tmp_path)  # typed otherwise it is the same folder
    run.main(asked(tmp_path, "./weights"))
    (row,) = get_score.report(tmp_path / "out", tmp_path, ScoreOptions())[:1]
    assert row["model"] == meta["settings"]["model"]


def test_another_prompt_is_another_run(folder, tmp_path, capsys):
    run.main(asked(tmp_path, folder))
    with pytest.raises(SystemExit, match="prompt was"):
        run.main(asked(tmp_path, folder, "--prompt", "{question} In one word."))
    run.main(asked(tmp_path, folder, "--prompt", "{question} In one word.", "--overwrite"))
    (meta,) = (tmp_path / "out").glob("*.meta.json")
    assert json.loads(meta.read_text())["settings"]["prompt"] == "{question} In one word."
    with pytest.raises(SystemExit):
        run.main(asked(tmp_path, folder, "--prompt", "In one word."))
    assert "prompt must hold {question} exactly once" in capsys.readouterr().err


def test_a_prompt_takes_the_place_of_the_instruction_or_of_the_template(folder):
    model, processor = load_model(str(folder), device="cpu")
    given = {"{question} Briefly.": "<image>\nUSER: why? Briefly.\nASSISTANT:", "<image>{question}": "<image>why?"}
    for template, prompt in given.items():
        assert LlavaAdapter(model, processor, prompt=template).prompt("why?") == prompt


def test_a_folder_is_grounded_by_its_path(folder, tmp_path, capsys):
    photo().save(tmp_path / "a.png")
    out = tmp_path / "found"
    ground_command.main(
        [str(tmp_path / "a.png"), "why?", "--model", str(folder), "--out", str(out), "model.device=cpu"]
    )
    assert len(list(out.rglob("*_bbox.json"))) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llava_tinny", "unknown model 'llava_tinny': did you mean llava_tiny? Choose from llava, "),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
    ],
)
def test_a_name_that_is_none_is_said(tmp_path, capsys, name, says):
    with pytest.raises(SystemExit):
        run.main(asked(tmp_path, name))
    assert says in capsys.readouterr().err


def test_a_text_model_is_no_model_to_look_with(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(SystemExit):
        run.main(asked(tmp_path, folder))
    assert "is a bert checkpoint, and that is no image-text model of transformers" in capsys.readouterr().err
