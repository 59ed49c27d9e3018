"""What is peculiar to each family: prompts, layers, sizes, and which pixels a map covers."""

import base64
import importlib
import sys

import numpy as np
import pytest
import torch
from builders import GENERAL, QUESTION, build_blip, build_llava_next, build_qwen2_5, make_tokenizer, photo
from transformers import AutoModelForImageTextToText, LlavaProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vicrop.adapter import REGISTRY, Adapter, adapter_class
from vicrop.methods import ratio
from vicrop.models import instructblip as blip_methods
from vicrop.models.instructblip import BlipAdapter, rel_attention_blip
from vicrop.models.llava import grad_att, pure_grad, rel_att
from vicrop.models.llava_next import rel_att as rel_att_next
from vicrop.models.qwen2_5_vl import QwenAdapter, load_processor, rel_attention_qwen2_5
from vicrop.qwen_input import encode_base64, prepare_qwen2_5_input, resize_to_multiple
from vicrop.session import ImageSession, end_tokens
from vicrop.tiles import high_res

METHODS = {"rel_att": rel_att, "grad_att": grad_att, "pure_grad": pure_grad}


@pytest.fixture(scope="module")
def blip():
    return build_blip()


@pytest.fixture(scope="module")
def qwen():
    return build_qwen2_5()


@pytest.fixture(scope="module")
def llava_next():
    return build_llava_next()


def test_ratio_is_finite_everywhere():
    a = torch.tensor([[[0.0, 0.2], [0.3, 0.4]]])
    b = torch.tensor([[[0.0, 0.0], [0.1, 0.8]]])
    torch.testing.assert_close(ratio(a, b), torch.tensor([[[1.0, 2.0], [3.0, 0.5]]]))
    assert ratio(a, torch.zeros_like(b)).isfinite().all()
    assert ratio(a, torch.full_like(b, 1e-40)).sum().isfinite()


# ---------------------------------------------------------------------------------------------------------- LLaVA
@pytest.mark.parametrize("prompt", ["no image here", "<image> twice <image>", "nothing after <image>"])
def test_a_prompt_needs_one_image(llava, prompt):
    with pytest.raises(ValueError, match="a prompt (holds|ends)"):
        rel_att(photo(), prompt, GENERAL, *llava, layer=1)


