"""InstructBLIP: what its look is, and the three ViCrop methods over it. For decoder-only checkpoints (Vicuna).

Its language model never sees patches: a Q-Former reads the question, attends to the patches with 32 queries, and hands
on 32 tokens. So a map is the attention of the last token to the queries times that of the queries to the patches.
"""

import torch
from transformers import AutoProcessor, InstructBlipForConditionalGeneration

from attention import brought_in, watch
from look import Look, valid_layer
from maps import MapFunction, gradient_attention, pure_gradient, relative_attention

QFORMER_LAYER = 2  # counts the layers that have cross-attention: every second one, so layer 4 of the Q-Former
LM_LAYER = 15
PROMPT = "Question: {question} Short answer:"
MODEL_CLASS, load_processor = InstructBlipForConditionalGeneration, AutoProcessor.from_pretrained


def image_tokens(model, features, asked, heard):
    """(batch, queries, dim): what the language model gets to see of images when the Q-Former reads a question.

    Args:
        features: (batch, 1 + patches, width) of the vision tower.
        asked, heard: (batch, T) ids of the question in the Q-Former's vocabulary, and which of them are no padding.
    """
    with brought_in(model):
        queries = model.query_tokens.expand(len(features), -1, -1)
    outputs = model.qformer(
        input_ids=asked,
        attention_mask=torch.cat([heard.new_ones(queries.shape[:2]), heard], 1).long(),
        query_embeds=queries,
        encoder_hidden_states=features,
        encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
    ).last_hidden_state
    return model.language_projection(outputs[:, : queries.shape[1]])


def crossing_attention(model, layer=None):
    """The Q-Former's attention module to read, at a layer that counts those with cross-attention from 0.

    Raises:
        ValueError: naming the layer that the Q-Former does not have and the range that it has.
    """
    crossing = [each.crossattention.attention for each in model.qformer.encoder.layer if each.has_cross_attention]
    layer = getattr(model.config, "qformer_layer", QFORMER_LAYER) if layer is None else layer
    return crossing[valid_layer(layer, len(crossing), "the Q-Former (cross-attention only)")]


class BlipLook(Look):
    """What an InstructBLIP model has seen of some images (see `look.Look`).

    Args:
        images: PIL images or paths; they are squashed to the model's square, so a map covers the whole image.
        model, processor: a loaded InstructBlipForConditionalGeneration and its InstructBlipProcessor.
        geometry: "exact", or "upstream" for the published edge mask of pure_grad.
        qformer_layer: the Q-Former layer to read, counting those with cross-attention from 0; default: the
            checkpoint's `config.qformer_layer`, else QFORMER_LAYER.
    """

    reads_question = True

    def __init__(self, images, model, processor, geometry="exact", qformer_layer=None):
        super().__init__(images, model, processor, geometry, qformer_layer=qformer_layer)
        self._cross = crossing_attention(model, qformer_layer)
        vision = model.config.vision_config
        self.grid = tuple(side // vision.patch_size for side in self.pixels.shape[2:])
        self.bbox_size = vision.image_size

    @classmethod
    def check(cls, model, qformer_layer=None, **options):
        super().check(model, **options)
        if not model.config.use_decoder_only_language_model:
            raise ValueError(
                f"its language model ({model.config.text_config.model_type}) is an encoder-decoder, as in the Flan-T5 "
                "checkpoints: maps are read from a decoder-only one, as in Salesforce/instructblip-vicuna-7b"
            )
        crossing_attention(model, qformer_layer)

    @property
    def vision(self):
        return self.model.vision_model

    @property
    def generator(self):
        return self.model.language_model

    def preprocess(self, images):
        return {"pixel_values": self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]}

    @staticmethod
    def default_layer(model):
        return getattr(model.config, "att_layer", LM_LAYER)

    def prompt(self, question):
        return PROMPT.format(question=question)

    def token_count(self, inputs):
        return self.model.config.num_query_tokens

    def tokens(self, prompt, counts):
        """The queries' places come before everything, also before the text's first token."""
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        text = self.processor.tokenizer(prompt, return_tensors="pt").input_ids
        places = torch.full((1, sum(counts)), self.model.config.image_token_id)
        return torch.cat([places, text], 1)

    def image_span(self, ids):
        return 0, self.model.config.num_query_tokens

    def see(self, inputs):
        return self.model.vision_model(**inputs).last_hidden_state

    def embed(self, seen, prompt):
        asked = self.processor.qformer_tokenizer(prompt, return_tensors="pt").input_ids.to(seen.device)
        asked = asked.expand(len(seen), -1)
        return image_tokens(self.model, seen, asked, torch.ones_like(asked))

    def _encode(self, prompt, script, stop, cache, seen):
        with watch([self.model.qformer], [self._cross]) as rows:
            super()._encode(prompt, script, stop, cache, seen)
        self._connector[prompt] = rows.probs

    def _before_gradients(self, prompt, script, layers):
        """Everything from the Q-Former's softmax on depends on it: its rows are the leaf, and nothing comes cached."""
        _, models, modules = super()._before_gradients(prompt, script, layers)
        return self.new_cache(), [self.model.qformer, *models], [self._cross, *modules]

    def cells(self, rows, found):
        through = found[self._cross].mean(1)[:, :, 1:].to(rows.device)  # (batch, queries, patches): without CLS
        return (rows @ through[:, None]).unflatten(-1, self.grid)


rel_att = rel_attention_blip = MapFunction("rel_attention_blip", BlipLook, relative_attention)
grad_att = gradient_attention_blip = MapFunction("gradient_attention_blip", BlipLook, gradient_attention)
pure_grad = pure_gradient_blip = MapFunction("pure_gradient_blip", BlipLook, pure_gradient)
