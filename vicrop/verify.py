"""Does a session give what the stock model gives? Rows, gradients, pixels, logits, answers, and the map's layout.

"rows" is the attention of a prompt's last token to the image, "words" the mean of that of its question's own tokens.

    report = verify(model, processor)           # a model in float32, small enough for a few full backward passes
    report.differs                              # [] if all holds, else a sentence for each thing that does not

The stock model is transformers' own forward with eager attention, given what the checkpoint's own processor makes.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from vicrop.attention import FrozenModel, with_implementation
from vicrop.attribution import attention, attention_of_words, own_words, pixel_gradients, weighted_attention
from vicrop.layouts import Layout, Size
from vicrop.probe import (
    Overlap,
    Pixels,
    owned,
    pixels_of,
    probed_grid,
    refuse_hidden,
    token_centres,
    token_owners,
    tolerances,
)
from vicrop.session import UNSEEN_CROP, ImageSession, Query, end_tokens, layer_numbers
from vicrop.tables import GENERAL_PROMPT

SIZES: tuple[Size, ...] = ((448, 224), (230, 410))  # of the test pictures: two aspect ratios
CROP: Size = (224, 224)
QUESTION = "what number is on the red sign?"
# Largest relative errors on a float32 model; or as far from float64 as three times what the stock model's float32 is.
BOUNDS = {"rows": 1e-5, "words": 1e-5, "gradients": 5e-5, "pixels": 2e-4, "logits": 1e-5, "second question": 1e-5,
          "with crop": 1e-5, "with two crops": 1e-5}  # fmt: skip
OWN_ERROR = 3
# On a loaded model, where the stock model's own rounding is as large as that of a mistake on the twin.
COARSE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
LAST = slice(-1, None)  # of a prompt's tokens
TELLS = 1e-4  # by so much, at least, logits must change with the picture
UNSEEN_SECOND = "a second crop changes nothing: the model answers as if it were not there"
WRONG = 1e-2  # what differs by so much does so for another reason than rounding
TIE = 1e-3  # parts of the largest logit: nearer ones are taken as equal
OLDER_NAMES = {"pixel_values_images": "pixel_values"}  # what some processors make -> what models take it by
SAMPLES = 9  # tokens that are looked at where tokens overlap


# ------------------------------------------------------------------------------------------------------------- reports
@dataclass
class PictureReport:
    """What was found of one test picture."""

    size: Size
    tokens: int
    grid: tuple[int, int]
    region: tuple[int, int, int, int]
    layout: str  # how it was checked
    shared: bool | None = None  # do all questions go on from the image's prefix?
    errors: dict[str, float] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found of a model; `differs` is empty if all holds."""

    family: str
    layers: int
    heads: int
    attention_layers: list[int]
    dtype: str
    pictures: list[PictureReport]

    @property
    def differs(self) -> list[str]:
        """A sentence for each thing that differs from the stock model."""
        return list(dict.fromkeys(sentence for each in self.pictures for sentence in each.differs))


def picture(size: Size, seed: int = 0) -> Image.Image:
    """A picture with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = rng.integers(-40, 40, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + fine).clip(0, 255).astype(np.uint8))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| / max |wanted|; infinite where shapes or numbers are none."""
    if found.shape != wanted.shape or not found.isfinite().all():
        return float("inf")
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


# --------------------------------------------------------------------------------------------------------- stock model
class Stock(NamedTuple):
    """One forward of the stock model, everything in its graph."""

    logits: Tensor  # (vocabulary,) after the last token
    probs: dict[nn.Module, Tensor]  # of the decoder's attention modules, and of the connector's
    pixels: Tensor  # the leaf


def stock_pass(session: ImageSession, inputs: dict[str, Any], graph: bool = True) -> Stock:
    """The stock model, eager, over inputs of its own processor."""
    model, probs = session.model, {}
    modules = list(session.attention_modules.values())
    modules += [session.adapter.connector[0]] if session.adapter.connector else []
    every = [
        each for each in model.modules() if isinstance(each, PreTrainedModel) and each._can_set_attn_implementation()
    ]
    hooks = [
        module.register_forward_hook(lambda own, _, output: probs.__setitem__(own, output[1])) for module in modules
    ]
    try:
        with with_implementation("eager", every), FrozenModel(model).frozen_eval(), torch.set_grad_enabled(graph):
            pixels = inputs["pixel_values"].detach().clone().requires_grad_(graph)
            logits = model(**inputs | {"pixel_values": pixels}, use_cache=False).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return Stock(logits if logits.dtype == torch.float64 else logits.float(), probs, pixels)


