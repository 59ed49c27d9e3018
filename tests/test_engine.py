"""The engine gives what the model's own forward gives, whatever the decoder is handed; or it refuses."""

import types

import accelerate
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, capped, registered  # noqa: F401
from builders import KINDS, photo
from test_models import relative_error, state_of
from transformers import DynamicCache

from vicrop import attention, decoder_call, prefix_cache
from vicrop import session as session_module
from vicrop.attribution import attention as attention_maps
from vicrop.attribution import weighted_attention
from vicrop.crop import model_module
from vicrop.heads import smoothed
from vicrop.session import ImageSession, layer_numbers

QUESTIONS = ["what number is on the red sign?", "why?", "is there a blue sign in the image, or is it a green one?"]


@pytest.fixture(scope="module", params=[(name, how) for name in ARCHITECTURES for how in ("sdpa", "eager")], ids=str)
def odd(request):
    """(name, model, processor) of an architecture that hands its decoder more than embeddings, loaded in either way."""
    name, how = request.param
    model, processor = ARCHITECTURES[name]()
    model.set_attn_implementation(how)
    return name, model, processor


def stock_inputs(session, images, prompt):
    """The stock model's inputs for images and a prompt that names one place for all of them."""
    adapter, inputs = session.adapter, session.adapter.preprocess(images)
    layouts = adapter.layouts(inputs, [image.size for image in images])
    ids = adapter.tokenize(prompt, layouts)
    return adapter.stock_inputs(prompt, ids, adapter.placed(inputs))


def stock(session, images, prompt, graph=False):
    """(logits, {layer: attention (heads, keys) of the last token}, v) of one eager forward of the stock model."""
    model, kept = session.model, {}
    found = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [
        module.register_forward_hook(lambda _, __, output, layer=layer: kept.__setitem__(layer, output[1]))
        for layer, module in session.attention_modules.items()
    ]
    with torch.set_grad_enabled(graph):
        inputs = stock_inputs(session, images, prompt)
        if graph:
            inputs["pixel_values"] = inputs["pixel_values"].requires_grad_()
        logits = model(**inputs, use_cache=False).logits[0, -1].float()
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation(found)
    return logits, kept, logits.log_softmax(-1).max()


def own_logits(session, prompt, **crops):
    found = []
    decode, session.greedy_decode = session.greedy_decode, lambda read, _: found.append(session.logits(read)) or []
    session.answer(prompt, **crops)
    session.greedy_decode = decode
    return found[0][0]


def on_map(session, row, prompt):
    """(heads, h, w) of values at all tokens (heads, keys)."""
    (layout,) = session.layouts
    ids = session.adapter.tokenize(prompt, [layout])
    at = (ids == session.model.config.image_token_id).nonzero()[:, 0]
    return row[:, at][:, layout.index]


def test_logits_equal_the_stock_models_also_with_a_crop(odd):
    _, model, processor = odd
    image, crop = photo(), photo(50, 60, seed=1)
    session = ImageSession([image], model, processor)
    for question in QUESTIONS:
        prompt = session.adapter.prompt(question)
        for images, crops in (([image], {}), ([image, crop], {"crops": [crop]})):
            wanted, *_ = stock(session, images, prompt)
            found = own_logits(session, prompt, **crops)
            assert relative_error(found.numpy(), wanted.numpy()) <= 1e-5
    assert session.store.shared  # all of it on one prefix


def test_attention_and_its_gradient_equal_the_eager_computation(odd):
    _, model, processor = odd
    session = ImageSession([photo()], model, processor)
    prompt, layers = session.adapter.prompt(QUESTIONS[1]), layer_numbers(model, "mean")
    assert sorted(session.attention_modules) == list(layers)
    _, kept, v = stock(session, session.images, prompt, graph=True)
    gradients = torch.autograd.grad(v, list(kept.values()))
    (maps,), (weighted,) = attention_maps(session, [prompt], layers), weighted_attention(session, [prompt], layers)
    for number, (layer, gradient) in enumerate(zip(kept, gradients, strict=True)):
        row, slope = kept[layer][0, :, -1].detach(), gradient[0, :, -1]
        assert relative_error(maps[number].numpy(), on_map(session, row, prompt).numpy()) <= 1e-5
        wanted = on_map(session, row * slope.relu(), prompt)
        assert relative_error(weighted[number].numpy(), wanted.numpy()) <= 1e-4
        assert wanted.std() > 0


