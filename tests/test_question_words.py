"""question_att: which words are the question's own, alone as in a batch, and that each looks at what it names."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import KINDS, build_llava, photo
from plain import PLAIN_KINDS

from vicrop.attribution import QuestionInFront, own_words
from vicrop.choices import MethodChoice, ModelChoice, Regions
from vicrop.crop import QuestionBatch, model_module
from vicrop.dataset import load_task
from vicrop.evaluation.batching import answer_batch
from vicrop.files import ROOT
from vicrop.loaded import load_chosen
from vicrop.session import ImageSession
from vicrop.tables import GENERAL_PROMPT

QUESTIONS = ["what number is on the red sign?", "why?", "is there a blue sign, or is it a green one?"]


@pytest.fixture(scope="module", params=KINDS)
def asked(request):
    """(kind, session of a photo, the method, prompts, the general prompt)."""
    model, processor = KINDS[request.param](layers=3)
    session = ImageSession([photo()], model, processor)
    method = model_module(request.param).question_att.bind(model, layer="mean")
    return request.param, session, method, list(map(session.adapter.prompt, QUESTIONS)), general_of(session)


def general_of(session):
    return session.adapter.prompt(GENERAL_PROMPT)


def test_questions_of_any_length_together_equal_each_alone(asked):
    _, session, method, prompts, general = asked
    together = method.maps(session, prompts, general, of=[0] * len(prompts))
    for prompt, found in zip(prompts, together, strict=True):
        alone = ImageSession(session.images, session.model, session.processor)
        assert np.abs(found - method.maps(alone, prompt, general)[0]).max() <= 1e-5 * found.max()
    assert len({found.tobytes() for found in together}) == len(prompts)


def test_all_behind_the_image_is_the_general_prompts_own(asked):
    kind, session, method, _, general = asked
    plain = PLAIN_KINDS[kind](session.model, session.processor, session.images[0], general)
    behind = int(session.row(session.queries(general)[0]).rest.image_at[-1]) + 1
    rows = slice(behind - len(plain.inputs["input_ids"][0]), None)
    maps = [plain.placed(plain.probs, plain.rows(plain.probs, layer)[:, rows].mean((0, 1))) for layer in range(3)]
    wanted = torch.stack(maps).mean(0).detach().numpy()
    (found,) = method.maps(session, general, general)
    assert np.abs(found - wanted).max() <= 1e-5 * wanted.max()


def test_another_general_prompt_in_the_same_session_leaves_other_words(asked):
    _, session, method, prompts, general = asked
    other = session.adapter.prompt("is there a blue car in it?")
    (one,), (two,) = (method.maps(session, prompts[2], each) for each in (general, other))
    assert np.abs(one - two).max() > 1e-3 * one.max()
    fresh = ImageSession(session.images, session.model, session.processor)
    assert np.abs(two - method.maps(fresh, prompts[2], other)[0]).max() <= 1e-5 * two.max()


@pytest.mark.parametrize(
    ("asked", "general", "own"),
    [
        ([0, 9, 9, 5, 6, 7], [0, 9, 9, 8, 7], slice(-3, -1)),  # 9: the image; 7: the template's end
        ([0, 9, 9, 4, 5, 6], [0, 9, 9, 4, 8], slice(-2, None)),
        ([0, 9, 9, 5, 7], [0, 9, 9, 5, 7], slice(-2, None)),  # the general prompt itself
        ([0, 9, 9, 5, 7], [0, 9, 9, 5, 6, 5, 7], slice(-2, None)),  # one that it covers
        ([0, 5, 6, 9, 9, 7], [0, 8, 9, 9, 7], None),  # in front
        ([0, 5, 9, 9], [0, 5, 9, 9], None),  # nothing is behind
    ],
)
def test_the_own_words_are_those_that_the_general_prompt_has_not(asked, general, own):
    ids = torch.tensor(asked)
    call = SimpleNamespace(ids=ids, length=len(ids), image_at=(ids == 9).nonzero()[:, 0], start=0)
    assert own_words(call, torch.tensor(general)) == own


def test_a_question_in_front_of_the_image_is_refused():
    session = ImageSession([photo()], *build_llava())
    method = model_module("llava").question_att.bind(session.model, layer=1)
    with pytest.raises(QuestionInFront, match=r"they stand in front of it in 'USER: why\?"):
        method.maps(session, "USER: why?\n<image>\nASSISTANT:", "USER: describe it.\n<image>\nASSISTANT:")


# --------------------------------------------------------------------------------------------------------- two places
@pytest.mark.parametrize(("name", "least"), [("llava_streets", 20), ("qwen2_5_streets", 28)])
def test_two_named_places_show_more_often_than_where_the_answer_begins(name, least):
    """The last token looks at what the answer begins with, each word at what it names; two boxes of each map."""
    records = [each for each in load_task(ROOT / "data/streets/data.json")
               if each["category"] == "two_places" and each["size"] != "large"]  # fmt: skip
    names, both = ("rel_att", "question_att"), {}
    loaded = load_chosen(ModelChoice(name, device="cpu"), MethodChoice(names, regions=Regions(2, 0)))
    for record in records:
        session = loaded.session([ROOT / "data/streets/images" / record["image_path"]]), [0]
        for method, (fields,) in answer_batch([record], lambda: session, None, loaded.methods, None).items():  # noqa: B023
            held = [any(middle_in(place, box) for box in fields["bboxes"]) for place in record["gt_bboxes"]]
            both[method] = both.get(method, 0) + all(held)
    assert both["question_att"] >= least, both
    assert both["question_att"] >= both["rel_att"] + 10, both


def middle_in(place, box):
    x, y = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def test_a_batch_has_the_boxes_of_each_question_alone():
    model, processor = build_llava()
    method = model_module("llava").question_att.bind(model, layer=1)
    together = QuestionBatch(ImageSession([photo()], model, processor), QUESTIONS, [0] * len(QUESTIONS)).find(method)
    for question, found in zip(QUESTIONS, together, strict=True):
        (alone,) = QuestionBatch(ImageSession([photo()], model, processor), [question]).find(method)
        assert found.bboxes == alone.bboxes