def stock_inputs(session: ImageSession, prompt: str, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[str]]:
    """(what the stock model is given for a prompt about images, what the adapter says otherwise than the processor)."""
    adapter = session.adapter
    prepared = adapter.preprocess(images)
    layouts = adapter.layouts(prepared, [image.size for image in images])
    ids = adapter.tokenize(prompt, layouts).to(session.device)
    own = adapter.stock_inputs(prompt, ids, adapter.placed(prepared))
    theirs, several = processor_inputs(session, prompt, images), len(images) > 1
    if theirs is None or not _shows_as_much(theirs, own, session.model.config.image_token_id, several):
        return own, []  # the adapter shows images in another size than the processor by itself
    taken, differs = signature(session.model.forward).parameters, []
    if not torch.equal(theirs["input_ids"].to(ids.device), own["input_ids"]):
        differs.append("the prompt's tokens are not those that its processor makes")
    pixels, others = own["pixel_values"], own.keys() & theirs.keys() - {"input_ids", "pixel_values"}
    others = [name for name in sorted(others)
              if not theirs[name].is_floating_point() and not _same_numbers(theirs[name], own[name])]  # fmt: skip
    if several and (others or theirs["pixel_values"].shape != pixels.shape):  # how inputs are stacked is its affair
        made = {name: value for name, value in theirs.items() if name in own or (name in taken and name != "labels")}
        return {name: value.to(pixels) if value.is_floating_point() else value.to(pixels.device)
                for name, value in made.items()}, differs  # fmt: skip
    differs += [f"the model is given another {name} than its processor makes" for name in others]
    lacking = [name for name in theirs if name in taken and name not in own and name != "labels"]  # only for a loss
    if lacking:
        differs.append(f"the model is given no {', '.join(lacking)}, which its processor makes")
    return own | {name: theirs[name].to(ids.device) for name in lacking}, differs


def _shows_as_much(theirs: dict[str, Tensor], own: dict[str, Tensor], image: int, several: bool) -> bool:
    """Does the processor by itself show an image in the size in which an adapter does? Of several: in as many tokens?

    Args:
        image: the id of an image's tokens.
    """
    shown = [int((inputs["input_ids"] == image).sum()) if several else inputs["pixel_values"].shape
             for inputs in (theirs, own)]  # fmt: skip
    return shown[0] == shown[1]


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other.device).long(), other.long())


def processor_inputs(session: ImageSession, prompt: str, images: Sequence[Image.Image]) -> dict[str, Tensor] | None:
    """What the checkpoint's processor makes of a prompt with its images; None where it takes no such call."""
    tokenizer, block = session.processor.tokenizer, str(session.adapter.image_placeholder)
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)  # a chat template writes it itself
    call: Any = session.processor
    if not callable(call):
        return None
    text = prompt if len(images) == 1 else prompt.replace(block, block * len(images))
    try:
        made: Any = call(images=list(images), text=[text], return_tensors="pt", add_special_tokens=not begun)
    except (ValueError, TypeError, RuntimeError):  # of prompts, or of several images, it may have another opinion
        return None
    return {OLDER_NAMES.get(str(name), str(name)): value for name, value in made.items() if isinstance(value, Tensor)}


def stock_answer(session: ImageSession, inputs: dict[str, Any]) -> tuple[list[int], list[Tensor]]:
    """(token ids of the greedy answer by `generate`, the logits at each step)."""
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": session.max_new_tokens}
    with FrozenModel(session.model).frozen_eval():
        made = session.model.generate(**inputs, **greedy, return_dict_in_generate=True, output_logits=True)
    steps = [each[0].float() for each in made.logits]
    tokens = made.sequences[0, -len(steps) :].tolist()
    return without_end(session, tokens), steps


def without_end(session: ImageSession, tokens: Sequence[int]) -> list[int]:
    """The tokens of an answer up to the first that ends it."""
    configs = [model.generation_config for model in (session.model, session.adapter.speaker)]
    ends = end_tokens(*configs, tokenizer=session.processor.tokenizer)
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


