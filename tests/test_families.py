"""Every family gives what its stock model gives from its stock processor, with maps in the right places."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
from builders import photo
from families import FAMILIES, idefics3, internvl, llava_onevision, mistral3, qwen3_vl
from families_rasters import RASTERS, WITH_TORCHVISION
from families_tiles import TILES
from PIL import Image
from plain import own_tokens
from scipy.ndimage import gaussian_filter
from test_engine import own_logits
from test_models import relative_error
from transformers import AttentionInterface, AttentionMaskInterface

from vicrop import session as session_module
from vicrop.adapter import REGISTRY, adapter_class
from vicrop.attention import with_implementation
from vicrop.attribution import attention, edge_mask, pixel_gradients, weighted_attention
from vicrop.layouts import cell_means
from vicrop.localization.collector import stock_generate
from vicrop.methods import family_methods, ratio
from vicrop.prefix_cache import PrefixStore, Row
from vicrop.session import ImageSession, layer_numbers
from vicrop.tables import GENERAL_PROMPT
from vicrop.tiles import high_res_split_threshold

SIZES = [(90, 70), (60, 150)]
QUESTIONS = ["what number is on the red sign?", "why?"]
CROP = photo(50, 60, seed=1)
ROWS, WEIGHTED, PIXELS = 1e-5, 5e-5, 2e-4
SHARES_NOTHING = {"paligemma"}  # its prompts' tokens all see each other
SHORT_NAMES = "rel_att", "grad_att", "pure_grad", "loc_att", "question_att"
METHODS = dict(zip(SHORT_NAMES, family_methods("any"), strict=True))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, model, processor) of a small model of a family."""
    return request.param, *FAMILIES[request.param]()


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def size(request):
    """(width, height) of a picture."""
    return request.param


@pytest.fixture(scope="module")
def session(family, size):
    return ImageSession([photo(*size)], *family[1:])


# ---------------------------------------------------------------------------------------------------- the stock model
def stock_inputs(processor, images, question):
    """What the stock processor makes of images and a question, by its chat template if it has one."""
    if not processor.chat_template:
        return processor(images=images, text="<image>" * len(images) + f"answer en {question}", return_tensors="pt")
    said = f"{question} Answer the question using a single word or phrase."
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": said}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    special = not text.startswith(processor.tokenizer.bos_token or "no beginning")
    return processor(images=images, text=[text], return_tensors="pt", add_special_tokens=special)


class Stock:
    """One eager forward of a stock model, all in the graph: `logits`, `probs` by layer, `v`, `pixels`."""

    def __init__(self, model, processor, images, question):
        self.inputs, self.probs = dict(stock_inputs(processor, images, question)), {}
        self.inputs.pop("labels", None)
        self.inputs["pixel_values"] = self.inputs["pixel_values"].to(model.dtype).requires_grad_()
        self.pixels, found = self.inputs["pixel_values"], model.config._attn_implementation
        model.set_attn_implementation("eager")
        output = model(**self.inputs, output_attentions=True, use_cache=False)
        model.set_attn_implementation(found)
        attending = layer_numbers(model, "mean")
        self.probs = dict(zip(attending, [each for each in output.attentions if each is not None], strict=True))
        self.logits = output.logits[0, -1].float() if model.dtype != torch.float64 else output.logits[0, -1]
        self.v = self.logits.log_softmax(-1).max()
        self.at = (self.inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]

    def rows(self, layout, weighted=False, words=slice(-1, None)):
        """(layers, heads, h, w): the last token's attention to an only image, or weighted by its gradient.

        `words`: other tokens, whose mean is taken.
        """
        probs = list(self.probs.values())
        slopes = torch.autograd.grad(self.v, probs, retain_graph=True) if weighted else []
        values = [each * slope.relu() for each, slope in zip(probs, slopes, strict=True)] if weighted else probs
        maps = torch.stack([each[0, :, words][..., self.at].mean(1) for each in values]).detach()
        return maps[..., torch.from_numpy(layout.index)]


