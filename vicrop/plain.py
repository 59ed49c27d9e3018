"""Answers without a crop, about any number of images or none: what other benchmarks also ask.

session = ImageSession(["a.jpg", "b.jpg"], model, processor)
answer_about_all(session, session.adapter.prompt("which one is older?"))
"""

from typing import Any

import torch

from vicrop.attention import frozen_eval
from vicrop.session import ImageSession, Query, end_tokens


@frozen_eval
def answer_about_all(session: ImageSession, prompt: str) -> str:
    """The greedy answer to one prompt about all images of a session: they stand where the prompt has its image."""
    row = session.store.row(0, session.decoder_call(Query(0, prompt), session.encoded))
    read, _ = session.prefill([row])
    return session.greedy_decode(read, [()])[0].text


@frozen_eval
def answer_without_image(session: ImageSession, prompt: str) -> str:
    """The greedy answer of a model to a prompt, in which the place of the image is left out.

    Args:
        session: one of no images.
    """
    adapter: Any = session.adapter
    text = prompt.replace(str(adapter.image_placeholder), "").lstrip("\n")
    ids = adapter.token_ids(text)[None].to(session.device)
    configs = [model.generation_config for model in (session.model, adapter.speaker)]
    ends = end_tokens(*configs, tokenizer=session.processor.tokenizer)
    made = adapter.speaker.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, repetition_penalty=1.0,
        max_new_tokens=session.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0],
    )[0, ids.shape[1] :].tolist()  # fmt: skip
    said = [token for token in made if token not in ends]
    return session.processor.tokenizer.decode(said, skip_special_tokens=True).strip()
