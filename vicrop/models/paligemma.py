"""PaliGemma: a square of tokens before everything else, and a prompt of which all tokens see each other.

It has no chat template: the prompt is a task of its training, without an instruction.
"""

import torch
from torch import Tensor

from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, load_processor  # noqa: F401
from vicrop.models.squares import SquareAdapter
from vicrop.processors import prepare_tokens

prepare = prepare_tokens
PROMPT = "answer en {question}"


class PaliGemmaAdapter(SquareAdapter):
    """A map covers the whole image, squashed to a square."""

    def chat(self, text: str, images: int = 1) -> str:
        return self.processor.image_token * images + text

    def token_ids(self, text: str) -> Tensor:
        """As its processor has it: the beginning comes after the last image, and a line's end behind the prompt."""
        tokenizer, end = self.processor.tokenizer, text.rfind(self.image_token) + len(self.image_token)
        text = f"{text[:end]}{tokenizer.bos_token}{text[end:]}\n"
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """All of a prompt is its first part, whose tokens see each other."""
        return {"token_type_ids": torch.zeros_like(ids)[None]}


ADAPTER = PaliGemmaAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("paligemma")
