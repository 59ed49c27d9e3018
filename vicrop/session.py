"""A session: what a model has seen of some images, open to any number of questions.

Everything that this toolkit asks of a model goes through here: attention (attribution.py), the answer, and the answer
with a crop. They share one pass over the image. Nothing here knows a family: see adapter.py.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from vicrop.adapter import EncodedImage, adapter_class, decoder_of
from vicrop.attention import FrozenModel, capture_attention, device_of, frozen_eval, replaced, with_implementation
from vicrop.decoder_call import DecoderCall, captured_call
from vicrop.decoding import Answer, Decoding, Draft, usable
from vicrop.generation import rules_of
from vicrop.images import ImageSource, load_image
from vicrop.layouts import Layout
from vicrop.prefix_cache import PrefixCache, PrefixStore, Row, left_padded
from vicrop.tables import MAX_NEW_TOKENS
from vicrop.tiles import high_res_split_threshold, same_size

Prompts = str | Sequence[str]  # see ImageSession
Of = Sequence[int] | None
Asked = TypeVar("Asked")
Crops = Image.Image | Sequence[Image.Image]  # what follows the image in a prompt: one more (PIL), or several
SESSION_IMAGES = 8  # at most so many images (tiles of a large one) go through the model together
UNSEEN_CROP = "the crop changes nothing: the model takes one image, and answers as if the other were not there"
KEPT_BYTES = 64 << 20  # of decoder calls that several methods have in common


class Query(NamedTuple):
    """A question about one of a session's images."""

    image_index: int
    prompt: str  # whole, template included
    forced_tokens: tuple[int, ...] = ()  # token ids that follow it, the beginning of an answer


class Read(NamedTuple):
    """Queries that a decoder has read: its output, and where each query's tokens are."""

    output: Any
    cache: PrefixCache
    rows: list[Row]
    shifts: list[int]  # what a token's number lacks to its slot


class ImageBatch:
    """Images on their way through a model's vision side, each step made when it is first asked for.

    Attributes:
        images: the PIL images, RGB.
        adapter: what is peculiar to the model's family.
    """

    def __init__(self, images: Sequence[ImageSource], model: PreTrainedModel, processor: Any, **options: Any):
        self.model: Any = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
        self.processor = processor
        self.adapter = adapter_class(self.model)(self.model, processor, **options)
        self.images = [load_image(image) for image in images]

    @cached_property
    def prepared(self) -> dict[str, Tensor]:
        """What the processor makes of the images, on the CPU; only now, for a session of tiles never sees the whole."""
        return self.adapter.preprocess(self.images)

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The same on the vision side's device, in its dtype."""
        return self.adapter.placed(self.prepared)

    @cached_property
    def layouts(self) -> list[Layout]:
        """How the tokens of each image make a map, and which rectangle of the image it covers."""
        return self.adapter.layouts(self.prepared, [image.size for image in self.images])

    @cached_property
    def encoded(self) -> list[EncodedImage]:
        """The images, encoded; each is kept by itself."""
        return self.encode(self.inputs, self.layouts)

    def encode(self, inputs: dict[str, Tensor], layouts: list[Layout]) -> list[EncodedImage]:
        """Images, given the vision side's inputs of all of them and the layout of each."""
        features = self.adapter.encode_images(inputs, len(layouts))
        return [EncodedImage(self.adapter.one_image(inputs, number), layout, each)
                for number, (layout, each) in enumerate(zip(layouts, features, strict=True))]  # fmt: skip