def seen_part(image, processor):
    """The processor's own pixels of an image, as (H, W, 3) uint8."""
    settings = processor.image_processor
    pixels = settings(images=image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    return (pixels * settings.image_std + np.array(settings.image_mean)).clip(0, 1) * 255


def regions(images, model, processor, **options):
    """Of each image the rectangle that its map covers."""
    return [layout.region for layout in ImageSession(images, model, processor, **options).layouts]


def picture(session):
    """(copies, 3, H, W): what the model is shown of a session's only image."""
    return session.adapter.canvas(session.prepared["pixel_values"], session.prepared, session.layouts[0])


SIZES = [(640, 480), (480, 640), (500, 500), (5000, 300), (300, 5000), (1, 1), (1, 1000), (3000, 1), (7, 3)]


@pytest.mark.parametrize("size", SIZES)
def test_the_region_is_what_the_processor_shows(llava, size):
    model, processor = llava
    x1, y1, x2, y2 = regions([photo(*size)], model, processor)[0]
    assert 0 <= x1 < x2 <= size[0]
    assert 0 <= y1 < y2 <= size[1]
    assert abs((x2 - x1) - min(size)) <= 1 + size[0] / 100
    if min(size) > 100:  # cutting the region out first shows the model (nearly) the same
        part = photo(*size).crop((x1, y1, x2, y2))
        assert np.abs(seen_part(photo(*size), processor) - seen_part(part, processor)).mean() < 8


def test_upstream_geometry_claims_the_whole_image(llava):
    assert regions([photo(640, 480)], *llava, geometry="upstream") == [(0, 0, 640, 480)]


def test_a_squashing_processor_sees_the_whole_image(squashing_llava):
    assert regions([photo(640, 480)], *squashing_llava) == [(0, 0, 640, 480)]


def test_padding_shows_the_whole_image_in_a_square(llava):
    padded = regions([photo(640, 480), photo(480, 640)], *llava, image_fit="pad")
    assert padded == [(0, -80, 640, 560), (-80, 0, 560, 640)]
    white = photo(640, 480)
    white.paste((255, 255, 255), (0, 0, 640, 480))
    rows = ImageSession([white], *llava, image_fit="pad").prepared["pixel_values"][0].mean((0, 2))
    assert rows[0] < rows[len(rows) // 2]  # a band above, the image in the middle


def test_an_unknown_image_fit_is_refused(llava):
    with pytest.raises(ValueError, match="image_fit is one of .* not 'stretch'"):
        ImageSession([photo()], *llava, image_fit="stretch")


@pytest.mark.parametrize("method", METHODS)
def test_one_token_after_the_image_is_enough(squashing_llava, method):
    options = {} if method == "pure_grad" else {"layer": 1}
    assert np.isfinite(METHODS[method](photo(), "USER: <image>?", "USER: <image>!", *squashing_llava, **options)).all()


@pytest.mark.parametrize("fit", ["processor", "pad"])
def test_tiles_of_a_centre_cropping_model_lose_nothing(llava, fit):
    """Every pixel of a high-resolution image is in some tile's region."""
    image = photo(600, 2000)
    assert high_res(rel_att, image, QUESTION, GENERAL, *llava, layer=1, image_fit=fit).shape == (12, 4)
    sessions, rows, columns = ImageSession([image], *llava, image_fit=fit).tiles()
    seen = [pair for each in sessions for pair in zip(each.images, each.layouts, strict=True)]
    assert len(seen) == rows * columns == 3
    assert [layout.region for _, layout in seen] == [(0, 0, *tile.size) for tile, _ in seen]


def test_a_processor_that_does_not_know_of_the_class_token_gives_the_same_map(llava):
    model, processor = llava
    plain = LlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=14)
    found, wanted = (rel_att(photo(), QUESTION, GENERAL, model, each, layer=1) for each in (plain, processor))
    assert np.array_equal(found, wanted)


def test_places_and_features_that_differ_in_number_are_an_error(llava, monkeypatch):
    model, processor = llava
    session = ImageSession([photo()], model, processor)
    monkeypatch.setitem(session.__dict__, "layouts", [session.layouts[0]._replace(num_tokens=17)])
    with pytest.raises(ValueError, match="17 places for image tokens, and 16 of them"):
        session.answer(QUESTION)


# ----------------------------------------------------------------------------------------------------- InstructBLIP
def test_the_q_former_layer_counts_those_with_cross_attention(blip, monkeypatch):
    model, processor = blip  # six layers, cross-attention in 0, 2 and 4
    layers = model.qformer.encoder.layer
    for number, physical in enumerate((0, 2, 4)):
        adapter = BlipAdapter(model, processor, qformer_layer=number)
        assert adapter.connector[0] is layers[physical].crossattention.attention
    assert BlipAdapter(model, processor).connector[0] is layers[4].crossattention.attention
    monkeypatch.setattr(blip_methods, "QFORMER_LAYER", 1)
    assert BlipAdapter(model, processor).connector[0] is layers[2].crossattention.attention
    monkeypatch.setattr(model.config, "qformer_layer", 0, raising=False)
    assert BlipAdapter(model, processor).connector[0] is layers[0].crossattention.attention
    ask = (photo(), "Question: why? Short answer:", "Question: what? Short answer:", model, processor)
    maps = [rel_attention_blip(*ask, layer=1, qformer_layer=layer).tobytes() for layer in range(3)]
    assert len(set(maps)) == 3


@pytest.mark.parametrize("layer", [3, -1, "mean"])
def test_a_q_former_layer_that_does_not_exist_names_the_range(blip, layer):
    with pytest.raises(ValueError, match="Q-Former .* has layers 0 to 2"):
        ImageSession([photo()], *blip, qformer_layer=layer)


def test_the_q_former_reads_the_question(blip):
    session = ImageSession([photo()], *blip)
    queries = session.queries([session.adapter.prompt(text) for text in ("what is red?", "what is blue?")], of=[0, 0])
    one, other = (session.decoder_call(query, session.encoded) for query in queries)
    assert not torch.allclose(one.embeds[:, one.image_at], other.embeds[:, one.image_at])


def test_a_flan_t5_checkpoint_is_refused(blip, monkeypatch):
    model, processor = blip
    monkeypatch.setattr(model.config, "use_decoder_only_language_model", False)
    with pytest.raises(ValueError, match="encoder-decoder.*instructblip-vicuna-7b"):
        ImageSession([photo()], model, processor)


def test_a_question_that_the_q_former_cannot_hold_is_a_sentence(blip):
    places = blip[0].config.qformer_config.max_position_embeddings
    with pytest.raises(ValueError, match=f"too long for the Q-Former, which reads up to {places}"):
        rel_attention_blip(photo(), "what " * (places + 1), "Question: what?", *blip, layer=1)


def test_an_empty_prompt_is_refused(blip):
    with pytest.raises(ValueError, match="prompt is empty"):
        rel_attention_blip(photo(), " ", "Question: what?", *blip, layer=1)


def test_an_answer_ends_at_the_tokenizers_end_token_whatever_the_text_config_says(blip, monkeypatch):
    """Converted checkpoints name another end token in their language model's config than the one they were taught."""
    model, processor = blip
    monkeypatch.setattr(model.language_model.generation_config, "eos_token_id", 1)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    configs = model.generation_config, model.language_model.generation_config
    assert end_tokens(*configs, tokenizer=processor.tokenizer) == [1, 2]
    monkeypatch.setattr(model.language_model.generation_config, "eos_token_id", None)
    with pytest.raises(ValueError, match="ends an answer"):
        end_tokens(*configs, tokenizer=make_tokenizer([], eos=None))


# ------------------------------------------------------------------------------------------------------ Qwen2.5-VL
def grid_of(image, model, processor):
    """(h, w) of an image's map."""
    return ImageSession([image], model, processor).layouts[0].grid


@pytest.mark.parametrize("size", [(640, 480), (333, 777), (28, 28), (5, 3), (1000, 29), (20, 2000)])
@pytest.mark.parametrize("limits", [{}, {"max_pixels": 20 * 28 * 28}, {"min_pixels": 30 * 28 * 28}])
def test_every_image_is_scaled_into_the_pixel_range(qwen, size, limits):
    model, processor = qwen
    session = ImageSession([photo(*size)], model, processor, **limits)
    h, w = session.layouts[0].grid
    low, high = limits.get("min_pixels", 4 * 28**2), limits.get("max_pixels", 36 * 28**2)
    wide, tall = resize_to_multiple(photo(*size), 28).size
    assert (28 * h, 28 * w) == smart_resize(tall, wide, 28, low, high)
    assert picture(session).shape == (2, 3, 28 * h, 28 * w)


def test_the_default_range_is_the_processors_and_at_most_the_papers(qwen, monkeypatch):
    model, processor = qwen
    assert grid_of(photo(1400, 1400), model, processor) == (6, 6)
    monkeypatch.setattr(processor.image_processor, "size", {"shortest_edge": 512 * 784, "longest_edge": 1280 * 784})
    assert grid_of(photo(1400, 1400), model, processor) == (16, 16)
    for limits in ({"min_pixels": 5000, "max_pixels": 4000}, {"min_pixels": -1}, {"min_pixels": 0}, {"max_pixels": 0}):
        with pytest.raises(ValueError, match="min_pixels is at least 1, .* and max_pixels at least min_pixels"):
            ImageSession([photo()], model, processor, **limits)


def test_a_canvas_shows_the_picture(qwen):
    model, processor = qwen
    image, settings = photo(84, 56), processor.image_processor
    shown = picture(ImageSession([image], model, processor))
    assert torch.equal(shown[0], shown[1])
    pixels = shown[0].permute(1, 2, 0).numpy() * settings.image_std + np.array(settings.image_mean)
    np.testing.assert_allclose(pixels * 255, np.asarray(image), atol=1e-3)


def test_a_bare_question_is_put_into_the_chat_template(qwen):
    model, processor = qwen
    adapter = QwenAdapter(model, processor)
    suffix = " Answer the question using a single word or phrase."
    assert adapter.prompt("why?").count("<|image_pad|>") == 1
    ask = ("why?" + suffix, "what?" + suffix, model, processor)
    whole = (adapter.prompt("why?"), adapter.prompt("what?"), model, processor)
    found, wanted = (rel_attention_qwen2_5(photo(), *each, layer=1) for each in (ask, whole))
    assert np.array_equal(found, wanted)


def test_the_record_counts_the_image_tokens_of_all_images(qwen):
    model, processor = qwen
    session = ImageSession([photo(112, 56)], model, processor)
    fields, layout = session.adapter.record_fields, session.layouts[0]
    assert fields(layout, [photo(56, 56)]) == {"num_img_tokens": 4 * 2 + 2 * 2}
    assert fields(layout, [photo(56, 56), photo(112, 56)]) == {"num_img_tokens": 4 * 2 + 2 * 2 + 4 * 2}
    for size in ((300, 40), (5, 9), (700, 650)):
        h, w = grid_of(photo(*size), model, processor)
        assert fields(layout, [photo(*size)]) == {"num_img_tokens": 4 * 2 + h * w}


def test_qwens_processor_needs_no_torchvision_and_gives_the_stock_grid(qwen, tmp_path):
    """Saved and loaded again; its grid is the one that the stock arithmetic of both backends gives."""
    model, processor = qwen
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert again.chat_template == processor.chat_template
    for size in ((300, 200), (91, 640), (1200, 1100)):
        high, wide = smart_resize(*resize_to_multiple(photo(*size), 28).size[::-1], 28, 56 * 56, 36 * 28 * 28)
        for each in (processor, again):
            assert grid_of(photo(*size), model, each) == (high // 28, wide // 28)


def test_chat_messages_become_the_models_inputs(qwen, tmp_path):
    model, processor = qwen
    image = photo(112, 84)
    image.save(tmp_path / "image.png")
    uri = "data:image/png;base64," + encode_base64(image)
    assert base64.b64decode(uri.partition(",")[2])[:4] == b"\x89PNG"
    shown, pixels = ImageSession([image], model, processor).prepared["pixel_values"], []
    for source in (image, str(tmp_path / "image.png"), f"file://{tmp_path}/image.png", uri):
        parts = [{"type": "image", "image": source}, {"type": "text", "text": "why?"}]
        inputs = prepare_qwen2_5_input([{"role": "user", "content": parts}], processor)
        pixels.append(inputs["pixel_values"])
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 * 3
    assert all(torch.equal(each, shown) for each in pixels)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_what_a_chat_message_says_is_heeded_or_refused(qwen, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwen_vl_utils", None)  # as where torchvision is not installed
    cases = [({"type": "video", "video": "a.mp4"}, "of type 'video'"),
             ({"type": "image", "image": photo(), "resized_height": 56}, "resized_height in a message")]  # fmt: skip
    for part, says in cases:
        with pytest.raises(ValueError, match=says):
            prepare_qwen2_5_input([{"role": "user", "content": [part]}], qwen[1])


# ------------------------------------------------------------------------------------------------------ LLaVA-NeXT
@pytest.mark.parametrize("size", [(300, 300), (300, 100), (100, 300), (640, 480), (37, 90)])
def test_the_map_of_tiles_is_the_image_without_padding(llava_next, size):
    model, processor = llava_next
    session = ImageSession([photo(*size)], model, processor)
    (layout,), (h, w) = session.layouts, session.layouts[0].grid
    ids = session.adapter.tokenize(QUESTION, [layout])
    inputs = processor(images=photo(*size), text=QUESTION, return_tensors="pt")
    assert torch.equal(ids, inputs.input_ids[0])  # so many tokens as the stock processor gives
    assert abs(w / h - size[0] / size[1]) < 0.35 * size[0] / size[1]
    assert layout.index[0, 0] == layout.num_tokens - h * (w + 1)
    assert layout.index[-1, -1] == layout.num_tokens - 2  # the last one is a newline
    assert picture(session).shape == (1, 3, 7 * h, 7 * w)


def test_an_image_too_narrow_for_tiles_is_an_error_that_names_it(llava_next):
    with pytest.raises(ValueError, match="5000 x 69 pixels is too narrow"):
        rel_att_next(photo(5000, 69), QUESTION, GENERAL, *llava_next, layer=1)


def test_the_canvas_of_tiles_is_the_image(llava_next):
    model, processor = llava_next
    image, settings = photo(56, 42), processor.image_processor  # fits two by two tiles of 28 px, with padding
    shown = picture(ImageSession([image], model, processor))[0].permute(1, 2, 0).numpy()
    shown = shown * settings.image_std + np.array(settings.image_mean)
    assert shown.shape[:2] == (42, 56)
    assert np.abs(shown * 255 - np.asarray(image)).mean() < 1


# ---------------------------------------------------------------------------------------------------- all, by run.py
@pytest.mark.parametrize("kind", ["llava", "blip", "qwen", "llava_next"])
def test_a_question_that_holds_an_image_token_is_refused(request, kind):
    model, processor = request.getfixturevalue(kind)
    session = ImageSession([photo()], model, processor)
    token = "<|image_pad|>" if kind == "qwen" else "<image>"
    with pytest.raises(ValueError, match="exactly once|comes before a prompt"):
        session.answer(session.adapter.prompt(f"what is {token}?"))
    with pytest.raises(ValueError, match="has no option 'layr': it has geometry"):
        type(session.adapter).check(model, layr=1)


def test_a_short_question_is_asked_for_the_map_only(qwen, monkeypatch):
    from vicrop.crop import QuestionBatch

    session = ImageSession([photo()], *qwen)
    batch = QuestionBatch(session, ["a long one?"], short_questions=["short?"])
    asked, row = [], session.row
    monkeypatch.setattr(session, "row", lambda query: asked.append(query.prompt) or row(query))
    batch.find(__import__("qwen2_5_methods").rel_att.bind(qwen[0], 1))
    assert asked[0] == session.adapter.prompt("short?")
    assert batch.prompts[0] == session.adapter.prompt("a long one?")


def test_every_family_of_the_registry_has_its_adapter():
    for kind, module in REGISTRY.items():
        family = importlib.import_module(module)
        assert issubclass(family.ADAPTER, Adapter)
        if family.MODEL_CLASS is AutoModelForImageTextToText:  # a module for several families
            assert kind.partition("+")[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        else:
            assert family.MODEL_CLASS.config_class.model_type == kind
        assert family.rel_att.__name__.startswith("rel_attention_")


def test_a_model_that_no_adapter_knows_is_refused_by_its_kind(llava, monkeypatch):
    monkeypatch.setattr(type(llava[0].config), "model_type", "tiger")
    with pytest.raises(ValueError, match="no adapter knows tiger models: known are llava, llava_next"):
        adapter_class(llava[0])