def near(found, wanted, bound, exact):
    """Is it within the bound, or at most three times as far from float64 as the stock model's own float32?"""
    if relative_error(found.numpy(), wanted.numpy()) <= bound:
        return True
    reference = exact().numpy()
    own = relative_error(wanted.numpy(), reference)
    return relative_error(found.numpy(), reference) <= 3 * own


def in_float64(model):
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # the others know no float64; without experts it changes nothing
    return model


# ------------------------------------------------------------------------------------------------------------- matrix
def test_prompts_are_the_stock_processors_own(session, size):
    processor, adapter = session.processor, session.adapter
    prompt, (layout,) = adapter.prompt(QUESTIONS[0]), session.layouts
    (crop_layout,) = adapter.layouts(adapter.preprocess([CROP]), [CROP.size])
    for images, layouts in (([photo(*size)], [layout]), ([photo(*size), CROP], [layout, crop_layout])):
        wanted = stock_inputs(processor, images, QUESTIONS[0])
        assert torch.equal(adapter.tokenize(prompt, layouts), wanted["input_ids"][0])
    assert torch.equal(session.prepared["pixel_values"], stock_inputs(processor, images[:1], "why?")["pixel_values"])


def test_logits_equal_the_stock_models_also_with_a_crop(family, session):
    name, model, processor = family
    for question in QUESTIONS:
        for images, crops in ((session.images, {}), ([*session.images, CROP], {"crops": [CROP]})):
            wanted = Stock(model, processor, images, question).logits.detach()
            found = own_logits(session, session.adapter.prompt(question), **crops)
            exact = functools.partial(lambda *ask: Stock(in_float64(model), processor, *ask).logits.detach(),
                                      images, question)  # fmt: skip
            assert near(found, wanted, ROWS, exact), (question, len(images))
    assert session.store.shared is (name not in SHARES_NOTHING)


def test_attention_and_its_gradient_equal_the_eager_computation(family, session):
    _, model, processor = family
    layers, (layout,) = layer_numbers(model, "mean"), session.layouts
    for weighted, bound in ((False, ROWS), (True, WEIGHTED)):
        stock = Stock(model, processor, session.images, QUESTIONS[1])
        wanted = stock.rows(layout, weighted)
        (found,) = (weighted_attention if weighted else attention)(session, session.adapter.prompt("why?"), layers)
        assert wanted.std() > 0
        for layer in range(len(layers)):
            exact = lambda layer=layer, weighted=weighted: Stock(  # noqa: E731
                in_float64(model), processor, session.images, "why?").rows(layout, weighted)[layer]  # fmt: skip
            assert near(found[layer], wanted[layer], bound, exact), (layer, weighted)


def canvas_norm(session, gradient):
    canvas = session.adapter.canvas(gradient, session.inputs, session.layouts[0])
    return canvas.sum(0).norm(dim=0)


def test_pixel_gradients_equal_a_full_backward(family, session):
    _, model, processor = family
    found = pixel_gradients(session, [session.adapter.prompt("why?")])[0]

    def gradient(model):
        stock = Stock(model, processor, session.images, "why?")
        return canvas_norm(session, torch.autograd.grad(stock.v, stock.pixels)[0])

    assert near(found, gradient(model), PIXELS, lambda: gradient(in_float64(model)))


