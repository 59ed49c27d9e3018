"""InstructBLIP: what is peculiar to it, and the ViCrop methods over it. For decoder-only checkpoints (Vicuna).

Its language model never sees patches: a Q-Former reads the question, attends to the patches with 32 queries, and hands
on 32 tokens. So a map is the attention of the last token to the queries times that of the queries to the patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vicrop import processors
from vicrop.adapter import Adapter, EncodedImage, ImageFeatures
from vicrop.attention import brought_in, replaced
from vicrop.layouts import Layout, Size, raster, whole
from vicrop.methods import family_methods
from vicrop.session import valid_layer

QFORMER_LAYER = 2  # counts the layers that have cross-attention: every second one, so layer 4 of the Q-Former
LM_LAYER = 15
PROMPT = "Question: {question} Short answer:"
MODEL_CLASS, load_processor = InstructBlipForConditionalGeneration, processors.load_qformer_processor
prepare = processors.prepare_qformer


def crossing_attention(model: Any, layer: int | None = None) -> nn.Module:
    """The Q-Former's attention module to read, at a layer that counts those with cross-attention from 0.

    Raises:
        ValueError: naming the layer that the Q-Former does not have and the range that it has.
    """
    crossing = [each.crossattention.attention for each in model.qformer.encoder.layer if each.has_cross_attention]
    layer = getattr(model.config, "qformer_layer", QFORMER_LAYER) if layer is None else layer
    return crossing[valid_layer(layer, range(len(crossing)), "the Q-Former (cross-attention only)")]


class BlipAdapter(Adapter):
    """InstructBLIP (see adapter.Adapter). Images are squashed to the model's square: a map covers all of them.

    Options:
        qformer_layer: the Q-Former layer to read, counting those with cross-attention from 0; default: the
            checkpoint's `config.qformer_layer`, else QFORMER_LAYER.
    """

    options = {"geometry": "exact", "qformer_layer": None}
    layer_constant = "LM_LAYER"

    def __init__(self, model: PreTrainedModel, processor: Any, **options: Any):
        super().__init__(model, processor, **options)
        self.connector = crossing_attention(model, self.given["qformer_layer"]), self.model.qformer
        # (prompt, image) -> what the Q-Former hands on; an adapter lives as long as its session
        self.handed_on: dict[tuple[str, int], Tensor] = {}

    @classmethod
    def check(cls, model: PreTrainedModel, **options: Any) -> None:
        super().check(model, **options)
        if model.config.image_token_id is None:
            raise ValueError("its config has no image_token_index: vicrop.load_model gives it one")
        if not model.config.use_decoder_only_language_model:
            kind = model.config.text_config.model_type
            like = "maps are read from a decoder alone, as in Salesforce/instructblip-vicuna-7b"
            raise ValueError(f"its language model ({kind}) is an encoder-decoder, as Flan-T5 is: {like}")
        crossing_attention(model, options.get("qformer_layer"))

    @property
    def vision(self) -> PreTrainedModel:
        return self.model.vision_model

    @property
    def speaker(self) -> PreTrainedModel:
        return self.model.language_model

    def phrase(self, text: str) -> str:
        return text  # the image comes before it by itself

    def layouts(self, inputs: dict[str, Tensor], sizes: Sequence[Size]) -> list[Layout]:
        *_, height, width = inputs["pixel_values"].shape
        patch = self.model.config.vision_config.patch_size
        index = raster(height // patch, width // patch, first=1)  # of the patches; the CLS feature comes first
        return [Layout(self.model.config.num_query_tokens, index, whole(size)) for size in sizes]

    def tokenize(self, prompt: str, layouts: Sequence[Layout]) -> Tensor:
        """The queries' places come before everything, also before the text's first token."""
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        text = self.processor.tokenizer(prompt, return_tensors="pt").input_ids[0]
        image = self.model.config.image_token_id
        if (text == image).any():
            raise ValueError(f"the image comes before a prompt of InstructBLIP, not into it: {prompt!r}")
        return torch.cat([torch.full((sum(layout.num_tokens for layout in layouts),), image), text])

    def encode_images(self, inputs: dict[str, Tensor], count: int) -> list[ImageFeatures]:
        """Only as far as the question does not change it: the Q-Former reads that."""
        return [ImageFeatures(each) for each in self.model.vision_model(**inputs).last_hidden_state.chunk(count)]

    def qformer_inputs(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """What the Q-Former reads of a prompt."""
        read = self.processor.qformer_tokenizer(prompt, return_tensors="pt").to(device)
        longest, places = read.input_ids.shape[1], self.model.config.qformer_config.max_position_embeddings
        if longest > places:
            raise ValueError(f"a prompt of {longest} tokens is too long for the Q-Former, which reads up to {places}")
        return {f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")}

    def forward_inputs(self, prompt: str, ids: Tensor, images: Sequence[EncodedImage]) -> dict[str, Any]:
        first = prompt, id(images[0].features.pooled)
        known = self.handed_on.get(first) if len(images) > 1 else None  # of an image and a crop only the crop is new
        seen = torch.cat([image.features.pooled for image in images[known is not None :]])
        asked = {name: value.expand(len(seen), -1) for name, value in self.qformer_inputs(prompt, ids.device).items()}
        # The vision tower gives what it has given before, and the model's own code goes on from there.
        tower = BaseModelOutputWithPooling(last_hidden_state=seen)
        with brought_in(self.model), replaced(self.model.vision_model, "forward", lambda **_: tower):
            encoded = self.model.get_image_features(None, **asked, return_dict=True)
        if known is not None:
            encoded.pooler_output = torch.cat([known, encoded.pooler_output])
        elif len(images) == 1:
            self.handed_on.setdefault(first, encoded.pooler_output.detach())
        mask = torch.ones_like(ids)[None]
        return {"attention_mask": mask, "pixel_values": None, "mm_encoder_outputs": {"image": encoded}, **asked}

    def stock_inputs(self, prompt: str, ids: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        read = self.qformer_inputs(prompt, ids.device)  # once for each image
        asked = {name: value.expand(len(inputs["pixel_values"]), -1) for name, value in read.items()}
        return super().stock_inputs(prompt, ids, inputs) | asked


ADAPTER = BlipAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("blip")
rel_attention_blip, gradient_attention_blip = rel_att, grad_att
pure_gradient_blip, localization_attention_blip = pure_grad, loc_att
question_attention_blip = question_att
