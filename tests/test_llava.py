"""LLaVA's maps and answers equal the plain computation: eager attention, all attentions, full backward, no caches."""

import accelerate
import numpy as np
import pytest
import torch
from conftest import GENERAL, QUESTION, build_llava, photo
from torch.nn import functional as F

import attention
import llava_methods
from attention import MapFunction, ratio, relative_attention
from llava_methods import LlavaLook, grad_att, pure_grad, rel_att
from utils import edge_mask, high_res

METHODS = {"rel_att": rel_att, "grad_att": grad_att, "pure_grad": pure_grad}


def relative_error(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def plain(model, processor, image, prompt):
    """One eager forward of the processor's own inputs: (inputs, pixels, attentions, v), everything in the graph."""
    found = model.config._attn_implementation
    model.set_attn_implementation("eager")
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    pixels = inputs.pop("pixel_values").to(model.dtype).requires_grad_()
    output = model(**inputs, pixel_values=pixels, output_attentions=True)
    model.set_attn_implementation(found)
    return inputs.input_ids[0], pixels, output.attentions, output.logits[0, -1].float().log_softmax(-1).max()


def to_map(model, ids, row):
    cells = row[..., ids == model.config.image_token_id].float()
    if model.config.vision_feature_select_strategy == "full":
        cells = cells[..., 1:]
    side = int(cells.shape[-1] ** 0.5)
    return cells.unflatten(-1, (side, side))


def plain_rel_att(model, processor, image, layers):
    maps = []
    for layer in layers:
        pair = []
        for prompt in (QUESTION, GENERAL):
            ids, _, attentions, _ = plain(model, processor, image, prompt)
            pair.append(to_map(model, ids, attentions[layer][0, :, -1].float().mean(0)))
        maps.append(pair[0] / pair[1])
    return torch.stack(maps).mean(0).detach().numpy()


def plain_grad_att(model, processor, image, layers):
    ids, _, attentions, v = plain(model, processor, image, QUESTION)
    wanted = [attentions[layer] for layer in layers]
    gradients = torch.autograd.grad(v, wanted)
    weighted = [(a * g.relu())[0, :, -1].float().mean(0) for a, g in zip(wanted, gradients, strict=True)]
    return to_map(model, ids, torch.stack(weighted).mean(0)).detach().numpy()


def plain_pure_grad(model, processor, image, layers):
    norms = []
    for prompt in (QUESTION, GENERAL):
        _, pixels, _, v = plain(model, processor, image, prompt)
        norms.append(torch.autograd.grad(v, pixels)[0].float().norm(dim=1)[0])
    settings, patch = processor.image_processor, model.config.vision_config.patch_size
    shown = pixels[0].detach().float().permute(1, 2, 0).numpy() * settings.image_std + np.array(settings.image_mean)
    masked = (norms[0] / norms[1]) * torch.from_numpy(edge_mask(shown))
    return F.avg_pool2d(masked[None].float(), patch)[0].numpy()


PLAIN = {"rel_att": plain_rel_att, "grad_att": plain_grad_att, "pure_grad": plain_pure_grad}
TOLERANCE = {"rel_att": 1e-5, "grad_att": 1e-5, "pure_grad": 1e-4}


def cases(model, method):
    """(keywords, layers) for one layer, the last layer and the mean; pure_grad has no layers."""
    count = model.config.text_config.num_hidden_layers
    if method == "pure_grad":
        return [({}, ())]
    every = tuple(range(count))
    return [({"layer": 1}, (1,)), ({"layer": count - 1}, (count - 1,)), ({"layer": "mean"}, every)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(90, 70), (40, 130)])
def test_equals_plain_computation(shaped, method, size):
    model, processor = shaped
    image = photo(*size)
    for keywords, layers in cases(model, method):
        found = METHODS[method](image, QUESTION, GENERAL, model, processor, **keywords)
        wanted = PLAIN[method](model, processor, image, layers)
        assert found.dtype == np.float32
        assert found.shape == wanted.shape
        assert (found >= 0).all()
        assert relative_error(found, wanted) <= TOLERANCE[method], keywords


# In bfloat16 every step is rounded to 8 bits, in the plain computation too; so ours is held against the plain one in
# float32 on the same (rounded) weights. The stated bounds are shares of the map's maximum.
@pytest.mark.parametrize(("method", "bound"), [("rel_att", 0.05), ("grad_att", 0.05), ("pure_grad", 0.15)])
def test_bfloat16_stays_near_the_plain_computation(method, bound):
    model, processor = build_llava(layers=3)
    model.bfloat16()
    options = {} if method == "pure_grad" else {"layer": 1}
    found = METHODS[method](photo(), QUESTION, GENERAL, model, processor, **options)
    wanted = PLAIN[method](model.float(), processor, photo(), (1,))
    assert found.dtype == np.float32
    assert relative_error(found, wanted) <= bound