# ------------------------------------------------------------------------------------------------------------- sessions
def own_logits(session: ImageSession, prompt: str, crops: Sequence[Image.Image] = ()) -> Tensor:
    """(vocabulary,) float32 after a prompt's last token, by the session."""
    with session.frozen.frozen_eval():
        query = Query(0, prompt)
        rows = session.rows_with_crops([query], [crops]) if crops else [session.row(query)]
        read, _ = session.prefill(rows)
        return session.logits(read)[0]


def on_map(session: ImageSession, stock: dict[nn.Module, Tensor], prompt: str, words: slice = LAST) -> Tensor:
    """(layers, heads, h, w): the last token's row of attentions, or of what has their shapes, laid out as the map.

    Args:
        words: other tokens, the mean of whose rows is laid out instead.
    """
    (layout,), model = session.layouts, session.model
    ids = session.adapter.tokenize(prompt, [layout])
    at = (ids == model.config.image_token_id).nonzero()[:, 0]
    rows = torch.stack([stock[module][0, :, words].mean(1).cpu() for module in session.attention_modules.values()])
    rows = rows[..., at]
    if session.adapter.connector:
        rows = rows @ stock[session.adapter.connector[0]][0].mean(0).cpu()
    return rows[..., torch.from_numpy(layout.index)]


# -------------------------------------------------------------------------------------------------------------- layouts
def layout_differs(session: ImageSession) -> tuple[str, list[str]]:
    """(how the layout of a session's only image was checked, what is wrong with it): its formula against the probe."""
    (image,), (layout,) = session.images, session.layouts
    pixels, owners = pixels_of(session.adapter, image.size), token_owners(session.adapter, session.inputs)
    (left, top, right, bottom), (width, height) = layout.region, image.size
    edges = left / width, top / height, right / width, bottom / height
    try:
        token = owned(pixels, owners)
    except Overlap:
        return "by sample", [*_far_from_their_cells(session, layout, pixels, edges)]
    try:
        index, found = probed_grid(pixels, owners)
    except ValueError as error:
        return "probed", [str(error)]
    differs = []
    if index.shape != layout.grid or not (index == layout.index).all():
        shape, wrong = layout.grid, "another shape"
        if index.shape == shape:
            wrong = f"{int((index != layout.index).sum())} of its {index.size} cells hold another token"
        differs.append(f"the map of {shape} is not what the model's tokens show, {index.shape}: {wrong}")
    allowed = tolerances(layout.grid, edges) * 2
    if any(abs(a - b) > most for a, b, most in zip(edges, found, allowed, strict=True)):
        shown = [round(part * side) for part, side in zip(found, (*image.size, *image.size), strict=True)]
        differs.append(f"the map's region is {list(layout.region)} and its tokens show {shown}")
    try:
        refuse_hidden(pixels, token, layout.grid, edges)
    except ValueError as error:
        differs.append(str(error))
    return "probed", differs


def _far_from_their_cells(session: ImageSession, layout: Layout, pixels: Pixels, edges: Sequence[float]) -> list[str]:
    """Where tokens overlap: is the middle of what a token shows within a cell of where the formula puts it?"""
    (h, w), (left, top, right, bottom) = layout.grid, edges
    places = np.linspace(0, h * w - 1, SAMPLES).round().astype(int)
    wide, high = (right - left) / w, (bottom - top) / h
    centres = token_centres(session.adapter, session.inputs, pixels, layout.index.ravel()[places].tolist())
    for (x, y), place in zip(centres, places, strict=True):
        row, column = divmod(int(place), w)
        if abs(x - left - (column + 0.5) * wide) > wide or abs(y - top - (row + 0.5) * high) > high:
            return [f"the cell in row {row}, column {column} of {layout.grid} holds a token that shows another place"]
    return []


# --------------------------------------------------------------------------------------------------------------- exact
def verify(model: PreTrainedModel, processor: Any, **options: Any) -> Report:
    """The exact Report of a float32 model, which is left as it was.

    Args:
        options: those of the model's adapter.
    """
    pictures = [verify_picture(ImageSession([picture(size)], model, processor, **options)) for size in SIZES]
    return report_of(model, pictures)


def report_of(model: PreTrainedModel, pictures: list[PictureReport]) -> Report:
    """A Report about a model."""
    text = model.config.get_text_config()
    layers = list(layer_numbers(model, "mean"))
    dtype = str(model.dtype).removeprefix("torch.")
    return Report(model.config.model_type, text.num_hidden_layers, text.num_attention_heads, layers, dtype, pictures)