def test_every_method_is_its_formula_over_the_stock_models_numbers(family, session):
    _, model, processor = family
    layers, (layout,), asked = layer_numbers(model, "mean"), session.layouts, session.adapter.prompt("why?")
    why, general = (Stock(model, processor, session.images, each) for each in ("why?", GENERAL_PROMPT))
    gradients = [canvas_norm(session, torch.autograd.grad(each.v, each.pixels, retain_graph=True)[0])
                 for each in (why, general)]  # fmt: skip
    head = why.rows(layout)[0, 1].double().numpy()
    words = own_tokens(*(each.inputs["input_ids"][0].tolist() for each in (why, general)))
    wanted = {
        "rel_att": (ratio(why.rows(layout).mean(1), general.rows(layout).mean(1)).mean(0), 3e-5),
        "grad_att": (why.rows(layout, weighted=True).mean((0, 1)), WEIGHTED),
        "pure_grad": (cell_means(ratio(*gradients) * edge_mask(session), layout.grid, session.adapter.whole_cells),
                      5 * PIXELS),
        "loc_att": (gaussian_filter(head, 1, truncate=3), ROWS),
        "question_att": (why.rows(layout, words=words).mean((0, 1)), ROWS),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (numbers, bound) in wanted.items():
            method = METHODS[name].bind(model, heads=[(layers[0], 1)] if name == "loc_att" else None)
            (found,) = method.maps(session, asked, session.adapter.prompt(GENERAL_PROMPT))
            assert found.shape == layout.grid
            assert relative_error(found, np.asarray(numbers)) <= bound, name


def test_answers_equal_generate(family, session):
    _, model, processor = family
    for images, crops in ((session.images, None), ([*session.images, CROP], [CROP])):
        inputs = stock_inputs(processor, images, QUESTIONS[0])
        inputs.pop("labels", None)
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 20}
        with torch.no_grad():
            written = model.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :]
        wanted = processor.tokenizer.decode(written, skip_special_tokens=True).strip()
        assert session.answer(session.adapter.prompt(QUESTIONS[0]), crops=crops) == [wanted]
        if not crops:  # what localization collects answers by
            tokens = stock_generate(session, session.adapter.prompt(QUESTIONS[0]), **greedy)
            assert processor.tokenizer.decode(tokens).strip() == wanted


def test_questions_together_equal_each_alone_and_without_a_shared_prefix(family, monkeypatch):
    _, model, processor = family
    images, of, layers = [photo(*size, seed=2) for size in SIZES], [1, 0, 1], layer_numbers(model, "mean")
    asked, crops = [*QUESTIONS, "is there a blue sign?"], [photo(50, 30, seed=seed) for seed in range(3)]
    session = ImageSession(images, model, processor)
    prompts = [session.adapter.prompt(question) for question in asked]
    answers, pairs = session.answer(prompts, of=of), session.answer(prompts, crops=crops, of=of)
    maps, weighted = attention(session, prompts, layers, of), weighted_attention(session, prompts, layers, of)
    monkeypatch.setattr(PrefixStore, "row", lambda self, image, call: Row(None, call))
    for number, (prompt, image) in enumerate(zip(prompts, of, strict=True)):
        alone = ImageSession([images[image]], model, processor)
        assert answers[number] == alone.answer(prompt)[0]
        assert pairs[number] == alone.answer(prompt, crops=[crops[number]])[0]
        (single,), (slope,) = attention(alone, [prompt], layers), weighted_attention(alone, [prompt], layers)
        assert relative_error(maps[number].numpy(), single.numpy()) <= 2 * ROWS
        assert relative_error(weighted[number].numpy(), slope.numpy()) <= 2 * WEIGHTED


def test_maps_of_tiles_are_those_of_each_tile_alone(family, monkeypatch):
    _, model, processor = family
    cut = functools.partial(high_res_split_threshold, res_threshold=60)
    monkeypatch.setattr(session_module, "high_res_split_threshold", cut)
    session = ImageSession([photo(110, 60)], model, processor)
    prompts = session.adapter.prompt("why?"), session.adapter.prompt(GENERAL_PROMPT)
    method = METHODS["rel_att"].tiled().bind(model, "mean")
    found = method.map_of_tiles(session, *prompts)
    tiles = session.tiles()[0][0].images
    alone = [METHODS["rel_att"](tile, *prompts, model, processor, layer="mean") for tile in tiles]
    assert len(tiles) == 2
    assert relative_error(found, np.concatenate(alone, 1)) <= 1e-4


