"""What a model takes over from earlier ones before it is trained: training need not begin from nothing.

begin("llava", FAMILIES["llava"](), Path("vicrop/embedded"))
"""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from tiny.models import DEPTH, Family
from tiny.towers import turn_into_blip_tower, turn_into_qwen_tower

INTO_STREAM = ("self_attn.out_proj", "mlp.fc2")  # of a layer of CLIP


def begin(name: str, family: Family, earlier: Path | None, tower: Path | None) -> None:
    """Take over the weights of an earlier checkpoint of the same family as far as they fit; the tower of llava's.

    Args:
        name: key of tiny.models.FAMILIES.
        earlier: folder with the folders of finished checkpoints, `earlier / name` among them; None: nothing is
            taken over.
        tower: folder of the llava checkpoint whose vision tower blip and qwen2_5 begin with; None: they begin with
            random weights.
    Raises:
        ValueError: a folder has no checkpoint, or its vision tower has another number of layers.
    """
    if earlier:
        folder = checkpoint_in(earlier / name)
        old = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        take_over(family.model, family.tokenizer, old, AutoTokenizer.from_pretrained(folder))
        if name == "llava":
            silence_new_layers(family.model.model.vision_tower, len(old.model.vision_tower.encoder.layers))
    if name == "llava" or tower is None:
        return
    clip = LlavaForConditionalGeneration.from_pretrained(checkpoint_in(tower), dtype=torch.float32).model.vision_tower
    if len(clip.encoder.layers) != DEPTH:
        raise ValueError(f"the vision tower of {tower} must have {DEPTH} layers, it has {len(clip.encoder.layers)}")
    values = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    if name == "blip":
        turn_into_blip_tower(family.model.vision_model, clip, values)
    else:
        turn_into_qwen_tower(family.model.model.visual, clip, values)


def checkpoint_in(folder: Path) -> Path:
    """The folder itself.

    Raises:
        ValueError: it has no checkpoint.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} must be a folder with a checkpoint, and it has no config.json")
    return folder


@torch.no_grad()
def take_over(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, old: nn.Module, old_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Copy what has the same name and shape, and of tables with a row per token the rows of tokens that both have."""
    theirs, had = dict(old.named_parameters()), old_tokenizer.get_vocab()
    tokens = [(mine, had[token]) for token, mine in tokenizer.get_vocab().items() if token in had]
    rows, old_rows = (torch.tensor(column) for column in zip(*tokens, strict=True))
    for name, weight in model.named_parameters():
        if name not in theirs:
            continue
        if any(part in name for part in ("embed_tokens", "word_embeddings", "lm_head")):
            both = (rows < len(weight)) & (old_rows < len(theirs[name]))  # a Q-Former has no token for images
            weight[rows[both]] = theirs[name][old_rows[both]]
        elif weight.shape == theirs[name].shape:
            weight.copy_(theirs[name])


@torch.no_grad()
def silence_new_layers(tower: nn.Module, depth: int) -> None:
    """Let the layers of a CLIP tower from `depth` on do nothing at first: it computes what the shallower one did."""
    for layer in tower.encoder.layers[depth:]:
        for part in INTO_STREAM:
            layer.get_submodule(part).weight.zero_()
            layer.get_submodule(part).bias.zero_()