def state_of(model):
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return (
        [config._attn_implementation for config in configs],
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_any_attention_implementation_and_the_model_is_left_as_found(method, implementation):
    model, processor = build_llava(layers=3, attn_implementation=implementation)
    plain(model, processor, photo(), QUESTION)  # transformers installs hooks of its own at a model's first pass
    model.train()
    before, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    options = {} if method == "pure_grad" else {"layer": 1}
    with torch.inference_mode():
        inside = METHODS[method](photo(), QUESTION, GENERAL, model, processor, **options)
    outside = METHODS[method](photo(), QUESTION, GENERAL, model.eval(), processor, **options)
    assert np.array_equal(inside, outside)
    assert state_of(model.train()) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", [rel_att, grad_att])
def test_the_model_is_left_as_found_after_an_exception(llava, monkeypatch, method):
    model, processor = llava
    rel_att(photo(), QUESTION, GENERAL, model, processor, layer=1)
    before = state_of(model)
    monkeypatch.setattr("attention.Watch.read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        method(photo(), QUESTION, GENERAL, model, processor, layer=1)
    assert state_of(model) == before
    assert not attention._WATCHES


@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_model_gives_the_same_maps(method):
    model, processor = build_llava(layers=3)
    options = {} if method == "pure_grad" else {"layer": 1}
    wanted = METHODS[method](photo(), QUESTION, GENERAL, model, processor, **options)
    accelerate.cpu_offload(model)
    assert relative_error(METHODS[method](photo(), QUESTION, GENERAL, model, processor, **options), wanted) <= 1e-6
    assert next(model.parameters()).device.type == "meta"


def test_a_checkpoints_own_generation_settings_do_not_change_an_answer(llava, monkeypatch):
    model, processor = llava
    plain_answer = LlavaLook([photo()], model, processor).answer(QUESTION)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 50.0)
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    found = model.generation_config
    assert LlavaLook([photo()], model, processor).answer(QUESTION) == plain_answer
    assert model.generation_config is found


@pytest.mark.parametrize("center_crop", [True, False])
def test_answers_equal_stock_generation(center_crop):
    model, processor = build_llava(center_crop=center_crop)
    image, crop = photo(), photo(50, 50, seed=1)
    look = LlavaLook([image], model, processor)
    two = QUESTION.replace("<image>", "<image><image>")
    for found, images, text in (
        (look.answer(QUESTION), [image], QUESTION),
        (look.answer(QUESTION, layers=(0, 2)), [image], QUESTION),
        (look.answer(QUESTION, crops=[crop]), [image, crop], two),
    ):
        inputs = processor(images=images, text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        assert found == [processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip()]


def test_the_map_read_off_an_answer_is_the_map_of_its_own_pass(llava):
    model, processor = llava
    answering, looking = (LlavaLook([photo()], model, processor) for _ in range(2))
    answering.answer(QUESTION, layers=(1, 3))
    answering._base = None  # the question's map must come without another pass
    torch.testing.assert_close(answering.attention(QUESTION, (1, 3)), looking.attention(QUESTION, (1, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_images_equals_each_alone(llava, method):
    model, processor = llava
    images = [photo(seed=seed) for seed in range(3)]
    options = {} if method == "pure_grad" else {"layer": 2}
    together = METHODS[method](images, QUESTION, GENERAL, model, processor, **options)
    for image, found in zip(images, together, strict=True):
        assert relative_error(found, METHODS[method](image, QUESTION, GENERAL, model, processor, **options)) <= 1e-4


def test_the_order_of_questions_does_not_matter(llava):
    model, processor = llava
    look = LlavaLook([photo()], model, processor)
    first = look.answer(QUESTION), grad_att.of(look, QUESTION, GENERAL, 1), rel_att.of(look, QUESTION, GENERAL, 1)
    look.answer(QUESTION, crops=[photo(seed=4)])
    again = look.answer(QUESTION), grad_att.of(look, QUESTION, GENERAL, 1), rel_att.of(look, QUESTION, GENERAL, 1)
    assert first[0] == again[0]
    assert np.array_equal(first[1], again[1])
    assert np.array_equal(first[2], again[2])


@pytest.mark.parametrize("layer", [4, -1, 1.0, True, "all", [1, "mean"], [], None])
def test_a_layer_that_does_not_exist_names_the_range(llava, layer):
    with pytest.raises(ValueError, match="0 to 3"):  # None: LLaVA-1.5's own layer, which this small model does not have
        rel_att(photo(), QUESTION, GENERAL, *llava, layer=layer)


def test_a_list_of_layers_is_averaged(llava):
    one, two = (rel_att(photo(), QUESTION, GENERAL, *llava, layer=layer) for layer in (1, np.int64(2)))
    both = rel_att(photo(), QUESTION, GENERAL, *llava, layer=[2, 1, 1])
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-5)


def test_pure_grad_refuses_a_layer(llava):
    with pytest.raises(ValueError, match="reads pixels"):
        pure_grad(photo(), QUESTION, GENERAL, *llava, layer=1)


def test_the_default_layer_is_the_modules_constant(shaped, monkeypatch):
    monkeypatch.setattr(llava_methods, "ATT_LAYER", 2)
    default = rel_att(photo(), QUESTION, GENERAL, *shaped)
    assert np.array_equal(default, rel_att(photo(), QUESTION, GENERAL, *shaped, layer=2))
    assert not np.array_equal(default, rel_att(photo(), QUESTION, GENERAL, *shaped, layer=1))


@pytest.mark.parametrize("prompt", ["no image here", "<image> twice <image>", "nothing after <image>"])
def test_a_prompt_needs_one_image(llava, prompt):
    with pytest.raises(ValueError, match="LLaVA prompt"):
        rel_att(photo(), prompt, GENERAL, *llava, layer=1)


def test_ratio_is_finite_everywhere():
    a = torch.tensor([[[0.0, 0.2], [0.3, 0.4]]])
    b = torch.tensor([[[0.0, 0.0], [0.1, 0.8]]])
    torch.testing.assert_close(ratio(a, b), torch.tensor([[[1.0, 2.0], [3.0, 0.5]]]))
    assert ratio(a, torch.zeros_like(b)).isfinite().all()
    assert ratio(a, torch.full_like(b, 1e-40)).sum().isfinite()


# ------------------------------------------------------------------------------------------------------- geometry
def seen_part(image, processor):
    """The processor's own pixels of an image, as (H, W, 3) uint8."""
    settings = processor.image_processor
    pixels = settings(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    return (pixels * settings.image_std + np.array(settings.image_mean)).clip(0, 1) * 255


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 500), (5000, 300), (300, 5000), (1, 1), (7, 3)])
def test_the_region_is_what_the_processor_shows(llava, size):
    model, processor = llava
    look = LlavaLook([photo(*size)], model, processor)
    x1, y1, x2, y2 = look.regions[0]
    assert 0 <= x1 < x2 <= size[0]
    assert 0 <= y1 < y2 <= size[1]
    assert abs((x2 - x1) - min(size)) <= 1 + size[0] / 100
    if min(size) > 100:  # cutting the region out first shows the model (nearly) the same
        part = photo(*size).crop((x1, y1, x2, y2))
        assert np.abs(seen_part(photo(*size), processor) - seen_part(part, processor)).mean() < 8


def test_upstream_geometry_claims_the_whole_image(llava):
    assert LlavaLook([photo(640, 480)], *llava, geometry="upstream").regions == [(0, 0, 640, 480)]


def test_a_squashing_processor_sees_the_whole_image(squashing_llava):
    assert LlavaLook([photo(640, 480)], *squashing_llava).regions == [(0, 0, 640, 480)]


def test_padding_shows_the_whole_image_in_a_square(llava):
    look = LlavaLook([photo(640, 480), photo(480, 640)], *llava, image_fit="pad")
    assert look.regions == [(0, -80, 640, 560), (-80, 0, 560, 640)]
    white = photo(640, 480)
    white.paste((255, 255, 255), (0, 0, 640, 480))
    rows = LlavaLook([white], *llava, image_fit="pad").pixels[0].mean((0, 2))
    assert rows[0] < rows[len(rows) // 2]  # a band above, the image in the middle


@pytest.mark.parametrize("keyword", [{"geometry": "square"}, {"image_fit": "stretch"}])
def test_unknown_geometry_is_refused(llava, keyword):
    with pytest.raises(ValueError, match="not 'square'|'stretch'"):
        LlavaLook([photo()], *llava, **keyword)


@pytest.mark.parametrize("method", METHODS)
def test_one_token_after_the_image_is_enough(squashing_llava, method):
    options = {} if method == "pure_grad" else {"layer": 1}
    assert np.isfinite(METHODS[method](photo(), "USER: <image>?", "USER: <image>!", *squashing_llava, **options)).all()


@pytest.mark.parametrize("fit", ["processor", "pad"])
def test_tiles_of_a_centre_cropping_model_lose_nothing(llava, fit):
    """Every pixel of a high-resolution image is in some tile's region."""
    seen = []

    class Recording(LlavaLook):
        def __init__(self, images, *rest, **options):
            super().__init__(images, *rest, **options)
            seen.extend((image.size, region) for image, region in zip(self.images, self.regions, strict=True))

    func = MapFunction("recording", Recording, relative_attention)
    att_map = high_res(func, photo(600, 2000), QUESTION, GENERAL, *llava, layer=1, image_fit=fit)
    assert att_map.shape == (12, 4)
    tiles = seen[1:]  # the first look is at the whole image
    assert len(tiles) == 3
    assert [region for _, region in tiles] == [(0, 0, *size) for size, _ in tiles]
