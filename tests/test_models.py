"""What every method owes on every model: the plain computation's map, and a model that is left as it was found."""

import importlib

import accelerate
import numpy as np
import pytest
import torch
from builders import BUILDERS, KINDS, photo
from plain import PLAIN, PLAIN_KINDS

from vicrop import attention
from vicrop.adapter import REGISTRY
from vicrop.attribution import attention as attention_maps
from vicrop.attribution import edge_mask, weighted_attention
from vicrop.crop import model_module
from vicrop.heads import Criteria, greedy, smoothed
from vicrop.session import ImageSession, layer_numbers
from vicrop.tables import GENERAL_PROMPT, METHODS, MODELS

TOLERANCE = {"rel_att": 1e-5, "grad_att": 1e-5, "pure_grad": 1e-4, "loc_att": 1e-5, "question_att": 1e-5}
SOME_HEADS = [(2, 3), (1, 0), (1, 2)]  # in all of the models here
SIZES = [(90, 70), (40, 130), (210, 60)]


def relative_error(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def kind_of(name):
    return name.partition("-")[0]


def prompts(module, model, processor):
    adapter = module.ADAPTER(model, processor)
    return adapter.prompt("what number is on the red sign?"), adapter.prompt(GENERAL_PROMPT)


def layer_cases(model, method):
    """(keywords, what is read) for one layer, the last one and the mean; pure_grad has no layers, loc_att heads."""
    count = model.config.get_text_config().num_hidden_layers
    if method in WITHOUT_LAYERS:
        return [(some_layer(method), WITHOUT_LAYERS[method].get("heads", ()))]
    return [({"layer": 1}, (1,)), ({"layer": count - 1}, (count - 1,)), ({"layer": "mean"}, tuple(range(count)))]


WITHOUT_LAYERS = {"pure_grad": {}, "loc_att": {"heads": SOME_HEADS}}


def some_layer(method):
    return WITHOUT_LAYERS.get(method, {"layer": 1})


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    """(kind, method module, model, processor) of a model with three layers."""
    return request.param, model_module(request.param), *KINDS[request.param](layers=3)


def test_every_model_has_every_method_under_its_own_name():
    for family in KINDS:
        module = importlib.import_module(f"{family}_methods")
        assert module is model_module(family)  # one module under both names
        for short, long in (
            ("rel_att", "rel_attention"),
            ("grad_att", "gradient_attention"),
            ("pure_grad", "pure_gradient"),
            ("loc_att", "localization_attention"),
            ("question_att", "question_attention"),
        ):
            assert getattr(module, short) is getattr(module, f"{long}_{family}")
            assert getattr(module, short).__name__ == f"{long}_{family}"
        assert {row["map"] for row in METHODS.values() if "map" in row} <= set(dir(module))


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_plain_computation(shaped, method, size):
    name, model, processor = shaped
    module, image = model_module(kind_of(name)), photo(*size)
    prompt, general = prompts(module, model, processor)
    for keywords, layers in layer_cases(model, method):
        found = getattr(module, method)(image, prompt, general, model, processor, **keywords)
        wanted = PLAIN[method](PLAIN_KINDS[kind_of(name)], model, processor, image, prompt, general, layers)
        assert found.dtype == np.float32
        assert found.shape == wanted.shape
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        assert found.std() > 0
        assert relative_error(found, wanted) <= TOLERANCE[method], keywords


def test_the_map_covers_the_image_or_what_the_processor_shows_of_it(shaped):
    name, model, processor = shaped
    (layout,) = ImageSession([photo(200, 100)], model, processor).layouts
    assert layout.region == ((50, 0, 150, 100) if kind_of(name) == "llava" else (0, 0, 200, 100))
    h, w = layout.grid
    assert (w > h) == (kind_of(name) in ("llava_next", "qwen2_5"))  # these keep the aspect ratio


def test_every_method_gives_its_own_map(small):
    _, module, model, processor = small
    ask = (photo(), *prompts(module, model, processor), model, processor)
    maps = [getattr(module, method)(*ask, **some_layer(method)) for method in PLAIN]
    assert len({att_map.tobytes() for att_map in maps}) == len(PLAIN)


def decided_photo(kind, model, processor, prompt):
    """The one of some pictures for which the likeliest token leads by most: rounding must not make it another token."""
    leads = {}
    for seed in range(8):
        top = PLAIN_KINDS[kind](model, processor, photo(seed=seed), prompt).logits.detach().topk(2).values
        leads[float(top[0] - top[1])] = seed
    return photo(seed=leads[max(leads)])


# In bfloat16 every step is rounded to 8 bits, in the plain computation too; so ours is held against the plain one in
# float32 on the same (rounded) weights. The stated bounds are shares of the map's maximum.
BOUNDS = {"rel_att": 0.05, "grad_att": 0.05, "pure_grad": 0.15, "loc_att": 0.05, "question_att": 0.05}


@pytest.mark.parametrize(("method", "bound"), BOUNDS.items())
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_the_plain_computation(kind, method, bound):
    module, (model, processor) = model_module(kind), KINDS[kind](layers=3)
    prompt, general = prompts(module, model, processor)
    model.bfloat16().float()
    image = decided_photo(kind, model, processor, prompt)
    read = WITHOUT_LAYERS.get(method, {}).get("heads", (1,))
    wanted = PLAIN[method](PLAIN_KINDS[kind], model, processor, image, prompt, general, read)
    found = getattr(module, method)(image, prompt, general, model.bfloat16(), processor, **some_layer(method))
    assert found.dtype == np.float32
    assert relative_error(found, wanted) <= bound


def state_of(model):
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return (
        [config._attn_implementation for config in configs],
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        getattr(model.model, "rope_deltas", None) if hasattr(model, "model") else None,
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_attention_implementation_and_the_model_is_left_as_found(kind, method, implementation):
    module, (model, processor) = model_module(kind), KINDS[kind](layers=3, attn_implementation=implementation)
    ask = (photo(), *prompts(module, model, processor), model, processor)
    PLAIN_KINDS[kind](model, processor, photo(), ask[1])  # transformers installs hooks of its own at a first pass
    model.train()
    before, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    function = getattr(module, method)
    with torch.inference_mode():
        inside = function(*ask, **some_layer(method))
    outside = function(*ask[:3], model.eval(), processor, **some_layer(method))
    assert np.array_equal(inside, outside)
    assert state_of(model.train()) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["rel_att", "grad_att"])
def test_the_model_is_left_as_found_after_an_exception(small, monkeypatch, method):
    _, module, model, processor = small
    ask = (photo(), *prompts(module, model, processor), model, processor)
    getattr(module, method)(*ask, layer=1)
    before = state_of(model)
    monkeypatch.setattr("vicrop.attention.AttentionCapture.read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        getattr(module, method)(*ask, layer=1)
    assert state_of(model) == before
    assert not attention._CAPTURES


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_gives_the_same_maps_and_answers(kind, method):
    module, (model, processor) = model_module(kind), KINDS[kind](layers=3)
    prompt, general = prompts(module, model, processor)
    ask = (photo(), prompt, general, model, processor)
    wanted = getattr(module, method)(*ask, **some_layer(method))
    answer = ImageSession([photo()], model, processor).answer(prompt)
    accelerate.cpu_offload(model)
    assert relative_error(getattr(module, method)(*ask, **some_layer(method)), wanted) <= 1e-6
    assert ImageSession([photo()], model, processor).answer(prompt) == answer
    assert next(model.parameters()).device.type == "meta"


def stock_answer(kind, model, processor, images, prompt):
    """What `generate` makes of the processor's own inputs, with another image's place after the first if need be."""
    if kind == "blip" and len(images) == 2:
        return stock_blip_answer(model, processor, images, prompt)
    block = "<|vision_start|><|image_pad|><|vision_end|>" if kind == "qwen2_5" else "<image>"
    text = prompt.replace(block, block * len(images))
    inputs = PLAIN_KINDS[kind].prepare(Stub(model, processor), images, text)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class Stub:
    def __init__(self, model, processor):
        self.model, self.processor = model, processor


def stock_blip_answer(model, processor, images, prompt):
    """Two images for InstructBLIP: the Q-Former's outputs for each, one after the other. Its processor knows one."""
    inputs = [processor(images=image, text=prompt, return_tensors="pt") for image in images]
    features = [
        model.get_image_features(each["pixel_values"], each["qformer_input_ids"], each["qformer_attention_mask"])
        for each in inputs
    ]
    embeds = [model.get_input_embeddings()(inputs[0]["input_ids"][:, model.config.num_query_tokens :])]
    embeds = torch.cat([each.pooler_output for each in features] + embeds, 1)
    output = model.language_model.generate(inputs_embeds=embeds, max_new_tokens=20, do_sample=False)
    return processor.tokenizer.decode(output[0], skip_special_tokens=True).strip()


def test_answers_equal_stock_generation(small):
    kind, module, model, processor = small
    image, crop = photo(), photo(50, 50, seed=1)
    prompt, _ = prompts(module, model, processor)
    session = ImageSession([image], model, processor)
    alone, pair = (stock_answer(kind, model, processor, images, prompt) for images in ([image], [image, crop]))
    assert alone
    assert session.answer(prompt) == [alone]
    assert session.answer(prompt, layers=(0, 2)) == [alone]
    assert session.answer(prompt, crops=[crop]) == [pair]


def test_an_answer_ends_where_the_checkpoint_ends_it(small, monkeypatch):
    kind, module, model, processor = small
    prompt, _ = prompts(module, model, processor)
    session, scripts = ImageSession([photo()], model, processor), []
    decode = processor.tokenizer.decode
    monkeypatch.setattr(
        processor.tokenizer, "decode", lambda ids, **options: scripts.append(ids) or decode(ids, **options)
    )
    session.answer(prompt)
    (whole,) = scripts
    assert len(whole) == 20
    ends = [whole[7], len(processor.tokenizer)]
    generator = model.language_model if kind == "blip" else model
    monkeypatch.setattr(generator.generation_config, "eos_token_id", ends)
    monkeypatch.setattr(generator.generation_config, "repetition_penalty", 50.0)  # no other setting counts
    session.answer(prompt)
    assert scripts[1] == whole[: whole.index(whole[7])]


def test_the_map_read_off_an_answer_is_the_map_of_its_own_pass(small):
    _, module, model, processor = small
    prompt, _ = prompts(module, model, processor)
    answering, looking = (ImageSession([photo()], model, processor) for _ in range(2))
    answering.answer(prompt, layers=(1, 2))
    answering.prefill = None  # the question's map must come without another pass
    torch.testing.assert_close(*(attention_maps(each, prompt, (1, 2)) for each in (answering, looking)))


MIXED = [photo(90, 70), photo(40, 130, seed=1), photo(210, 60, seed=2)]  # pictures of several sizes and aspect ratios
QUESTIONS = [
    "what number is on the red sign?",
    "why?",
    "is there a blue sign in the image, or is it a green one?",
    "who?",
]
OF = [0, 2, 1, 2]  # the image of each question


@pytest.mark.parametrize("method", PLAIN)
def test_a_batch_of_images_equals_each_alone(small, method):
    _, module, model, processor = small
    rest = (*prompts(module, model, processor), model, processor)
    function = getattr(module, method)
    together = function(MIXED, *rest, **some_layer(method))
    for image, found in zip(MIXED, together, strict=True):
        assert relative_error(found, function(image, *rest, **some_layer(method))) <= 1e-5


@pytest.mark.parametrize("method", PLAIN)
def test_a_batch_of_questions_equals_each_alone(small, method):
    """Prompts of several lengths about images of several sizes, two of them about the same one."""
    _, module, model, processor = small
    session, function = ImageSession(MIXED, model, processor), getattr(module, method)
    asked, general = [session.adapter.prompt(each) for each in QUESTIONS], session.adapter.prompt(GENERAL_PROMPT)
    together = function.bind(model, **some_layer(method)).maps(session, asked, general, of=OF)
    for prompt, image, found in zip(asked, OF, together, strict=True):
        alone = function(MIXED[image], prompt, general, model, processor, **some_layer(method))
        assert found.shape == alone.shape
        assert relative_error(found, alone) <= 1e-5


@pytest.mark.parametrize("layers", [(), (0, 2)])
def test_a_batch_of_answers_equals_each_alone(small, layers):
    _, module, model, processor = small
    session, crops = ImageSession(MIXED, model, processor), [photo(50, 30, seed=seed) for seed in range(3)]
    crops.append(photo(33, 90))
    asked = [session.adapter.prompt(question) for question in QUESTIONS]
    answers, pairs = session.answer(asked, layers=layers, of=OF), session.answer(asked, crops=crops, of=OF)
    assert session.batched
    for number, (prompt, image) in enumerate(zip(asked, OF, strict=True)):
        alone = ImageSession([MIXED[image]], model, processor)
        assert answers[number] == alone.answer(prompt)[0]
        assert pairs[number] == alone.answer(prompt, crops=[crops[number]])[0]
        if layers:  # read off the batch's own first pass
            found = attention_maps(session, asked, layers, of=OF)[number]
            torch.testing.assert_close(found, attention_maps(alone, prompt, layers)[0], atol=1e-6, rtol=1e-4)


def test_questions_about_one_image_share_its_pass(small):
    kind, module, model, processor = small
    session, seen = ImageSession(MIXED, model, processor), []
    encode, begun = session.adapter.encode_images, session.store.beginnings
    session.adapter.encode_images = lambda inputs, count: seen.append(count) or encode(inputs, count)
    asked = [session.adapter.prompt(question) for question in QUESTIONS]
    session.answer(asked, of=OF)
    attention_maps(session, asked, (1,), of=OF)
    assert seen == [len(MIXED)]
    assert session.store.shared == (kind != "blip")  # a Q-Former reads the question, too
    assert len(begun) == (len(QUESTIONS) if kind == "blip" else len(MIXED))
    weighted_attention(session, asked, (1,), of=OF)
    assert seen == [len(MIXED)]
    rows, prefill = [], session.prefill
    session.prefill = lambda batch, *more, **how: rows.append(len(batch)) or prefill(batch, *more, **how)
    attention_maps(session, [session.adapter.prompt(GENERAL_PROMPT)] * len(OF), (1,), of=OF)
    assert rows == [len(set(OF))]


def test_the_order_of_questions_does_not_matter(small):
    _, module, model, processor = small
    prompt, general = prompts(module, model, processor)
    session = ImageSession([photo()], model, processor)
    methods = [method.bind(model, 1) for method in (module.grad_att, module.rel_att)]
    maps = [method.maps(session, prompt, general) for method in methods]
    first = session.answer(prompt)
    session.answer(prompt, crops=[photo(seed=4)])
    attention_maps(session, general, (0, 1))
    assert session.answer(prompt) == first
    fresh = ImageSession([photo()], model, processor)
    again = [method.maps(fresh, prompt, general) for method in methods]
    assert all(np.array_equal(one, other) for one, other in zip(maps, again, strict=True))


@pytest.mark.parametrize("layer", [3, -1, 1.0, True, "all", [1, "mean"], [], None])
def test_a_layer_that_does_not_exist_names_the_range(small, layer):
    _, module, model, processor = small  # None: the family's own layer, which this small model does not have
    with pytest.raises(ValueError, match="0 to 2"):
        module.rel_att(photo(), *prompts(module, model, processor), model, processor, layer=layer)


def test_a_list_of_layers_is_averaged(small):
    _, module, model, processor = small
    ask = (photo(), *prompts(module, model, processor), model, processor)
    one, two = (module.rel_att(*ask, layer=layer) for layer in (1, np.int64(2)))
    np.testing.assert_allclose(module.rel_att(*ask, layer=[2, 1, 1]), (one + two) / 2, rtol=1e-5)


def test_pure_grad_refuses_a_layer(small):
    _, module, model, processor = small
    with pytest.raises(ValueError, match="reads pixels"):
        module.pure_grad(photo(), *prompts(module, model, processor), model, processor, layer=1)


def test_the_default_layer_is_the_modules_constant_or_the_checkpoints_own(small, monkeypatch):
    kind, module, model, processor = small
    ask = (photo(), *prompts(module, model, processor), model, processor)
    monkeypatch.setattr(module, "LM_LAYER" if kind == "blip" else "ATT_LAYER", 2)
    assert np.array_equal(module.rel_att(*ask), module.rel_att(*ask, layer=2))
    monkeypatch.setattr(model.config, "att_layer", 1, raising=False)
    assert np.array_equal(module.rel_att(*ask), module.rel_att(*ask, layer=1))
    assert not np.array_equal(module.rel_att(*ask, layer=1), module.rel_att(*ask, layer=2))


def test_unknown_geometry_is_refused(small):
    _, module, model, processor = small
    with pytest.raises(ValueError, match="not 'square'"):
        ImageSession([photo()], model, processor, geometry="square")


@pytest.mark.parametrize("geometry", ["exact", "upstream"])
def test_the_edge_mask_covers_the_models_input(shaped, geometry):
    name, model, processor = shaped
    session = ImageSession([photo(200, 100)], model, processor, geometry=geometry)
    mask, (h, w) = edge_mask(session), session.layouts[0].grid
    assert mask.dtype == torch.bool
    assert mask.shape[0] // h == mask.shape[1] // w
    assert 0.2 < mask.float().mean() <= 0.5


def test_builders_cover_every_module():
    own = {MODELS[kind_of(name)]["module"] for name in BUILDERS}
    assert own == {f"vicrop.models.{name}" for name in ("llava", "llava_next", "instructblip", "qwen2_5_vl")}
    assert {row["module"] for row in MODELS.values()} <= set(REGISTRY.values())  # the others: tests/test_families.py


def test_the_heads_of_each_image_are_its_best(small):
    """Without heads, loc_att reads those that pass both criteria in this image: in a batch as alone."""
    _, module, model, processor = small
    prompt, general = prompts(module, model, processor)
    session = ImageSession(MIXED, model, processor)
    criteria = Criteria()
    every = attention_maps(session, prompt, layer_numbers(model, "mean"))
    for found, maps in zip(module.loc_att.maps(session, prompt, general), every, strict=True):
        best = greedy(criteria.measure(maps.numpy()), criteria)
        assert best
        wanted = sum(smoothed(maps[head].numpy()) for head in best)
        assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize(("heads", "message"), [([(3, 0)], "L3H0 .* layers 0 to 2"), ("L0H9", "heads 0 to 3")])
def test_a_head_that_does_not_exist_names_the_range(small, heads, message):
    _, module, model, processor = small
    with pytest.raises(ValueError, match=message):
        module.loc_att(photo(), *prompts(module, model, processor), model, processor, heads=heads)


def test_what_a_method_does_not_read_is_an_error(small):
    _, module, model, processor = small
    ask = (photo(), *prompts(module, model, processor), model, processor)
    with pytest.raises(ValueError, match="reads layers: heads="):
        module.rel_att(*ask, layer=1, heads="L1H0")
    with pytest.raises(ValueError, match="reads heads: layer=1"):
        module.loc_att(*ask, layer=1)