class ImageSession(ImageBatch):
    """What a model has seen of a batch of images, open to any number of questions.

        session = ImageSession(["photo.jpg"], model, processor)
        session.answer(session.adapter.prompt("what does the sign say?"))        # ["stop"]

    The image comes before the question, so its keys and values are computed once and every question continues from
    them, as far as what the decoder is handed says that it may. Where a method takes `prompts`, that is one prompt for
    every image, or a list of prompts; `of` then says which image each is about (default: one each, in order).

    Args:
        images: PIL images or paths, of any sizes.
        model, processor: as loaded, in any dtype, with any attention implementation; left as they were.
        max_new_tokens: an answer has at most so many tokens.
        options: those of the model's adapter (geometry=, ...).
    Raises:
        ValueError: no adapter knows the model; an option that it does not have; an image that cannot be read.

    Attributes:
        batched: do several questions go through the decoder together? None before there were several.
    """

    def __init__(self, images: Sequence[ImageSource], model: PreTrainedModel, processor: Any,
                 max_new_tokens: int = MAX_NEW_TOKENS, **options: Any):  # fmt: skip
        super().__init__(images, model, processor, **options)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        self.decoder, self.device = decoder_of(self.model), device_of(self.model.get_input_embeddings())
        self.frozen, self.attention_modules = FrozenModel(self.model), self.adapter.attention_modules(self.model)
        self.store, self.batched = PrefixStore(self.decoder, len(self.images)), None
        self.rows: dict[tuple[Query, int], Tensor] = {}  # (query, layer) -> its map (heads, h, w), once it was read
        self.weighted: dict[tuple[Query, tuple[int, ...]], Tensor] = {}  # the same, weighted by gradients
        self.words: dict[tuple[Query, tuple[int, ...], tuple], Tensor] = {}  # the map of some words of a query
        self._calls: OrderedDict[Query, Row] = OrderedDict()
        self._tiles: dict[int, tuple] = {}

    # -- parts of the images
    def only(self, image: int) -> "ImageSession":
        """A session of one of the images: this one if it is its only one."""
        if len(self.images) == 1:
            return self
        return ImageSession([self.images[image]], self.model, self.processor, self.max_new_tokens, **self.adapter.given)

    def tiles(self, image: int = 0) -> tuple[Iterator["ImageSession"], int, int]:
        """(sessions, rows, columns): the tiles of an image, row by row, at most SESSION_IMAGES in each session.

        The sessions of a moderate image are kept, so that methods and questions share them. Those of a huge one would
        hold too many keys and values: they are made as they are asked for, and let go.
        """
        if image not in self._tiles:
            tiles, rows, columns = high_res_split_threshold(self.images[image])
            tiles = same_size(tiles, square=self.adapter.square_tiles)
            chunks = [tiles[start : start + SESSION_IMAGES] for start in range(0, len(tiles), SESSION_IMAGES)]
            sessions = (ImageSession(each, self.model, self.processor, **self.adapter.given) for each in chunks)
            if len(chunks) > 1:
                return sessions, rows, columns
            self._tiles[image] = list(sessions), rows, columns
        return self._tiles[image]

    # -- from questions to what the decoder is handed
    def queries(self, prompts: Prompts, of: Of = None, forced: Sequence[Sequence[int]] | None = None) -> list[Query]:
        """[Query] for a prompt about every image, or for prompts about the images numbered in `of`."""
        prompts = [prompts] * len(self.images) if isinstance(prompts, str) else prompts
        images = range(len(self.images)) if of is None else of
        forced = forced or [()] * len(prompts)
        return [Query(*each) for each in zip(images, prompts, map(tuple, forced), strict=True)]

    def decoder_call(self, query: Query, images: Sequence[EncodedImage], graph: bool = False) -> DecoderCall:
        """What the model's own forward hands its decoder for a query about images that are encoded already.

        Args:
            graph: the connector's attention, where there is one, becomes a leaf of autograd's graph.
        """
        counts = [image.layout.num_tokens for image in images]
        features = [image.features.pooled.shape[-2] for image in images]
        if self.adapter.connector is None and counts != features:
            raise ValueError(f"{sum(counts)} places for image tokens, and {sum(features)} of them to fill in")
        ids = self.adapter.tokenize(query.prompt, [image.layout for image in images])
        ids = torch.cat([ids, ids.new_tensor(query.forced_tokens)])
        image_at = (ids == self.model.config.image_token_id).nonzero()[:, 0][: images[0].layout.num_tokens]
        placed = ids.to(self.device)
        with self._captured_connector(graph) as captured:
            inputs = {"input_ids": placed[None], **self.adapter.forward_inputs(query.prompt, placed, images)}
            call = captured_call(self.model, self.decoder, inputs, ids, image_at)
        return replace(call, through=captured.probs[self.adapter.connector[0]]) if self.adapter.connector else call

    def _captured_connector(self, graph: bool) -> AbstractContextManager[Any]:
        if self.adapter.connector is None:
            return nullcontext()
        module, owner = self.adapter.connector
        return capture_attention([owner], [module], graph=graph)

    def row(self, query: Query) -> Row:
        """A query about its image as a Row of this session's store; kept for other methods, as far as memory allows."""
        if query not in self._calls:
            row = self.store.row(query.image_index, self.decoder_call(query, [self.encoded[query.image_index]]))
            self._calls[query] = row._replace(rest=row.rest.owned())
            while len(self._calls) > 1 and sum(each.rest.nbytes for each in self._calls.values()) > KEPT_BYTES:
                self._calls.popitem(last=False)
            return row
        self._calls.move_to_end(query)
        return self._calls[query]

    def rows_with_crops(self, queries: list[Query], crops: Sequence[Crops]) -> list[Row]:
        """The Rows of queries about their image and the crops of each; only the crops are encoded, all together.

        Raises:
            ValueError: the model takes no second image (see refuse_unseen_crops).
        """
        of_each = [[each] if isinstance(each, Image.Image) else each for each in crops]
        shown = [crop for own in of_each for crop in own]
        prepared = self.adapter.preprocess(shown)
        layouts = self.adapter.layouts(prepared, [crop.size for crop in shown])
        encoded, rows = iter(self.encode(self.adapter.placed(prepared), layouts)), []
        for query, own in zip(queries, of_each, strict=True):
            images = [self.encoded[query.image_index], *islice(encoded, len(own))]
            call = self.decoder_call(query, images)
            refuse_unseen_crops(call, images, self.model.config)
            rows.append(self.store.row(query.image_index, call))
        return rows

    def batches(self, queries: list[Asked], rows: list[Row]) -> Iterator[tuple[list[Asked], list[Row]]]:
        """As many queries, or what stands for them, with their Rows as may go through the decoder together."""
        if len(rows) > 1:
            alike = all((row.prefix is None, row.rest.constants) == (rows[0].prefix is None, rows[0].rest.constants)
                        for row in rows)  # fmt: skip
            fits = alike and self.store.takes_padding and all(row.rest.batchable for row in rows)
            self.batched = self.batched is not False and fits
        size = len(rows) if self.batched else 1
        for start in range(0, len(rows), size or 1):
            yield queries[start : start + size], rows[start : start + size]

    # -- through the decoder
    def prefill(self, rows: list[Row], layers: Sequence[int] = (), only_rows: bool = False,
                words: Sequence[slice] = ()) -> tuple[Read, Any]:  # fmt: skip
        """(Read, {module: attention rows} of the layers): what is unread of these rows goes through the decoder.

        Args:
            only_rows: nothing but the attention is asked for: the pass ends at the last of the layers, if it may.
            words: for each row the tokens, counted from its end, of whose attention the mean is read, not the last's.
        """
        stop = only_rows and not self.frozen.offloaded and self.store.can_stop
        depth = max(layers) + 1 if stop else len(self.decoder.layers)
        cache, shifts = self.store.begin(rows, depth)
        output = None
        with self.capture(layers, stop=stop, words=words) as captured:
            output = cache.extend(self.decoder, [row.rest for row in rows])
        return Read(output, cache, rows, shifts), captured.probs

    def capture(self, layers: Sequence[int], **how: Any) -> AbstractContextManager[Any]:
        """`capture_attention` of some of the decoder's layers."""
        return capture_attention([self.decoder], [self.attention_modules[layer] for layer in layers], **how)

    def logits(self, read: Read) -> Tensor:
        """(batch, vocabulary) float32 after the last token, by the model's own code behind its decoder."""
        return self.last_logits(read, [1] * len(read.rows))[:, -1]

    def last_logits(self, read: Read, counts: Sequence[int]) -> Tensor:
        """(batch, tokens, vocabulary) float32 after the last tokens, so many of each row; others come before them."""
        width, last = max(counts), copy.copy(read.output)
        last.last_hidden_state = read.output.last_hidden_state[:, -width:]
        ids = torch.stack([left_padded(row.rest.ids[-width:], 0, width) for row in read.rows]).to(self.device)
        positions = [left_padded(row.rest.positions[..., -width:], -1, width) for row in read.rows]
        with replaced(self.decoder, "forward", lambda *_, **__: last):
            scores = self._speak(ids, torch.cat(positions, -2))
        for row, count in zip(scores, counts, strict=True):
            finite(row[-count:])
        return scores.float()

    def _speak(self, ids: Tensor, positions: Tensor, **cached: Any) -> Tensor:
        return self.adapter.speaker(input_ids=ids, position_ids=positions, **cached).logits

    def maps(self, found: dict[nn.Module, Tensor], layers: Sequence[int], queries: Sequence[Query], read: Read,
             through: Sequence[Tensor | None] | None = None) -> list[Tensor]:  # fmt: skip
        """[(layers, heads, h, w)] per query from {module: (batch, heads, rows, keys)}, of each the last row.

        Args:
            through: per query what stands for the connector's attention (images, heads, tokens, patches).
        """
        stacked = torch.stack([found[self.attention_modules[layer]][:, :, -1].to(self.device) for layer in layers], 1)
        through, maps = through or [row.rest.through for row in read.rows], []
        for values, query, row, shift, connector in zip(stacked, queries, read.rows, read.shifts, through, strict=True):
            values = values[..., (row.rest.image_at + shift).to(values.device)]  # (layers, heads, tokens)
            if connector is not None:
                values = values @ connector[0].mean(0).to(values.device)
            maps.append(values[..., torch.from_numpy(self.layouts[query.image_index].index).to(values.device)])
        return maps

    def remember(self, found: dict[nn.Module, Tensor], layers: Sequence[int], queries: list[Query], read: Read) -> None:
        """Keep the maps of queries, layer by layer."""
        for query, maps in zip(queries, self.maps(found, layers, queries, read), strict=True):
            self.rows.update({(query, layer): att_map for layer, att_map in zip(layers, maps, strict=True)})

    # -- answers
    def answer(self, prompts: Prompts, crops: Sequence[Crops] | None = None, layers: Sequence[int] = (),
               of: Of = None) -> list[str]:  # fmt: skip
        """The texts of `answers`."""
        return [answer.text for answer in self.answers(prompts, crops, layers, of)]

    @frozen_eval
    def answers(self, prompts: Prompts, crops: Sequence[Crops] | None = None, layers: Sequence[int] = (),
                of: Of = None, drafts: Sequence[Draft] | None = None) -> list[Answer]:  # fmt: skip
        """Greedy answers, at most `max_new_tokens` tokens, one per prompt.

        Args:
            prompts, of: see the class.
            crops: for each prompt one more image (PIL) or several, which follow the first; None: there are none.
            layers: layers whose attention will be asked for: read off this answer's own prefill.
            drafts: for each prompt what its answer may turn out to be: where it does, that takes no decoding steps.
                Nothing else depends on it.
        Raises:
            ValueError: the model's logits are not finite; layers of a prompt that also shows a crop, or of a draft.
        """
        if layers and (crops or drafts):
            raise ValueError("maps are those of a prompt about the image alone: ask for layers without crops or drafts")
        read = drafts if drafts and self.store.takes_drafts else []
        drafts = usable(read, self.model.config, self.processor.tokenizer, self.max_new_tokens)
        queries = self.queries(prompts, of, [draft[:-1] for draft in drafts])
        rows = self.rows_with_crops(queries, crops) if crops else [self.row(query) for query in queries]
        if not all(row.rest.causal_from(row.rest.length - len(query.forced_tokens))
                   for row, query in zip(rows, queries, strict=True) if query.forced_tokens):  # fmt: skip
            self.store.takes_drafts = False
            return self.answers(prompts, crops, layers, of)
        drafts, found = drafts or [()] * len(queries), []
        for asked, batch in self.batches(queries, rows):
            read, probs = self.prefill(batch, layers)
            if layers:
                self.remember(probs, layers, asked, read)
            found += self.greedy_decode(read, drafts[len(found) : len(found) + len(batch)])
        return found

    def greedy_decode(self, read: Read, drafts: Sequence[Draft]) -> list[Answer]:
        """The Answer of each row, greedily, up to an end token: what `generate` gives, with nothing set up anew.

        By the adapter's option `generation` that is without the checkpoint's generation config, or with it.

        Args:
            drafts: for each row what its answer may turn out to be; the row has read all of it but the last token.
        """
        configs = [model.generation_config for model in (self.model, self.adapter.speaker)]  # hashing one is slow
        ends, tokenizer = end_tokens(*configs, tokenizer=self.processor.tokenizer), self.processor.tokenizer
        counts = [max(1, len(draft)) for draft in drafts]
        prompts = [row.rest.ids[: row.rest.length - count + 1] for row, count in zip(read.rows, counts, strict=True)]
        logits, how, cache = self.last_logits(read, counts), self.adapter.given["generation"], read.cache
        rules = rules_of(how, self.adapter.speaker, prompts, self.max_new_tokens, logits.device)
        answers = Decoding(logits, drafts, ends, self.max_new_tokens, rules)
        cache.drop(answers.unread)
        said = torch.tensor([[len(tokens)] for tokens in answers.tokens], device=self.device)
        asked = [row.rest.positions[..., -count, None] for row, count in zip(read.rows, counts, strict=True)]
        positions = torch.cat(asked, -2) + said
        with with_implementation("captured", [self.decoder]):
            while not answers.over:  # positions (..., batch, 1)
                last = torch.tensor(answers.last, device=self.device)[:, None]
                answers.add(finite(self._speak(last, positions, **cache.step(self.adapter.speaker))[:, -1]).float())
                positions = positions + 1
        texts = [tokenizer.decode([token for token in tokens if token not in answers.ends], skip_special_tokens=True)
                 for tokens in answers.tokens]  # fmt: skip
        return [Answer(text.strip(), float(f"{math.exp(sum(logs)):.5g}"), tuple(tokens))
                for text, logs, tokens in zip(texts, answers.logs, answers.tokens, strict=True)]  # fmt: skip


