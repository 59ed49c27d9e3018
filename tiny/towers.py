"""The vision towers of blip and qwen2_5 begin with a llava's weights: their look stage can be short.

Layer by layer the functions are the same. What has no counterpart (CLIP's norm before the first layer; in Qwen's tower
its learned positions and the weaker channels of its MLPs) is approximated or dropped, and training has to mend it.
"""

from typing import Any

import torch
from torch import Tensor


def centred(weight: Tensor) -> Tensor:
    """Without its mean over the output channels: what a layer norm afterwards would remove anyway."""
    return weight - weight.mean(0)


def patch_weights(clip: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    """(channels, 3, p, p) with CLIP's first norm in them, its standard deviation the average over `values`; scale."""
    scale = clip.pre_layrnorm.weight / clip.embeddings(values).std(-1).mean()
    return centred(clip.embeddings.patch_embedding.weight) * scale[:, None, None, None], scale


def query_key_value(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the three projections of a layer of CLIP, one below the other."""
    parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    return torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])


@torch.no_grad()
def turn_into_blip_tower(vision: Any, clip: Any, values: Tensor) -> None:
    """Copy a trained CLIP tower into an InstructBLIP tower of the same shape; `values` are example pixels."""
    old, new = clip.embeddings, vision.embeddings
    patches, scale = patch_weights(clip, values)
    new.patch_embedding.weight.copy_(patches), new.patch_embedding.bias.zero_()
    new.class_embedding.copy_(centred(old.class_embedding) * scale)
    places = old.position_embedding.weight
    new.position_embedding.copy_((places - places.mean(-1, keepdim=True)) * scale + clip.pre_layrnorm.bias)
    for mine, theirs in zip(vision.encoder.layers, clip.encoder.layers, strict=True):
        weight, bias = query_key_value(theirs)
        mine.self_attn.qkv.weight.copy_(weight), mine.self_attn.qkv.bias.copy_(bias)
        mine.self_attn.projection.load_state_dict(theirs.self_attn.out_proj.state_dict())
        for name in ("mlp", "layer_norm1", "layer_norm2"):
            getattr(mine, name).load_state_dict(getattr(theirs, name).state_dict())


@torch.no_grad()
def turn_into_qwen_tower(vision: Any, clip: Any, values: Tensor) -> None:
    """Copy a trained CLIP tower into a Qwen2.5-VL tower of the same width; `values` are example pixels.

    On a centred stream a layer norm is an RMS norm and a bias; a gated MLP whose second factor is 1 is a plain one.
    It keeps the strongest of the MLP's channels.
    """
    patches, _ = patch_weights(clip, values)
    vision.patch_embed.proj.weight.copy_(patches[:, :, None].expand_as(vision.patch_embed.proj.weight) / 2)
    for mine, theirs in zip(vision.blocks, clip.encoder.layers, strict=True):
        weight, bias = query_key_value(theirs)
        mine.norm1.weight.copy_(theirs.layer_norm1.weight), mine.norm2.weight.copy_(theirs.layer_norm2.weight)
        mine.attn.qkv.weight.copy_(weight), mine.attn.qkv.bias.copy_(bias + weight @ theirs.layer_norm1.bias)
        out, up, down = theirs.self_attn.out_proj, theirs.mlp.fc1, theirs.mlp.fc2
        mine.attn.proj.weight.copy_(centred(out.weight)), mine.attn.proj.bias.copy_(centred(out.bias))
        strength = up.weight.norm(dim=1) * down.weight.norm(dim=0)
        kept = strength.topk(mine.mlp.gate_proj.out_features).indices
        bias = up.bias + up.weight @ theirs.layer_norm2.bias
        mine.mlp.gate_proj.weight.copy_(up.weight[kept]), mine.mlp.gate_proj.bias.copy_(bias[kept])
        mine.mlp.up_proj.weight.zero_(), mine.mlp.up_proj.bias.fill_(1)
        mine.mlp.down_proj.weight.copy_(centred(down.weight)[:, kept])
        mine.mlp.down_proj.bias.copy_(centred(down.bias))
