"""What a session's answers come from: attention to the image, attention weighted by its gradient, pixel gradients."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vicrop.attention import frozen_eval
from vicrop.decoder_call import DecoderCall
from vicrop.decoding import Answer
from vicrop.edges import edge_mask as strong_edges
from vicrop.edges import high_pass_filter
from vicrop.prefix_cache import PrefixStore, Row
from vicrop.session import ImageSession, Of, Prompts, Query, Read


@frozen_eval
def attention(session: ImageSession, prompts: Prompts, layers: Sequence[int], of: Of = None,
              forced: Sequence[Sequence[int]] | None = None) -> list[Tensor]:  # fmt: skip
    """A_st: attention of a prompt's last token to its image (times A_ti where a connector is in between).

    Args:
        prompts, of: see session.ImageSession.
        layers: zero-based layer numbers, ascending.
        forced: per prompt the token ids that follow it; then it is the attention of the last of those.
    Returns:
        [(layers, heads, h, w) float32 tensor] per prompt, row 0 of the map at the top.
    """
    queries = session.queries(prompts, of, forced)
    missing = [layer for layer in layers if any((query, layer) not in session.rows for query in queries)]
    # Several questions about an image have its general prompt in common: it is read once.
    new = [query for query in dict.fromkeys(queries) if any((query, layer) not in session.rows for layer in missing)]
    for batch, rows in session.batches(new, [session.row(query) for query in new]):
        read, found = session.prefill(rows, missing, only_rows=True)
        session.remember(found, missing, batch, read)
    return [torch.stack([session.rows[query, layer] for layer in layers]) for query in queries]


class QuestionInFront(ValueError):
    """A prompt has its question in front of the image: no word of it sees the image."""


@frozen_eval
def attention_of_words(session: ImageSession, prompts: Prompts, general_prompt: str, layers: Sequence[int],
                       of: Of = None) -> list[Tensor]:  # fmt: skip
    """A_wt: attention of a question's own words to its image (times A_ti where a connector is in between), their mean.

    Returns:
        [(layers, heads, h, w) float32 tensor] per prompt.
    Raises:
        QuestionInFront: no word of a prompt's question sees the image.
    """
    queries, keys, new = session.queries(prompts, of), [], {}
    general = {number: session.adapter.tokenize(general_prompt, [session.layouts[number]])
               for number in {query.image_index for query in queries}}  # fmt: skip
    for query in queries:
        row = session.row(query)
        own = own_words(row.rest, general[query.image_index])
        if own is None:
            raise QuestionInFront("question_att reads where the words of a question look: they must stand behind the "
                                  f"image, and they stand in front of it in {query.prompt!r}")  # fmt: skip
        keys.append((query, tuple(layers), (own.start, own.stop)))
        if keys[-1] not in session.words:
            new[keys[-1]] = row
    for batch, rows in session.batches(list(new), list(new.values())):
        read, found = session.prefill(rows, layers, only_rows=True, words=[slice(*key[-1]) for key in batch])
        maps = session.maps(found, layers, [key[0] for key in batch], read)
        session.words |= dict(zip(batch, maps, strict=True))
    return [session.words[key] for key in keys]


def own_words(asked: DecoderCall, general: Tensor) -> slice | None:
    """Which tokens of a prompt, counted from its end, are the question's own; None if they stand in front of the image.

    They are what the general prompt neither begins nor ends with. Of the general prompt itself, and of one that has no
    other words, they are all behind the image.

    Args:
        general: (T,) token ids of the general prompt about the same image.
    """
    start, end = (equal_tokens(*both) for both in ((asked.ids, general), (asked.ids.flip(0), general.flip(0))))
    if start + end >= asked.length:
        start, end = 0, 0
    start, stop = max(start, int(asked.image_at[-1]) + 1, asked.start), asked.length - end
    return slice(start - asked.length, -end or None) if start < stop else None


def equal_tokens(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts (T,) and (S,) have in common from the beginning on."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).int().cumprod(0).sum())


@frozen_eval
def weighted_attention(session: ImageSession, prompts: Prompts, layers: Sequence[int], of: Of = None) -> list[Tensor]:
    """A_st * relu(dv/dA_st) with v the log-probability of the likeliest next token; shapes as `attention`.

    Where a connector is in between, that times A_ti * relu(dv/dA_ti).

    Raises:
        ValueError: a quantised model's layers hand no gradients on.
    """
    queries, layers = session.queries(prompts, of), tuple(layers)
    new = [query for query in dict.fromkeys(queries) if (query, layers) not in session.weighted]
    for _ in _weigh(session, new, layers):
        pass
    return [session.weighted[query, layers] for query in queries]


@frozen_eval
def answers_with_gradients(session: ImageSession, prompts: Prompts, layers: Sequence[int],
                           of: Of = None) -> list[Answer]:  # fmt: skip
    """`session.answers`, of whose own first pass `weighted_attention` and `attention` of these layers are kept."""
    queries, answers = session.queries(prompts, of), {}
    for batch, read in _weigh(session, list(dict.fromkeys(queries)), tuple(layers)):
        answers |= dict(zip(batch, session.greedy_decode(read, [()] * len(batch)), strict=True))
    return [answers[query] for query in queries]


def _weigh(session: ImageSession, queries: list[Query], layers: tuple[int, ...]) -> Iterator[tuple[list[Query], Read]]:
    """Keep the weighted maps of queries, and the maps; yields what was read for them, on which their answers may go on.

    Where a connector is in between, all after its softmax depends on it: its rows are the leaf, and the whole pass
    keeps its graph. Else the part of a pass that needs no graph is done without, and the last token is the rest: it
    influences no other token, so a single-token step on top of the cached rest gives the exact gradient. Where others
    see it after all (PaliGemma's prompts), they are read in that step as well.
    """
    connector = session.adapter.connector is not None
    with session.frozen.checked_gradients():
        with torch.set_grad_enabled(connector):
            rows = [_with_graph(session, query) if connector else session.row(query) for query in queries]
        for batch, some in session.batches(queries, rows):
            cache, shifts = session.store.begin(some, len(session.decoder.layers))
            parts = [row.rest for row in some]
            if not connector:
                ends = [part.start if part.sees_past(part.length - 1) else part.length - 1 for part in parts]
                before = [part.part(part.start, end) for part, end in zip(parts, ends, strict=True)]
                if cache.pending or any(part.tokens for part in before):
                    cache.extend(session.decoder, before)
                parts = [part.part(end) for part, end in zip(parts, ends, strict=True)]
            with torch.enable_grad():
                with session.capture(layers, graph=True, leaf=not connector) as captured:
                    read = Read(cache.extend(session.decoder, parts), cache, some, shifts)
                v = confidence(session, read).sum()
            through = {number: row.rest.through for number, row in enumerate(some) if connector}
            weighted = _weighted(through | captured.probs, v)
            maps = session.maps(weighted, layers, batch, read, [weighted[number] for number in through])
            session.weighted |= {(query, layers): each for query, each in zip(batch, maps, strict=True)}
            session.remember(captured.probs, layers, batch, read)
            read.output.last_hidden_state = read.output.last_hidden_state.detach()
            cache.detach()
            yield batch, read


def _with_graph(session: ImageSession, query: Query) -> Row:
    return Row(None, session.decoder_call(query, [session.encoded[query.image_index]], graph=True))


def _weighted(probs: dict, v: Tensor) -> dict:
    """{name: A * relu(dv/dA)} of some attentions."""
    gradients = torch.autograd.grad(v, list(probs.values()))
    return {name: probs[name].detach() * gradient.relu() for name, gradient in zip(probs, gradients, strict=True)}


def confidence(session: ImageSession, read: Read) -> Tensor:
    """v = log max softmax(z), one per row."""
    return session.logits(read).log_softmax(-1).amax(-1)


@frozen_eval
def pixel_gradients(session: ImageSession, prompts: Sequence[str]) -> list[Tensor]:
    """G per prompt for a single image: L2 norm over colour of dv/d(normalised pixels); one vision forward for all.

    Returns:
        [(H, W) float32 tensor] over the model's input pixels.
    """
    norms, store, layout = [], PrefixStore(session.decoder), session.layouts[0]
    with torch.enable_grad(), session.frozen.checked_gradients():
        pixels = session.inputs["pixel_values"].detach().clone().requires_grad_()
        (image,) = session.encode({**session.inputs, "pixel_values": pixels}, [layout])
        for prompt in prompts:
            row = store.row(0, session.decoder_call(Query(0, prompt), [image]))
            cache, shifts = store.begin([row], len(session.decoder.layers))
            read = Read(cache.extend(session.decoder, [row.rest]), cache, [row], shifts)
            v = confidence(session, read).sum()
            gradient = torch.autograd.grad(v, pixels, retain_graph=True)[0]
            canvas = session.adapter.canvas(gradient.float(), session.inputs, layout)
            norms.append(canvas.sum(0).norm(dim=0))
    return norms


def edge_mask(session: ImageSession) -> Tensor:
    """(H, W) bool tensor over the model's input pixels of a single image: where it has edges.

    Raises:
        ValueError: nothing says how the model's input is laid out as a picture.
    """
    shown = session.adapter.canvas(session.prepared["pixel_values"], session.prepared, session.layouts[0])[0]
    if not session.adapter.knows_pixels or len(shown) != 3:  # a line of numbers: no picture
        kind = session.model.config.model_type
        raise ValueError(f"pure_grad needs to know how {kind} models cut an image into pixels, and no adapter says it: "
                         "use rel_att, grad_att or loc_att")  # fmt: skip
    if session.adapter.given["geometry"] == "upstream":  # the reference squashed the whole image, whatever was seen
        strength = high_pass_filter(session.images[0], tuple(shown.shape[1:]), reduce=False)
        return torch.from_numpy(strength > np.median(strength))
    settings = session.processor.image_processor
    shown = shown.permute(1, 2, 0).numpy() * np.array(settings.image_std) + np.array(settings.image_mean)
    return torch.from_numpy(strong_edges(shown))