def refuse_unseen_crops(call: DecoderCall, images: Sequence[EncodedImage], config: Any) -> None:
    """ValueError if a decoder is handed nothing of a crop: some models take no second image, and say nothing.

    Args:
        call: about `images`, the image and its crops; config: the model's.
    """
    at = (call.ids == config.image_token_id).nonzero()[:, 0].to(call.embeds.device)
    counts, first = [image.layout.num_tokens for image in images], images[0].features.pooled
    in_layers = call.deepstack.features if call.deepstack else []  # some models hand over nothing else (Granite)
    if len(at) == sum(counts):
        handed = torch.cat([call.embeds[0, at], *(each.to(call.embeds) for each in in_layers)], -1)
        own, *crops = handed.split(counts)
        copies = (torch.equal(own, crop) and not torch.equal(first, image.features.pooled)
                  for crop, image in zip(crops, images[1:], strict=True))  # fmt: skip
        if not any(copies):
            return
    raise ValueError(f"{UNSEEN_CROP} (the decoder of this {config.model_type} model is handed nothing of it)")


def finite(logits: Tensor) -> Tensor:
    """The logits of next tokens, as they came from the model; a ValueError if one of them is NaN or infinite."""
    if not logits.isfinite().all():
        what = "NaN" if logits.isnan().any() else "infinite"
        raise ValueError(
            f"the logits of the next token are {what}, so there is no answer (they were computed in "
            f"{str(logits.dtype).removeprefix('torch.')}): float16 overflows, use --dtype bfloat16 or float32"
        )
    return logits


