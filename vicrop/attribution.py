"""What a session's answers come from: attention to the image, attention weighted by its gradient, pixel gradients."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vicrop.attention import frozen_eval
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


@frozen_eval
def weighted_attention(session: ImageSession, prompts: Prompts, layers: Sequence[int], of: Of = None) -> list[Tensor]:
    """A_st * relu(dv/dA_st) with v the log-probability of the likeliest next token; shapes as `attention`.

    Where a connector is in between, that times A_ti * relu(dv/dA_ti).

    Raises:
        ValueError: a quantised model's layers hand no gradients on.
    """
    queries, maps = session.queries(prompts, of), []
    weigh = _through_connector if session.adapter.connector else _on_top
    with session.frozen.checked_gradients():
        for batch, rows in session.batches(queries, [session.row(query) for query in queries]):
            maps += weigh(session, batch, rows, layers)
    return maps


def _on_top(session: ImageSession, queries: list[Query], rows: list[Row], layers: Sequence[int]) -> list[Tensor]:
    """The part of a pass that needs no graph is done without; the last token is the rest.

    A prompt's last token influences no other token, so a single-token step on top of the cached rest gives the exact
    gradient. Where others see it after all (PaliGemma's prompts), they are read in that step as well.
    """
    ends = [row.rest.start if row.rest.sees_past(row.rest.length - 1) else row.rest.length - 1 for row in rows]
    before = [row.rest.part(row.rest.start, end) for row, end in zip(rows, ends, strict=True)]
    cache, shifts = session.store.begin(rows, len(session.decoder.layers))
    if cache.pending or any(part.tokens for part in before):
        cache.extend(session.decoder, before)
    last = [row.rest.part(end) for row, end in zip(rows, ends, strict=True)]
    with torch.enable_grad(), session.capture(layers, graph=True) as captured:
        read = Read(cache.extend(session.decoder, last), cache, rows, shifts)
        v = confidence(session, read).sum()
    weighted = _weighted(captured.probs, v)
    return session.maps(weighted, layers, queries, read)


def _through_connector(session: ImageSession, queries, rows: list[Row], layers: Sequence[int]) -> list[Tensor]:
    """All after the connector's softmax depends on it: its rows are the leaf, and the whole pass keeps its graph."""
    with torch.enable_grad():
        calls = [session.decoder_call(query, [session.encoded[query.image_index]], graph=True) for query in queries]
        rows = [Row(None, call) for call in calls]
        cache, shifts = session.store.begin(rows, len(session.decoder.layers))
        with session.capture(layers, graph=True, leaf=False) as captured:
            read = Read(cache.extend(session.decoder, calls), cache, rows, shifts)
        v = confidence(session, read).sum()
    connectors = {number: call.through for number, call in enumerate(calls)}
    weighted = _weighted(connectors | captured.probs, v)
    return session.maps(weighted, layers, queries, read, [weighted[number] for number in connectors])


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
    """(H, W) bool tensor over the model's input pixels of a single image: where it has edges."""
    shown = session.adapter.canvas(session.prepared["pixel_values"], session.prepared, session.layouts[0])[0]
    if session.adapter.given["geometry"] == "upstream":  # the reference squashed the whole image, whatever was seen
        strength = high_pass_filter(session.images[0], tuple(shown.shape[1:]), reduce=False)
        return torch.from_numpy(strength > np.median(strength))
    settings = session.processor.image_processor
    shown = shown.permute(1, 2, 0).numpy() * np.array(settings.image_std) + np.array(settings.image_mean)
    return torch.from_numpy(strong_edges(shown))
