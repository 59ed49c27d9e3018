"""A draft changes no answer, wherever it goes wrong; and how sure a model is is what its own forward says."""

import math

import pytest
import torch
from architectures import ARCHITECTURES, registered  # noqa: F401
from builders import KINDS, photo
from test_engine import stock_inputs

from vicrop import session as session_module
from vicrop.decoding import Decoding, usable
from vicrop.session import ImageSession

QUESTIONS = [
    "what number is on the red sign?",
    "why?",
    "is there a blue sign in the image, or is it a green one?",
    "who?",
]
OF, MOST = [1, 0, 1, 0], 8  # tokens of an answer
BUILDERS = {**{name: lambda name=name: KINDS[name](layers=3) for name in KINDS}, **ARCHITECTURES}


class Asked:
    """Questions about two images with a crop each, and the answers without drafts."""

    def __init__(self, name):
        self.name, (self.model, self.processor) = name, BUILDERS[name]()
        self.session = ImageSession([photo(90, 70), photo(40, 130, seed=1)], self.model, self.processor, MOST)
        self.prompts = [self.session.adapter.prompt(question) for question in QUESTIONS]
        self.crops = [photo(50, 30, seed=seed) for seed in range(len(QUESTIONS))]
        self.plain = self.answers()

    def usable(self, drafts):
        """As much of drafts as is read behind a prompt."""
        return usable(drafts, self.model.config, self.processor.tokenizer, MOST)

    def answers(self, drafts=None, numbers=(0, 1, 2, 3)):
        prompts, crops, of = ([values[n] for n in numbers] for values in (self.prompts, self.crops, OF))
        return self.session.answers(prompts, crops=crops, of=of, drafts=drafts)


@pytest.fixture(scope="module", params=BUILDERS)
def asked(request):
    return Asked(request.param)


def same(found, wanted):
    assert [(each.text, each.tokens) for each in found] == [(each.text, each.tokens) for each in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.confidence == pytest.approx(other.confidence, rel=1e-3)


def wrong_at(tokens, at, replacement=5):
    """Token ids that differ from others at a place; the same ones if they end before it."""
    return [token if n != at else replacement + (token == replacement) for n, token in enumerate(tokens)]


@pytest.fixture
def steps(asked, monkeypatch):
    """A list that grows by the number of rows with every decoding step."""
    seen, add = [], Decoding.add
    monkeypatch.setattr(Decoding, "add", lambda self, scores: seen.append(len(scores)) or add(self, scores))
    return seen


@pytest.mark.parametrize("places", [(0, 3, 7, 5), (1, 1, 2, 1)], ids=str)
def test_drafts_that_go_wrong_at_different_places_change_no_answer_of_a_batch(asked, places):
    tokens = [answer.tokens for answer in asked.plain]
    same(asked.answers([wrong_at(each, at) for each, at in zip(tokens, places, strict=True)]), asked.plain)
    assert asked.session.store.takes_drafts == (asked.name != "recurrent")  # its states cannot go back


def test_a_draft_that_is_right_takes_no_decoding_steps(asked, steps):
    drafts = [answer.tokens for answer in asked.plain]
    same(asked.answers(drafts), asked.plain)
    if asked.session.store.takes_drafts and asked.session.batched:
        assert len(steps) == MOST - min(map(len, asked.usable(drafts)))


@pytest.mark.parametrize("at", [0, 4, 7])
def test_a_draft_that_goes_wrong_at_any_place_changes_no_answer(asked, steps, at):
    (wanted,) = asked.plain[:1]
    draft = wrong_at(wanted.tokens, at)
    same(asked.answers([draft], [0]), [wanted])
    if asked.session.store.takes_drafts:
        (usable,) = asked.usable([draft])  # these models' random answers may have marks in them
        assert len(steps) == len(wanted.tokens) - min(at + 1, len(usable))


def test_drafts_of_other_lengths_change_no_answer(asked):
    tokens = [answer.tokens for answer in asked.plain]
    same(asked.answers([(), tokens[1][:3], (*tokens[2], *tokens[2]), tokens[3][:1]]), asked.plain)
    special = asked.model.config.image_token_id  # read behind a prompt, it would be the place of an image
    same(asked.answers([[special, *tokens[0]], [special], tokens[2], [*tokens[3][:2], special, 7]]), asked.plain)


def test_an_end_token_inside_a_draft_ends_the_answer_there(asked, monkeypatch):
    """Also where the draft goes on behind it, and where the answer ends before the draft does."""
    tokens = [answer.tokens for answer in asked.plain]
    monkeypatch.setattr(session_module, "end_tokens", lambda *_, **__: [tokens[0][2], tokens[1][5]])
    wanted = asked.answers()
    assert any(len(answer.tokens) < MOST for answer in wanted)
    assert all(not {tokens[0][2], tokens[1][5]} & {*answer.tokens[:-1]} for answer in wanted)
    same(asked.answers(tokens), wanted)
    same(asked.answers([wrong_at(each, 1) for each in tokens]), wanted)


def test_no_answer_is_longer_than_it_may_be(asked, monkeypatch):
    tokens = [answer.tokens for answer in asked.plain]
    monkeypatch.setattr(asked.session, "max_new_tokens", 4)
    for drafts in (None, tokens, [wrong_at(each, 3) for each in tokens]):
        assert [answer.tokens for answer in asked.answers(drafts)] == [each[:4] for each in tokens]


def test_confidence_is_the_product_of_the_stock_models_probabilities(asked, monkeypatch):
    monkeypatch.setattr(asked.session, "max_new_tokens", 3)
    drafts = [wrong_at(answer.tokens[:3], 1) for answer in asked.plain]
    for found in (asked.answers(), asked.answers(drafts)):
        answer, prompt = found[0], asked.prompts[0]
        if asked.name == "blip":  # its processor knows one image only: without a crop
            (answer,) = asked.session.answers([prompt], of=[1])
        images = [asked.session.images[1], *([] if asked.name == "blip" else asked.crops[:1])]
        inputs = stock_inputs(asked.session, images, prompt)
        sure = probability(asked.model, inputs, answer.tokens)
        assert answer.confidence == pytest.approx(sure, abs=1e-5, rel=1e-3)
        assert answer.confidence > 0


def probability(model, inputs, tokens):
    """Of some tokens, greedily, by `generate` of the stock model and its own logits."""
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=len(tokens), do_sample=False, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
    assert made.sequences[0, -len(tokens) :].tolist() == list(tokens)
    logs = [logits[0].float().log_softmax(-1)[token] for logits, token in zip(made.logits, tokens, strict=True)]
    return math.exp(sum(logs))


def test_layers_are_not_asked_for_where_a_draft_stands_between(asked):
    with pytest.raises(ValueError, match="without crops or drafts"):
        asked.session.answers(asked.prompts, of=OF, layers=(1,), drafts=[(5,)] * 4)


def test_a_prompt_whose_tokens_see_what_follows_is_answered_without_a_draft(asked, monkeypatch):
    session = ImageSession(asked.session.images[:1], asked.model, asked.processor, MOST)
    monkeypatch.setattr("vicrop.decoder_call.DecoderCall.causal_from", lambda *_: False)
    (wanted,) = session.answers(asked.prompts[1:2], crops=asked.crops[:1])
    same(session.answers(asked.prompts[1:2], crops=asked.crops[:1], drafts=[wanted.tokens]), [wanted])
    assert not session.store.takes_drafts