def layer_numbers(model: PreTrainedModel, layer: Any = None) -> tuple[int, ...]:
    """Ascending zero-based layer numbers for `layer`: an int, a list of ints, "mean" (all) or None (the default).

    Raises:
        ValueError: naming the layer that the model does not have and those that it has.
    """
    kind = adapter_class(model)
    available = sorted(kind.attention_modules(model))
    layer = kind.default_layer(model) if layer is None else layer
    if layer == "mean":
        return tuple(available)
    numbers = layer if isinstance(layer, (list, tuple)) and layer else [layer]
    return tuple(sorted({valid_layer(number, available, "this model") for number in numbers}))


def valid_layer(number: Any, available: Sequence[int], whose: str) -> int:
    """The number as an int, if it is one of the available layers; else a ValueError that names those."""
    integer = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not integer or number not in available:
        first, last = available[0], available[-1]
        whole = len(available) == last - first + 1
        named = f"{first} to {last}" if whole else ", ".join(map(str, available))
        if integer and 0 <= number <= last:
            raise ValueError(f"layer {number} has no attention: {whose} has it in layers {named}")
        raise ValueError(f"layer {number!r} does not exist: {whose} has layers {named}")
    return int(number)


def end_tokens(*configs: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the generation configs, and the tokenizer's own.

    InstructBLIP's language model may name another token than the one that it was trained to end with.
    """
    found = [each for config in configs for each in np.atleast_1d(config.eos_token_id)] + [tokenizer.eos_token_id]
    found = sorted({int(token) for token in found if token is not None})
    if not found:
        raise ValueError("neither the generation config nor the tokenizer names a token that ends an answer")
    return found
