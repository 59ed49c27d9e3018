"""What a checkpoint's generation config asks of greedy decoding: transformers' own logits processors, as `generate`
prepares them. Sampling stays off, there is one beam, and what ends an answer is the session's to say.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

from vicrop.decoding import Rule


def rules_of(
    how: str, model: PreTrainedModel, prompts: Sequence[Tensor], most: int, device: torch.device
) -> list[Rule]:
    """The Rule of each prompt by the generation config of a model; none at all where no logits are changed.

    Args:
        how: a name of tables.GENERATION.
        model: that makes the logits, with the generation config; device: where they are.
        prompts: (T,) token ids of each, all of them; most: tokens that an answer has at most.
    Raises:
        ValueError: the config asks for passes of the model by themselves (guidance_scale).
    """
    if how == "greedy":
        return []
    read = [ids.to(device) for ids in prompts]
    processors = [_processors(model, ids, most) for ids in read]
    return [_rule(each, ids) for each, ids in zip(processors, read, strict=True)] if any(processors) else []


def _processors(model: Any, ids: Tensor, most: int) -> LogitsProcessorList:
    """What `generate` prepares for a prompt, and hands to the function that stands in place of its decoding loop."""
    given = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "use_cache": False}
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": most}
    found = model.generate(**given, **greedy, custom_generate=_prepared)
    if any(isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor) for each in found):
        raise ValueError("the checkpoint's generation config has a guidance_scale, which needs passes of the model "
                         "that are not made here: use --generation greedy")  # fmt: skip
    return found


def _prepared(model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **_: Any) -> LogitsProcessorList:
    return logits_processor


def _rule(processors: Any, ids: Tensor) -> Rule:
    def scores(said: Sequence[int], logits: Tensor) -> Tensor:
        read = torch.cat([ids, ids.new_tensor(said)])
        return processors(read[None], logits[None].clone())[0]  # some of them write into what they are given

    return scores
