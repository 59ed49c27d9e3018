"""`--generation checkpoint`: answers by the rules of the checkpoint's generation config, however they are made."""

import math
from contextlib import contextmanager

import pytest
import torch
from builders import KINDS, photo
from families import FAMILIES
from test_draft import wrong_at
from test_engine import stock_inputs

from vicrop import session as session_module
from vicrop.attention import replaced
from vicrop.crop import vicrop_qa
from vicrop.evaluation import command as run
from vicrop.session import ImageSession

QUESTIONS = ["what number is on the red sign?", "why?", "is there a blue sign in the image, or is it a green one?"]
SIZES, OF = [(90, 70), (40, 130)], [1, 0, 1]
MOST = 6  # tokens of an answer
GREEDY = {"do_sample": False, "num_beams": 1, "max_new_tokens": MOST}
BUILDERS = {**{name: lambda name=name: KINDS[name](layers=3) for name in KINDS}, **FAMILIES}
# Decoders of each kind; the last two read no drafts: their states cannot go back, or tokens see what follows.
KINDS_OF_DECODERS = ["llava", "blip", "qwen3_vl", "gemma3", "qwen3_5", "paligemma"]


class Asked:
    """Questions about two images, with a session for each way of decoding; `plain` are answers without rules."""

    def __init__(self, name):
        self.name, (self.model, self.processor) = name, BUILDERS[name]()
        images = [photo(*size, seed=number) for number, size in enumerate(SIZES)]
        self.session, self.ruled = (ImageSession(images, self.model, self.processor, generation=how,
                                                 max_new_tokens=MOST)
                                    for how in ("greedy", "checkpoint"))  # fmt: skip
        self.prompts = [self.session.adapter.prompt(question) for question in QUESTIONS]
        self.crops = [photo(50, 30, seed=seed) for seed in range(len(QUESTIONS))]
        self.plain = self.answers(self.session)

    def answers(self, session, **more):
        return session.answers(self.prompts, of=OF, **more)

    @contextmanager
    def config(self, **settings):
        """The generation config of the model that speaks has these settings for the moment."""
        own = self.session.adapter.speaker.generation_config
        before = {name: getattr(own, name) for name in settings}
        own.update(**settings)
        yield
        own.update(**before)

    def generated(self, number, crop=None, **more):
        """(tokens, the model's logits before each) of the stock model's `generate` for a question."""
        images = [self.session.images[OF[number]], *([] if crop is None else [crop])]
        inputs = stock_inputs(ImageSession(images[:1], self.model, self.processor), images, self.prompts[number])
        with torch.no_grad():
            made = self.model.generate(**inputs, **GREEDY | more, return_dict_in_generate=True, output_logits=True)
        steps = [each[0].float() for each in made.logits]
        return tuple(made.sequences[0, -len(steps) :].tolist()), steps


@pytest.fixture(scope="module", params=BUILDERS)
def asked(request):
    return Asked(request.param)


@pytest.fixture(scope="module")
def llava():
    return Asked("llava")


def everything(asked):
    """Settings of every kind that greedy decoding heeds; with them all answers are others."""
    first, second = asked.plain[0].tokens[:2]
    end = asked.processor.tokenizer.eos_token_id
    return {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "suppress_tokens": [second], "num_beams": 3,
            "begin_suppress_tokens": [first], "min_new_tokens": 3, "temperature": 0.5,
            "forced_eos_token_id": end}  # fmt: skip


def test_answers_equal_generate_with_the_checkpoints_config(asked):
    with asked.config(**everything(asked)):
        found = asked.answers(asked.ruled)
        assert found[0].tokens == asked.generated(0)[0]
        if asked.name != "blip":  # its processor knows one image only
            (answer,) = asked.ruled.answers(asked.prompts[:1], crops=asked.crops[:1], of=OF[:1])
            assert answer.tokens == asked.generated(0, asked.crops[0])[0]
        assert asked.answers(asked.session) == asked.plain  # nothing of it counts by default
    assert [each.tokens for each in found] != [each.tokens for each in asked.plain]
    assert asked.plain[1].tokens == asked.generated(1, repetition_penalty=1.0)[0]


