"""Answers about several images, or none, are those of the stock model."""

import pytest
import torch
from builders import photo

from vicrop.adapter import INSTRUCTION
from vicrop.checkpoints import load_model
from vicrop.plain import answer_about_all, answer_without_image
from vicrop.session import ImageSession
from vicrop.verify import stock_answer, without_end

PICTURES = [photo(seed=1), photo(120, 60, seed=2), photo(64, 64, seed=3)]
QUESTION = "what number is on the red sign?"


def said(session, tokens):
    return session.processor.tokenizer.decode(without_end(session, tokens), skip_special_tokens=True).strip()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_prompt_about_several_images(shaped, count):
    _, model, processor = shaped
    session = ImageSession(PICTURES[:count], model, processor)
    prompt = session.adapter.prompt(QUESTION)
    ids = session.adapter.tokenize(prompt, session.layouts).to(model.device)
    stock, _ = stock_answer(session, session.adapter.stock_inputs(prompt, ids, session.inputs))
    answer = answer_about_all(session, prompt)
    assert answer == said(session, stock)
    if count == 1:
        assert [answer] == session.answer(prompt)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava_tiny", f"USER: {INSTRUCTION.format(question=QUESTION)}\nASSISTANT:"),
        ("blip_tiny", f"Question: {QUESTION} Short answer:"),
        ("qwen2_5_tiny", None),
    ],
)  # fmt: skip
def test_a_prompt_without_an_image(name, text):
    model, processor = load_model(name, device="cpu")
    session = ImageSession([], model, processor)
    prompt = session.adapter.prompt(QUESTION)
    text = text or prompt.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    whole = model.language_model if name == "blip_tiny" else model
    with torch.no_grad():
        made = whole.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
    assert answer_without_image(session, prompt) == said(session, made[0, ids.shape[1] :].tolist())
