"""Attention that is sent elsewhere: what the stock model gives when its own softmax is changed, and nothing else."""

import pytest
import torch
from builders import KINDS, photo
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from vicrop.attention import with_implementation
from vicrop.redirection import Redirection, redirected
from vicrop.session import ImageSession

CHANGES = {}  # module -> (heads, places, weights), for the plain computation


def plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """Eager attention, in which rows behind the image share out what they pay to it."""
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    probs = (query @ keys.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    heads, places, weights = CHANGES.get(module, ((), None, None))
    for head in heads:
        for row in range(int(places.max()) + 1, query.shape[2]):
            paid = probs[0, head, row, places].sum()
            probs[0, head, row, places] = paid * weights
    return (probs @ values).transpose(1, 2).contiguous(), probs


AttentionInterface.register("changed", plain_attention)
AttentionMaskInterface.register("changed", eager_mask)


def logits_of(session, prompt, change):
    """The next token's logits while some attention is redirected; the session shares the image's prefix."""
    (query,) = session.queries([prompt])
    with session.frozen.frozen_eval(), redirected({module: Redirection(*each) for module, each in change.items()}):
        return session.logits(session.prefill([session.row(query)])[0])[0]


def plain_logits_of(session, prompt, change):
    """The same by the stock model in one eager pass over everything."""
    ids = session.adapter.tokenize(prompt, session.layouts)
    CHANGES.update(change)
    try:
        with torch.no_grad(), with_implementation("changed", [session.decoder]):
            return session.model(**session.adapter.stock_inputs(prompt, ids, session.inputs)).logits[0, -1]
    finally:
        CHANGES.clear()


@pytest.mark.parametrize("where", ["evenly", "to one place"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_stock_model_with_a_changed_softmax(kind, where):
    session = ImageSession([photo(130, 90)], *KINDS[kind](layers=4))
    prompt = session.adapter.prompt("what number is on the red sign?")
    as_it_is = logits_of(session, prompt, {})
    assert torch.allclose(as_it_is, plain_logits_of(session, prompt, {}), atol=1e-4)
    places = session.row(session.queries([prompt])[0]).rest.image_at
    weights = torch.full((len(places),), 1 / len(places)) if where == "evenly" else torch.eye(len(places))[3]
    modules = session.attention_modules
    change = {modules[1]: ((0, 3), places, weights), modules[2]: ((2,), places, weights)}
    changed = logits_of(session, prompt, change)
    assert torch.allclose(changed, plain_logits_of(session, prompt, change), atol=1e-4)
    assert not torch.allclose(changed, as_it_is, atol=1e-3)
    assert torch.equal(logits_of(session, prompt, {}), as_it_is)  # nothing of it is left, also in the prefix


def test_it_lasts_for_all_tokens_of_an_answer_and_no_longer():
    session = ImageSession([photo(130, 90)], *KINDS["llava"](layers=4), max_new_tokens=4)
    prompt = session.adapter.prompt("what number is on the red sign?")
    before = session.answers([prompt])
    places = session.row(session.queries([prompt])[0]).rest.image_at
    even = torch.full((len(places),), 1 / len(places))
    with redirected({session.attention_modules[0]: Redirection((0, 1, 2, 3), places, even)}):
        changed = session.answers([prompt])
        again = session.answers([prompt])
    assert changed == again
    assert changed[0].confidence != before[0].confidence
    assert session.answers([prompt]) == before


def test_several_rows_at_once_are_refused():
    session = ImageSession([photo(), photo(seed=1)], *KINDS["llava"]())
    prompt = session.adapter.prompt("why?")
    places = session.row(session.queries(prompt)[0]).rest.image_at
    even = torch.full((len(places),), 1 / len(places))
    with (
        redirected({session.attention_modules[0]: Redirection((0,), places, even)}),
        pytest.raises(ValueError, match="one question at a time, not for 2"),
    ):
        session.answers(prompt)