def stock_logits(session: ImageSession, prompt: str, images: Sequence[Image.Image]) -> Tensor:
    """(vocabulary,) of the stock model after a prompt about images."""
    return stock_pass(session, stock_inputs(session, prompt, images)[0], graph=False).logits


def words_of(session: ImageSession, prompt: str, general: str) -> slice | None:
    """The tokens of a prompt that question_att reads; None where it refuses prompts like this one."""
    with session.frozen.frozen_eval():
        return own_words(session.row(Query(0, prompt)).rest, session.adapter.tokenize(general, session.layouts))


def stock_maps(session: ImageSession, prompt: str, words: slice | None = None) -> dict[str, Tensor]:
    """{what: the stock model's} rows, gradients and pixels of a session's only image, by one full backward pass."""
    stock = stock_pass(session, stock_inputs(session, prompt, session.images)[0])
    v = stock.logits.log_softmax(-1).amax()
    *slopes, pixels = torch.autograd.grad(v, [*stock.probs.values(), stock.pixels])
    rows = {module: probs.detach() for module, probs in stock.probs.items()}
    weighted = {module: rows[module] * slope.relu() for module, slope in zip(rows, slopes, strict=True)}
    found = {"rows": on_map(session, rows, prompt), "gradients": on_map(session, weighted, prompt)}
    if words:
        found["words"] = on_map(session, rows, prompt, words)
    found["pixels"] = session.adapter.canvas(pixels, session.inputs, session.layouts[0]).sum(0).norm(dim=0)
    return found


class Comparison:
    """A session against the stock model, on one picture; `found` takes errors, and sentences on what differs."""

    def __init__(self, session: ImageSession, found: PictureReport):
        self.session, self.found, self.image = session, found, session.images[0]
        self.prompt, self.general = (session.adapter.prompt(text) for text in (QUESTION, GENERAL_PROMPT))
        self.crops = picture(CROP, 5), picture(CROP, 6)

    @cached_property
    def fine(self) -> ImageSession:
        """The same session of the same model in float64."""
        model = copy.deepcopy(self.session.model).double()
        model.set_experts_implementation("eager")  # the others know no float64; without experts it changes nothing
        return ImageSession([self.image], model, self.session.processor, **self.session.adapter.given)

    def compare(self, what: str, found: Tensor, wanted: Tensor, again: Callable[[], Tensor]) -> None:
        """Note the error; a sentence if it is larger than its bound, and ours further from float64 than theirs can be.

        Args:
            again: the stock model's values once more, in float64.
        """
        error, bound = relative_error(found, wanted), BOUNDS[what]
        self.found.errors[what] = max(error, self.found.errors.get(what, 0.0))
        if bound < error < WRONG:
            exact = again()
            error = min(error, relative_error(found, exact))
            bound = max(bound, OWN_ERROR * relative_error(wanted, exact))
        if not error <= bound:
            self.found.differs.append(f"{what}: {error:.1e} beside the stock model, where {bound:.1e} is allowed")

    def inputs(self) -> None:
        """What the model is given for a question is what its processor makes."""
        self.found.differs += stock_inputs(self.session, self.prompt, [self.image])[1]

    def maps(self) -> None:
        """Rows, weighted rows and pixel gradients are those of the stock model's full backward pass."""
        session, words = self.session, words_of(self.session, self.prompt, self.general)
        wanted, layers = stock_maps(session, self.prompt, words), layer_numbers(session.model, "mean")
        made = {"rows": lambda: attention(session, [self.prompt], layers)[0],
                "words": lambda: attention_of_words(session, [self.prompt], self.general, layers)[0],
                "gradients": lambda: weighted_attention(session, [self.prompt], layers)[0],
                "pixels": lambda: pixel_gradients(session, [self.prompt])[0]}  # fmt: skip
        for what in wanted:
            self.compare(
                what, made[what](), wanted[what], lambda what=what: stock_maps(self.fine, self.prompt, words)[what]
            )

    def logits(self) -> None:
        """Logits are the stock model's, for two questions, with a crop and with two; and each crop changes them."""
        (first, second), session = self.crops, self.session
        asked = {
            "logits": (self.prompt, ()),
            "second question": (self.general, ()),
            "with crop": (self.prompt, (first,)),
            "with two crops": (self.prompt, (first, second)),
        }
        found = {}
        for what, (prompt, crops) in asked.items():
            again = partial(stock_logits, prompt=prompt, images=[self.image, *crops])
            found[what] = own_logits(session, prompt, crops)
            self.compare(what, found[what], again(session), lambda again=again: again(self.fine))
        others = {"with crop": ((second,), UNSEEN_CROP), "with two crops": ((first, first), UNSEEN_SECOND)}
        for what, (crops, sentence) in others.items():
            if relative_error(own_logits(session, self.prompt, crops), found[what]) < TELLS:
                self.found.differs.append(sentence)
                break

    def answers(self) -> None:
        """Greedy answers are those of `generate`, up to ties that rounding decides."""
        session, query = self.session, Query(0, self.prompt)
        for crops in ((), self.crops[:1]):
            wanted, steps = stock_answer(session, stock_inputs(session, self.prompt, [self.image, *crops])[0])
            with session.frozen.frozen_eval():
                rows = session.rows_with_crops([query], [crops]) if crops else [session.row(query)]
                (answer,) = session.greedy_decode(session.prefill(rows)[0], [()])
                found = without_end(session, answer.tokens)
            number = next((at for at, pair in enumerate(zip(found, wanted, strict=False)) if len(set(pair)) > 1), None)
            if number is None and len(found) == len(wanted):
                continue
            at = min(len(found), len(wanted)) if number is None else number
            best = steps[min(at, len(steps) - 1)].topk(2).values
            if number is None or best[0] - best[1] > TIE * best[0].abs():
                which = " with a crop" if crops else ""
                self.found.differs.append(f"the answer{which} is not that of generate, from token {at + 1} on")