@pytest.mark.parametrize("name", KINDS_OF_DECODERS)
def test_with_the_checkpoints_rules_a_draft_and_a_batch_change_no_answer(name):
    asked = Asked(name)
    with asked.config(**everything(asked)):
        wanted = asked.answers(asked.ruled, crops=asked.crops)
        tokens = [answer.tokens for answer in wanted]
        for drafts in (tokens, [wrong_at(each, at) for each, at in zip(tokens, (0, 2, 4), strict=True)]):
            found = asked.answers(asked.ruled, crops=asked.crops, drafts=drafts)
            assert [answer.tokens for answer in found] == tokens
            for one, other in zip(found, wanted, strict=True):
                assert one.confidence == pytest.approx(other.confidence, rel=1e-3)
        assert asked.ruled.store.takes_drafts is (name not in KINDS_OF_DECODERS[-2:])
        for number, answer in enumerate(wanted):
            images = [asked.session.images[OF[number]]]
            alone = ImageSession(images, asked.model, asked.processor, generation="checkpoint",
                                 max_new_tokens=MOST)  # fmt: skip
            (single,) = alone.answers(asked.prompts[number], crops=[asked.crops[number]])
            assert single.tokens == answer.tokens


def test_confidence_is_the_models_own_whatever_chose_the_tokens(llava):
    with llava.config(**everything(llava)):
        (answer,) = llava.ruled.answers(llava.prompts[:1], of=OF[:1])
        tokens, steps = llava.generated(0)
    logs = [logits.log_softmax(-1)[token] for token, logits in zip(tokens, steps, strict=True)]
    assert answer.confidence == pytest.approx(math.exp(sum(logs)), abs=1e-12, rel=1e-3)


def rule(name, llava):
    tokens = llava.plain[0].tokens
    return {
        "repetition": {"repetition_penalty": 0.1},  # what was said is likelier again
        "ngrams": {"sequence_bias": [[[tokens[1]], 100.0]], "no_repeat_ngram_size": 2},
        "words": {"bad_words_ids": [list(tokens[3:5])]}, "suppressed": {"suppress_tokens": [tokens[3]]},
        "beginning": {"begin_suppress_tokens": [tokens[0]]}, "bias": {"sequence_bias": [[[tokens[1]], -50.0]]},
        "end": {"forced_eos_token_id": 1}, "length": {"min_new_tokens": 5, "eos_token_id": tokens[2]},
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["repetition", "ngrams", "words", "suppressed", "beginning", "bias", "end", "length"])
def test_each_rule_alone(llava, name):
    with llava.config(**rule(name, llava)):
        (found,), (plain,) = (each.answers(llava.prompts[:1], of=OF[:1]) for each in (llava.ruled, llava.session))
        assert found.tokens == llava.generated(0)[0]
        draft = wrong_at(found.tokens, 3)
        assert llava.ruled.answers(llava.prompts[:1], of=OF[:1], drafts=[draft])[0].tokens == found.tokens
    assert found.tokens != plain.tokens


def test_guidance_is_refused_and_other_words_are(llava):
    with llava.config(guidance_scale=1.5), pytest.raises(ValueError, match="guidance_scale"):
        llava.answers(llava.ruled)
    with pytest.raises(ValueError, match=r"generation is one of \('greedy', 'checkpoint'\), not 'sampling'"):
        ImageSession([photo()], llava.model, llava.processor, generation="sampling")


def test_a_notebook_asks_by_the_checkpoints_rules(llava):
    ask = ("llava", "rel_att", photo(), "why?", llava.model, llava.processor)
    with llava.config(suppress_tokens=[llava.plain[0].tokens[0]], repetition_penalty=2.0):
        answers = [vicrop_qa(*ask, layer=1, generation=how)[0] for how in ("greedy", "checkpoint")]
    assert answers[0] == vicrop_qa(*ask, layer=1)[0] != answers[1]


def test_a_resumed_run_compares_it(tmp_path):
    first = ["--task", "demo", "--device", "cpu", "--save_path", str(tmp_path), "--limit"]
    run.main([*first, "1"])
    with pytest.raises(SystemExit, match="generation was"):
        run.main([*first, "2", "--generation", "checkpoint"])
    with replaced(session_module, "rules_of", lambda *_: 1 / 0), pytest.raises(ZeroDivisionError):
        run.main([*first[:-1], "--overwrite", "--generation", "checkpoint"])