# ------------------------------------------------------------------------------------------------------------- layouts
def self_only(module, query, key, value, attention_mask=None, **options):
    """Attention in which each position sees itself alone."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


AttentionInterface.register("self_only", self_only)
AttentionMaskInterface.register("self_only", lambda *_, **__: None)


def features(session, image):
    """(tokens, dim) of an image, each position of the vision tower seeing itself alone."""
    adapter = session.adapter
    inputs = adapter.placed(adapter.preprocess([image]))
    with torch.no_grad(), with_implementation("self_only", [adapter.vision]):
        return adapter.encode_images(inputs, 1)[0].pooled


def misplaced(session, index, most=12):
    """Cells of a map whose pixels, made darker, change another token most than the one of `index`.

    A token's change is counted in what changing all of the image does to it, and what changing all but the cell does
    to it is taken off: several cells change an overview's token.
    """
    (image,), (layout,), wrong = session.images, session.layouts, []
    x1, y1, x2, y2 = layout.region
    (h, w), pixels, plain = layout.grid, np.asarray(image), features(session, image)
    other = pixels // 2
    most_change = (features(session, Image.fromarray(other)) - plain).norm(dim=-1)
    never = most_change < 1e-3 * most_change.max()  # a newline
    cells = [(row, column) for row in range(h) for column in range(w)]
    for row, column in cells[:: max(1, len(cells) // most)]:
        top, bottom = (y1 + (y2 - y1) * edge / h for edge in (row, row + 1))
        left, right = (x1 + (x2 - x1) * edge / w for edge in (column, column + 1))
        inside, outside = pixels.copy(), other.copy()
        place = (slice(max(0, round(top)), round(bottom)), slice(max(0, round(left)), round(right)))
        inside[place], outside[place] = other[place], pixels[place]
        changes = [(features(session, Image.fromarray(each)) - plain).norm(dim=-1) for each in (inside, outside)]
        change = ((changes[0] - changes[1]) / most_change).masked_fill(never, float("-inf"))
        if int(change.argmax()) != index[row, column]:
            wrong.append((row, column, int(change.argmax()), int(index[row, column])))
    return wrong


def test_a_cells_pixels_are_the_ones_that_its_token_shows(session):
    """By the model itself, not by the formula that the layout comes from."""
    (layout,) = session.layouts
    assert not misplaced(session, layout.index)
    for axis in (0, 1):
        assert misplaced(session, np.roll(layout.index, 1, axis))  # a shifted cell is told apart
    h, w = layout.grid
    if h != w:
        assert misplaced(session, layout.index.T.reshape(h, w))


def smooth(size):
    """A picture without details that resizing would lose."""
    coarse = np.random.default_rng(3).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def shows_another_region(model, processor, size):
    """Does the canvas of a picture show anything but the region that its map covers?"""
    image, settings = smooth(size), processor.image_processor
    session = ImageSession([image], model, processor)
    (layout,), prepared = session.layouts, session.prepared
    shown = session.adapter.canvas(prepared["pixel_values"], prepared, layout)[0].permute(1, 2, 0).numpy()
    shown = (shown * settings.image_std + np.array(settings.image_mean)) * 255
    shape, whole = shown.shape[1::-1], (image, Image.new("L", size, 255))
    cut = [each.crop(layout.region).resize(shape, Image.Resampling.BICUBIC) for each in whole]
    wanted, own = (np.asarray(each).astype(float) for each in cut)
    inside = own == 255  # elsewhere, and at the edges, the region may show padding
    inside[:4] = inside[-4:] = inside[:, :4] = inside[:, -4:] = False
    shifted = np.roll(shown, max(6, shape[0] // 30), 1)
    assert np.abs(shifted - wanted)[inside].mean() > 8  # it would be told apart
    return np.abs(shown - wanted)[inside].mean() >= 4


def test_the_canvas_shows_the_region_that_a_map_covers(family, size):
    _, model, processor = family
    assert not shows_another_region(model, processor, size)


def qwen3_vl_of_any_size():
    model, processor = qwen3_vl()
    processor.image_processor.size = {"shortest_edge": 256**2, "longest_edge": 4096**2}
    return model, processor


# Towers of real sizes, one of each kind of layout: (builder, the grids of the pictures in LARGE).
REAL_SIZES = {
    "qwen3_vl": (qwen3_vl_of_any_size, [(34, 60), (62, 19)]),
    "internvl": (functools.partial(internvl, 448, 14, 12), [(32, 64), (48, 16)]),
    "idefics3": (functools.partial(idefics3, side=364, patch=14, most=4), [(39, 52), (52, 26)]),
    "llava_onevision": (functools.partial(llava_onevision, 384, 14, 6), [(60, 108), (162, 48)]),
    "mistral3": (functools.partial(mistral3, patch=14, side=1540), [(31, 55), (55, 17)]),
}
LARGE = [(1920, 1080), (600, 2000)]


@pytest.mark.parametrize(("build", "grids"), REAL_SIZES.values(), ids=REAL_SIZES)
def test_at_real_sizes_the_model_makes_as_many_features_as_the_layout_says(build, grids):
    model, processor = build()
    for size, grid in zip(LARGE, grids, strict=True):
        session = ImageSession([photo(*size)], model, processor)
        (layout,), adapter = session.layouts, session.adapter
        with torch.no_grad():
            assert len(session.encoded[0].features.pooled) == layout.num_tokens > layout.index.max()
        assert layout.grid == grid
        assert np.abs(np.subtract(layout.region, (0, 0, *size))).max() <= 7  # a part of a cell may be padding
        shown = adapter.canvas(session.prepared["pixel_values"], session.prepared, layout)
        assert abs(shown.shape[3] / shown.shape[2] * grid[0] / grid[1] - 1) < 0.05


# ----------------------------------------------------------------------------------------------------------- registry
def test_every_kind_of_the_registry_has_a_small_model_here():
    kinds = {f"{model.config.model_type}+{model.config.vision_config.model_type}" for model, _ in
             (FAMILIES[name]() for name in ("pixtral",))}  # fmt: skip
    older = {"llava", "llava_next", "instructblip", "qwen2_5_vl"}
    apart = RASTERS | WITH_TORCHVISION | TILES  # see test_more_families.py, test_families_tiles.py
    further = {name for name in apart if name in REGISTRY}
    assert set(REGISTRY) == (set(FAMILIES) - {"pixtral"}) | kinds | older | further


def test_a_layer_without_attention_is_refused_by_its_number():
    model, processor = FAMILIES["qwen3_5"]()
    session, rel_att = ImageSession([photo()], model, processor), METHODS["rel_att"]
    assert layer_numbers(model, "mean") == (1, 3)
    for layer in (0, [1, 2]):
        with pytest.raises(ValueError, match="layer [02] has no attention: this model has it in layers 1, 3"):
            rel_att.bind(model, layer)
    with pytest.raises(ValueError, match="layer 4 does not exist: this model has layers 1, 3"):
        rel_att.bind(model, 4)
    with pytest.raises(ValueError, match="layer 2 has no attention"):
        METHODS["loc_att"].bind(model, heads="L2H0")
    prompt = session.adapter.prompt("why?")
    assert np.isfinite(rel_att.bind(model).maps(session, prompt, session.adapter.prompt(GENERAL_PROMPT))[0]).all()


def test_a_prompt_may_be_a_users_own_text_but_names_an_image_once(family):
    _, model, processor = family
    session = ImageSession([photo()], model, processor)
    adapter, layouts = session.adapter, session.layouts
    filled_in = adapter.chat("what is it?")
    assert torch.equal(adapter.tokenize("what is it?", layouts), adapter.tokenize(filled_in, layouts))
    assert len(adapter.tokenize(adapter.phrase("what is it?"), layouts)) > layouts[0].num_tokens
    with pytest.raises(ValueError, match="exactly once"):
        adapter.tokenize(adapter.prompt(f"what is {processor.image_token}?"), layouts)


def test_without_a_layer_of_its_own_a_family_reads_the_mean_and_says_so_once(family):
    from vicrop.models import chat

    _, model, _ = family
    chat.say_once.cache_clear()
    with pytest.warns(UserWarning, match="mean of all layers"):
        assert (
            layer_numbers(model) == layer_numbers(model, "mean") == tuple(adapter_class(model).attention_modules(model))
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_numbers(model)
