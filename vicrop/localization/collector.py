"""The attention of every layer and head from a phrase to the cells of an image, read in sessions as ViCrop's maps."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from vicrop.attention import frozen_eval
from vicrop.attribution import attention
from vicrop.checkpoints import default_device, load_model, model_module, weights_of
from vicrop.crop import adapter_of
from vicrop.localization.config import Model
from vicrop.localization.storage import Stored
from vicrop.session import ImageSession, finite, layer_numbers
from vicrop.tables import MODELS, checkpoint_of

log = logging.getLogger(__name__)


class Collector:
    """A model, which is loaded when it is first needed, and the settings by which it is asked."""

    def __init__(self, settings: Model):
        if settings.use_flash_attn:
            raise ValueError(
                "model.use_flash_attn must be false: flash attention never computes the rows that are read here"
            )
        self.settings = settings
        self.options = {name: value for name, value in vars(settings.look).items() if value is not None}
        self.family = settings.family or settings.name
        self.adapter = adapter_of(self.family)
        row = MODELS.get(settings.name)
        self.model_id = checkpoint_of(settings.name)
        if row and row["module"] != model_module(self.family).__name__:
            raise ValueError(f"model.name {settings.name} is none of model.family {settings.family}")

    @property
    def device(self) -> torch.device:
        """The device that the settings `device` and `device_id` name."""
        name = self.settings.device
        if self.settings.device_id is not None:
            if name == "cpu":
                raise ValueError(
                    f"model.device_id {self.settings.device_id} names a GPU, so model.device must not be cpu"
                )
            name = f"cuda:{self.settings.device_id}"
        try:
            device = default_device() if name == "auto" else torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(
                f"model.device must be auto, cpu or cuda:N, and {name!r} cannot be used here: {said}"
            ) from error
        return device

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, Any]:
        """(model, processor)"""
        device = self.device
        log.info("loading %s on %s", self.settings.name, device)
        model, processor = load_model(self.family, self.model_id, device, cache_dir=self.settings.cache_dir)
        self.adapter.check(model, **self.options)
        return model, processor

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """The settings that attention depends on, besides image and query."""
        names = ("family", "name", "use_generate")
        if self.settings.use_generate:
            names += ("do_sample", "num_beams")
        values = {name: getattr(self.settings, name) for name in names} | {"family": self.family}
        weights = weights_of(self.family, self.model_id, cache_dir=self.settings.cache_dir)
        return values | {"conv_mode": self.settings.conv_mode.name, "look": self.options, "weights": weights}

    def session_of(self, image: str | Path | Image.Image) -> ImageSession:
        """A session of an image, with its inputs prepared."""
        session = ImageSession([image], *self.loaded, **self.options)
        session.inputs  # noqa: B018 (made here, so that a thread can prepare the next image)
        return session

    def collect(self, session: ImageSession, image_file: str | Path, query: str) -> Stored:
        """(attn, meta): the attention of the query's last token, or of the first one that the model generates.

        The model makes one pass, over what the session has not read yet, and keeps only the last row of each head.

        Returns:
            attn: [L, H, 1, V] float32 ndarray, V the cells of the map, row by row from the top.
            meta: where the attention comes from and how to read it, ready for JSON.
        Raises:
            ValueError: an empty query; an attention that is not finite.
        """
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"the query must be a text that is not empty, not {query!r}")
        prompts = {"referseg": session.adapter.phrase, "vqa": session.adapter.prompt}
        prompt = prompts[self.settings.conv_mode.name](query)
        said: tuple[int, ...] = ()
        about: dict[str, str] = {}
        if self.settings.use_generate:
            tokens, about["generated_text"] = self.generate(session, prompt)
            said = tuple(tokens[:1])
            if not tokens:
                log.warning("%s: nothing was generated for %r, so the query's last token is read", image_file, query)
        numbers = layer_numbers(session.model, "mean")
        if numbers != tuple(range(len(numbers))):  # a head is named by the place of its layer in `maps`
            raise ValueError(f"every layer of the model must have attention, and only the layers {numbers} have it")
        (maps,) = attention(session, [prompt], numbers, forced=[said])
        layers, heads, h, w = maps.shape
        attn = maps.reshape(layers, heads, 1, h * w).cpu().numpy()
        broken = np.count_nonzero(~np.isfinite(attn))
        if broken:
            raise ValueError(f"{broken} of {attn.size} attention values are NaN or infinite: nothing is stored")
        meta = {
            "image_file": str(image_file), "query": query, "model_name": self.settings.name,
            "image_size": list(session.images[0].size), "vis_len": h * w, "patch_size": h if h == w else [h, w],
            "num_layers": layers, "num_heads": heads, "model_dtype": str(session.model.dtype).removeprefix("torch."),
            "region": list(session.layouts[0].region), "prompt": prompt, "made_with": self.made_with, **about,
        }  # fmt: skip
        return attn, meta

    def generate(self, session: ImageSession, prompt: str) -> tuple[list[int], str]:
        """(token ids, text) of an answer, by transformers' own `generate`, with sampling and beams as set."""
        options = {name: getattr(self.settings, name) for name in ("max_new_tokens", "do_sample", "num_beams")}
        tokens = stock_generate(session, prompt, **options)
        return tokens, session.processor.tokenizer.decode(tokens).strip()


@frozen_eval
def stock_generate(session: ImageSession, prompt: str, **options: Any) -> list[int]:
    """Token ids of an answer about a session's only image by transformers' own `generate`, without special tokens.

    It allows what `ImageSession.answer` does not: sampling, beams, another length.

    Raises:
        ValueError: logits that are not finite.
    """
    ids = session.adapter.tokenize(prompt, session.layouts).to(session.device)
    inputs = session.adapter.stock_inputs(prompt, ids, session.inputs)
    model: Any = session.model  # transformers types neither of both methods
    with finite_logits(model.get_output_embeddings()):
        written = model.generate(**inputs, **options)[0].tolist()
    prompted = ids.tolist()
    if written[: len(prompted)] == prompted:  # some models repeat the prompt before the answer
        written = written[len(prompted) :]
    special = set(session.processor.tokenizer.all_special_ids)
    return [token for token in written if token not in special]


@contextmanager
def finite_logits(head: nn.Module) -> Iterator[None]:
    """Within it, a pass through a model's output embeddings raises ValueError if a next token's logit is not finite."""

    def check(module: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
        finite(logits[..., -1, :])

    hook = head.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()