def test_answers_equal_generate(odd):
    _, model, processor = odd
    image, crop = photo(), photo(50, 60, seed=1)
    session = ImageSession([image], model, processor)
    for question in QUESTIONS[:2]:
        prompt = session.adapter.prompt(question)
        for images, crops in (([image], None), ([image, crop], [crop])):
            inputs = stock_inputs(session, images, prompt)
            with torch.no_grad():
                written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[
                    0, inputs["input_ids"].shape[1] :
                ]
            wanted = processor.tokenizer.decode(written, skip_special_tokens=True).strip()
            assert session.answer(prompt, crops=crops) == [wanted]


def test_questions_together_equal_each_alone_and_go_together_only_where_they_may(odd):
    name, model, processor = odd
    images, of = [photo(90, 70), photo(40, 130, seed=1)], [1, 0, 1]
    crops = [photo(50, 30, seed=seed) for seed in range(3)]
    session = ImageSession(images, model, processor)
    asked = [session.adapter.prompt(question) for question in QUESTIONS]
    layers = layer_numbers(model, "mean")
    answers, pairs = session.answer(asked, of=of), session.answer(asked, crops=crops, of=of)
    maps, weighted = attention_maps(session, asked, layers, of), weighted_attention(session, asked, layers, of)
    assert session.batched == (name == "deepstack")  # padding in a window, or before a state, is not nothing
    for number, (prompt, image) in enumerate(zip(asked, of, strict=True)):
        alone = ImageSession([images[image]], model, processor)
        assert answers[number] == alone.answer(prompt)[0]
        assert pairs[number] == alone.answer(prompt, crops=[crops[number]])[0]
        (single,), (slope,) = attention_maps(alone, [prompt], layers), weighted_attention(alone, [prompt], layers)
        assert relative_error(maps[number].numpy(), single.numpy()) <= 1e-5
        assert relative_error(weighted[number].numpy(), slope.numpy()) <= 1e-4


def test_a_prefix_is_shared_only_where_the_decoder_is_handed_the_same(odd, monkeypatch):
    """A family whose image embeddings depend on the question: all is read anew, with the stock model's logits."""
    _, model, processor = odd
    session, embedding = ImageSession([photo()], model, processor), model.get_input_embeddings()
    prompts = [session.adapter.prompt(question) for question in QUESTIONS]
    session.answer(prompts[0])
    assert session.store.shared
    for shift, prompt in enumerate(prompts[1:], 1):
        with monkeypatch.context() as patch:
            patch.setattr(
                embedding, "forward", lambda ids, shift=shift: type(embedding).forward(embedding, ids) + shift
            )
            wanted, *_ = stock(session, session.images, prompt)
            assert relative_error(own_logits(session, prompt).numpy(), wanted.numpy()) <= 1e-5
    assert session.store.shared is False
    assert session.store.beginnings == [0, 0, 0]


def test_a_prompt_of_a_single_token_behind_the_image_leaves_its_prefix_as_it_was(odd):
    _, model, processor = odd
    session, layers = ImageSession([photo()], model, processor), layer_numbers(model, "mean")
    short = f"{session.adapter.image_placeholder}?"
    maps = [weighted_attention(session, [short], layers)[0] for _ in range(3)]
    assert relative_error(maps[1].numpy(), maps[0].numpy()) <= 1e-5
    assert torch.equal(maps[1], maps[2])
    fresh = ImageSession([photo()], model, processor)
    (found,), (wanted,) = (attention_maps(each, [short], layers) for each in (session, fresh))
    assert relative_error(found.numpy(), wanted.numpy()) <= 1e-5


