"""question_att: which words are the question's own, alone as in a batch, and that each looks at what it names."""

import numpy as np
import pytest
import torch
from builders import KINDS, build_llava, photo
from plain import PLAIN_KINDS

from vicrop.attribution import own_words
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
    layers = range(3)
    wanted = torch.stack([plain.placed(plain.probs, plain.rows(plain.probs, layer)[:, rows(behind, plain)].mean((0, 1)))
                          for layer in layers]).mean(0).detach().numpy()  # fmt: skip
    (found,) = method.maps(session, general, general)
    assert np.abs(found - wanted).max() <= 1e-5 * wanted.max()


def rows(behind, plain):
    """The last rows of a plain computation, those behind the image; its tokens may be numbered otherwise."""
    return slice(behind - len(plain.inputs["input_ids"][0]), None)


def test_what_the_general_prompt_ends_with_as_well_is_left_out():
    session = ImageSession([photo()], *build_llava())
    general = general_of(session)
    (query,) = session.queries(session.adapter.prompt("why?"))
    ids, own = session.row(query).rest.ids, own_words(session, query, general)
    tokens = session.processor.tokenizer.decode(ids[own.start : own.stop])
    assert "why" in tokens
    assert "Answer the question" not in tokens
    assert "ASSISTANT" not in tokens


def test_a_question_in_front_of_the_image_is_refused():
    session = ImageSession([photo()], *build_llava())
    method = model_module("llava").question_att.bind(session.model, layer=1)
    with pytest.raises(ValueError, match="has them in front of the image: use rel_att, grad_att or loc_att"):
        method.maps(session, "USER: why?\n<image>\nASSISTANT:", "USER: describe it.\n<image>\nASSISTANT:")


# --------------------------------------------------------------------------------------------------------- two places
def test_of_two_named_places_both_show():
    """Where the last token looks is what the answer begins with; of the words each looks at what it names."""
    records = [each for each in load_task(ROOT / "data/streets/data.json")
               if each["category"] == "two_places" and each["size"] != "large"]  # fmt: skip
    names, both = ("rel_att", "question_att"), {}
    loaded = load_chosen(ModelChoice("llava_streets", device="cpu"), MethodChoice(names, regions=Regions(2)))
    for record in records:
        session = loaded.session([ROOT / "data/streets/images" / record["image_path"]]), [0]
        for name, (fields,) in answer_batch([record], lambda: session, None, loaded.methods, None).items():  # noqa: B023
            held = [any(middle_in(place, box) for box in fields["bboxes"]) for place in record["gt_bboxes"]]
            both[name] = both.get(name, 0) + all(held)
    assert both["question_att"] >= 15
    assert both["question_att"] > 2 * both["rel_att"]


def middle_in(place, box):
    x, y = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def test_the_answers_of_a_batch_have_its_boxes():
    session = ImageSession([photo()], *build_llava())
    batch = QuestionBatch(session, QUESTIONS[:2], [0, 0])
    method = model_module("llava").question_att.bind(session.model, layer=1)
    assert [found.bboxes for found in batch.find(method)] == [
        QuestionBatch(session, [question]).find(method)[0].bboxes for question in QUESTIONS[:2]
    ]
