"""Granite 4 Vision: as LLaVA-NeXT, but an image's features go into the decoder's layers and not into its embeddings.

Each layer's come from a Q-Former of its own, whose queries are laid over the image like tokens.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vicrop.adapter import EncodedImage, ImageFeatures
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, by_token, load_processor, prepare  # noqa: F401
from vicrop.models.llava_onevision import LlavaOnevisionAdapter


class Granite4VisionAdapter(LlavaOnevisionAdapter):
    """A map covers what the tokens show: the image, or a little more or less where padding ends within a cell."""

    @property
    def tile_side(self) -> int:
        return int(super().tile_side * Fraction(self.model.config.downsample_rate))

    def features(self, inputs: dict[str, Tensor]) -> ImageFeatures:
        """Those of all layers side by side, and each by itself."""
        layers = tuple(by_token(features) for _, features in self.vision_output(inputs).deepstack_features)
        return ImageFeatures(torch.cat(layers, -1), layers)

    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        config, found = self.model.config, super().forward_inputs(prompt, ids, images)
        layers = [layer for _, layer in config.deepstack_layer_map] + list(config.spatial_target_layers)
        output = found["mm_encoder_outputs"]["image"]
        output.deepstack_features = list(zip(layers, output.deepstack_features, strict=True))
        return found


ADAPTER = Granite4VisionAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("granite4_vision")