def verify_picture(session: ImageSession) -> PictureReport:
    """The PictureReport of a fresh session of one picture; an error of the session's own is something that differs."""
    (image,), (layout,) = session.images, session.layouts
    how, differs = layout_differs(session)
    found = PictureReport(image.size, int(layout.num_tokens), layout.grid, layout.region, how, differs=differs)
    comparison = Comparison(session, found)
    for check in (comparison.inputs, comparison.maps, comparison.logits, comparison.answers):
        try:
            check()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what does not fit a family may fail in any way
            found.differs.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    found.shared = session.store.shared
    return found


# --------------------------------------------------------------------------------------------------------------- loaded
def verify_loaded(model: PreTrainedModel, processor: Any, **options: Any) -> Report:
    """The coarse Report of a model as it was loaded: rows and logits against the stock model in the same dtype.

    Args:
        options: those of the model's adapter.
    """
    return report_of(model, [_coarse(ImageSession([picture(SIZES[0])], model, processor, **options))])


def _coarse(session: ImageSession) -> PictureReport:
    (image,), (layout,), model = session.images, session.layouts, session.model
    prompt, layers = session.adapter.prompt(QUESTION), layer_numbers(session.model, "mean")
    crop, another = picture(CROP, 5), picture(CROP, 6)
    found = PictureReport(image.size, int(layout.num_tokens), layout.grid, layout.region, "taken as it is")
    logits = torch.empty(0)
    for what, crops in (("logits", ()), ("with crop", (crop,))):
        stock = stock_pass(session, stock_inputs(session, prompt, [image, *crops])[0], graph=False)
        logits = own_logits(session, prompt, crops)
        found.errors[what] = relative_error(logits, stock.logits)
        if not crops:
            general = session.adapter.prompt(GENERAL_PROMPT)
            made = {"rows": (attention(session, [prompt], layers), LAST)}
            if words := words_of(session, prompt, general):
                made["words"] = attention_of_words(session, [prompt], general, layers), words
            found.errors |= {name: relative_error(own, on_map(session, stock.probs, prompt, tokens))
                             for name, ((own,), tokens) in made.items()}  # fmt: skip
    most = COARSE.get(model.dtype, max(COARSE.values()))
    found.differs = [f"{what}: {error:.1e} beside the stock model in {model.dtype}, where {most} is allowed"
                     for what, error in found.errors.items() if not error <= most]  # fmt: skip
    if relative_error(own_logits(session, prompt, (another,)), logits) < TELLS:
        found.differs.append(UNSEEN_CROP)
    found.shared = session.store.shared
    return found