def test_a_pass_that_failed_leaves_nothing_that_passes_for_read(odd, monkeypatch):
    """The last layer runs out of memory while the image is read; the next question reads it again."""
    _, model, processor = odd
    session = ImageSession([photo()], model, processor)
    prompt, last = session.adapter.prompt("why?"), model.get_decoder().layers[-1].mlp

    def crowded(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", crowded)
        with pytest.raises(torch.OutOfMemoryError):
            session.answer(prompt)
    found, wanted = (own_logits(each, prompt) for each in (session, ImageSession([photo()], model, processor)))
    assert torch.equal(found, wanted)


def test_images_keep_their_prefixes_also_where_they_go_one_by_one(odd, monkeypatch):
    _, model, processor = odd
    session = ImageSession([photo(seed=seed) for seed in range(6)], model, processor)
    begun, new = [], prefix_cache.new_cache
    monkeypatch.setattr(prefix_cache, "new_cache", lambda decoder: begun.append(decoder) or new(decoder))
    for question in QUESTIONS[:2]:
        session.answer(session.adapter.prompt(question))
    assert len(begun) == (1 if session.batched else 6)


def test_localization_heads_are_those_of_their_own_layers(odd):
    _, model, processor = odd
    method, layers = model_module("qwen2_5").loc_att, layer_numbers(model, "mean")
    session = ImageSession([photo()], model, processor)
    prompt, last = session.adapter.prompt("why?"), layers[-1]
    (found,) = method.bind(model, heads=[(last, 1)]).maps(session, [prompt], prompt)
    (maps,) = attention_maps(session, [prompt], [last])
    assert relative_error(found, smoothed(maps[0, 1].numpy())) <= 1e-5
    for layer in set(range(4)) - set(layers):
        with pytest.raises(ValueError, match=f"layer {layer} (does not exist|has no attention)"):
            method.bind(model, heads=[(layer, 0)])


# ----------------------------------------------------------------------------------------------------- masks, memory
@pytest.fixture
def seen_masks(monkeypatch):
    """What attention functions are given as masks, call by call: None or a shape."""
    seen, real = [], attention.sdpa_attention_forward

    def recording(module, query, key, value, attention_mask, **options):
        seen.append(None if attention_mask is None else tuple(attention_mask.shape))
        return real(module, query, key, value, attention_mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", recording)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_plainly_causal_attention_is_given_no_mask_so_that_flash_kernels_can_run(kind, seen_masks):
    model, processor = KINDS[kind](layers=3)
    session = ImageSession([photo()], model, processor)
    session.answer(session.adapter.prompt("why?"))
    assert seen_masks
    assert set(seen_masks) == {None}
    seen_masks.clear()
    session.answer(session.adapter.prompt("who?"))  # on a prefix a few tokens need their rows, and no others
    assert all(mask is None or mask[-2] < 40 for mask in seen_masks)


def test_tokens_that_a_family_masks_by_itself_are_refused():
    model, processor = ARCHITECTURES["windowed"]()
    session = ImageSession([photo()], model, processor)
    inputs = session.adapter.forward_inputs

    def with_padding(prompt, ids, images):
        found = inputs(prompt, ids, images)
        found["attention_mask"][:, 0] = 0
        return found

    session.adapter.forward_inputs = with_padding
    with pytest.raises(ValueError, match="a mask of shape .* of its own making"):
        session.answer(session.adapter.prompt("why?"))


def test_a_decoder_without_attention_interface_is_refused(monkeypatch):
    model, processor = KINDS["llava"](layers=3)
    monkeypatch.setattr(type(model.get_decoder()), "_can_set_attn_implementation", classmethod(lambda _: False))
    session = ImageSession([photo()], model, processor)
    with pytest.raises(ValueError, match="the attention of LlamaModel cannot be read"):
        session.answer(session.adapter.prompt("why?"))


def tensors_of(value):
    """The tensors that an object holds, also in what its functions close over."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = [getattr(value, "make", None), getattr(value, "func", None), *getattr(value, "keywords", {}).values()]
    parts += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    parts += value if isinstance(value, (list, tuple)) else []
    return [each for part in parts if part is not None for each in tensors_of(part)]


def test_no_mask_of_all_tokens_by_all_tokens_is_kept(odd):
    _, model, processor = odd
    session = ImageSession([photo()], model, processor)
    session.answer(session.adapter.prompt(QUESTIONS[2]))
    calls = [row.rest for row in session._calls.values()] + [prefix.call for prefix in session.store.prefixes]
    for call in calls:
        assert all(each.numel() < call.length**2 for mask in call.masks.values() for each in tensors_of(mask))


def test_kept_calls_hold_only_what_is_behind_the_prefix_and_are_bounded(odd, monkeypatch):
    _, model, processor = odd
    session = ImageSession([photo()], model, processor)
    asked = [session.adapter.prompt(question) for question in QUESTIONS]
    for prompt in asked:
        session.answer(prompt)
    rows = list(session._calls.values())
    assert len(rows) == 3
    for row in rows:
        assert row.rest.embeds.shape[1] == row.rest.length - row.prefix.stop < row.prefix.stop + 40
        for each in (row.rest.embeds, *(row.rest.deepstack[1] if row.rest.deepstack else [])):
            assert each.untyped_storage().nbytes() == each.nbytes
    monkeypatch.setattr(session_module, "KEPT_BYTES", rows[0].rest.nbytes)
    session.answer(session.adapter.prompt("who?"))
    assert sum(row.rest.nbytes for row in session._calls.values()) <= rows[0].rest.nbytes


# ----------------------------------------------------------------------------------------------- left as it was found
def test_the_model_is_left_as_found_also_after_an_exception(odd, monkeypatch):
    _, model, processor = odd
    session = ImageSession([photo()], model, processor)
    prompt = session.adapter.prompt("why?")
    session.answer(prompt)
    before = state_of(model)
    deltas = [module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")]
    weighted_attention(session, [prompt], [1])
    monkeypatch.setattr("vicrop.attention.AttentionCapture.read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention_maps(session, [session.adapter.prompt("who?")], [1])
    assert state_of(model) == before
    assert [module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")] == deltas


@pytest.mark.parametrize("kind", ["qwen2_5", "deepstack"])
def test_positions_that_a_model_remembers_stay_a_users_own(kind):
    model, processor = (KINDS[kind] if kind in KINDS else ARCHITECTURES[kind])()
    kept = torch.tensor([[-7]])
    model.model.rope_deltas = kept
    session = ImageSession([photo()], model, processor)
    session.answer(session.adapter.prompt("why?"))
    assert model.model.rope_deltas is kept


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_weights_go_back_once_a_question_is_answered(kind):
    model, processor = KINDS[kind](layers=3)
    accelerate.cpu_offload(model)
    session = ImageSession([photo()], model, processor)
    prompt = session.adapter.prompt("why?")
    session.answer(prompt, crops=[photo(40, 40)])
    attention_maps(session, [prompt], (1,))
    weighted_attention(session, [prompt], (1,))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_gives_the_same_and_stays_compiled(kind):
    model, processor = KINDS[kind](layers=3)
    module, adapter = model_module(kind), model_module(kind).ADAPTER(model, processor)
    ask = photo(), adapter.prompt("why?"), adapter.prompt("what?")
    wanted = module.rel_att(*ask, model, processor, layer=1)
    assert np.array_equal(module.rel_att(*ask, torch.compile(model), processor, layer=1), wanted)
    model.compile()
    compiled = model._compiled_call_impl
    assert np.array_equal(module.rel_att(*ask, model, processor, layer=1), wanted)
    assert model._compiled_call_impl is compiled


class Dropping(torch.nn.Linear):
    """A layer whose kernel hands no gradient on, as some quantised ones."""

    def forward(self, values):
        return super().forward(values.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_that_drops_gradients_is_refused_by_its_backends_name(kind, monkeypatch):
    model, processor = KINDS[kind](layers=3)
    mlp = model.get_decoder().layers[2].mlp
    mlp.down_proj.__class__ = Dropping
    monkeypatch.setattr(model.config, "quantization_config", {"quant_method": "awq"}, raising=False)
    module, adapter = model_module(kind), model_module(kind).ADAPTER(model, processor)
    ask = photo(), adapter.prompt("why?"), adapter.prompt("what?"), model, processor
    assert np.isfinite(module.rel_att(*ask, layer=1)).all()
    for method, options in (("grad_att", {"layer": 1}), ("pure_grad", {})):
        with pytest.raises(ValueError, match="Dropping of a model quantised by awq hands no gradient on: use rel_att"):
            getattr(module, method)(*ask, **options)
    mlp.down_proj.__class__ = torch.nn.Linear
    assert np.isfinite(module.grad_att(*ask, layer=1)).all()


def test_attention_arguments_that_are_not_known_are_refused():
    model, processor = capped()
    session = ImageSession([photo()], model, processor)
    prompt = session.adapter.prompt("why?")
    with pytest.raises(ValueError, match="Gemma2Attention computes its attention with softcap"):
        attention_maps(session, [prompt], (1,))
    with pytest.raises(ValueError, match="softcap"):
        session.answer(prompt)
    module = types.SimpleNamespace(is_causal=True)
    rows = [torch.zeros(1, 2, 3, 4)] * 3
    for name in ("s_aux", "position_bias", "block_indices"):
        with pytest.raises(ValueError, match=name):
            attention._captured_attention(module, *rows, None, **{name: torch.ones(2)})


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # what versions of transformers call it
def test_a_cache_is_handed_over_by_the_name_that_the_model_knows(name):
    made = {}
    exec(f"def forward(self, input_ids=None, {name}=None, **kwargs): pass", made)
    model = type("Speaker", (), made)()
    assert prefix_cache.on_top_of("the cache", model) == {name: "the cache", "use_cache": True}


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # what versions of transformers call it
def test_a_cache_that_a_model_makes_by_itself_is_not_its_decoders(name):
    """A model may hand its decoder an empty cache: those of the session stand in its place, whatever it is called."""
    model, processor = KINDS["llava"](layers=3)
    session = ImageSession([photo()], model, processor)
    call = session.row(*session.queries(session.adapter.prompt("why?"))).rest
    kept = {"inputs_embeds": call.embeds, name: DynamicCache(config=model.config.get_text_config())}
    assert decoder_call._call_of(kept, call.ids[call.start :], call.image_at).constants == {}
