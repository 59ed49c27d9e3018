"""InstructBLIP: what is peculiar to it, and the ViCrop methods over it. For decoder-only checkpoints (Vicuna).

Its language model never sees patches: a Q-Former reads the question, attends to the patches with 32 queries, and hands
on 32 tokens. So a map is the attention of the last token to the queries times that of the queries to the patches.
"""

from pathlib import Path

import torch
from transformers import AutoProcessor, AutoTokenizer, InstructBlipForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from adapters import Adapter, ImageFeatures
from attention import replaced
from layouts import Layout, raster, whole
from methods import MapMethod, gradient_attention, localization_attention, pure_gradient, relative_attention
from session import valid_layer

QFORMER_LAYER = 2  # counts the layers that have cross-attention: every second one, so layer 4 of the Q-Former
LM_LAYER = 15
PROMPT = "Question: {question} Short answer:"
MODEL_CLASS = InstructBlipForConditionalGeneration


def load_processor(source, **where):
    """The processor of a folder or a hub id.

    The Q-Former's tokenizer is read once more: without it transformers would put the language model's in its place.
    """
    if Path(source).is_dir() and not Path(source, "qformer_tokenizer").is_dir():
        raise FileNotFoundError("it lacks the folder qformer_tokenizer, the tokenizer of its Q-Former")
    processor = AutoProcessor.from_pretrained(source, **where)
    processor.qformer_tokenizer = AutoTokenizer.from_pretrained(source, subfolder="qformer_tokenizer", **where)
    return processor


def place_token(tokenizer, rows):
    """A token id to stand for the image, for a config that names none (saved before transformers 4.46).

    Any id does which no prompt holds and for which there is an embedding, one of `rows`: that is always replaced. It is
    <image> or an id without a token; else a special token that the tokenizer does not write by itself, not even for
    characters that it does not know. (A question that spells it out is refused.)

    Raises:
        ValueError: there is none.
    """
    ids = tokenizer.get_vocab()
    if ids.get("<image>", rows) < rows:
        return ids["<image>"]
    without_token = set(range(rows)) - set(ids.values())
    if without_token:
        return min(without_token)
    written = {tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer("a question?").input_ids}
    special = [token for token in (tokenizer.pad_token_id, *tokenizer.all_special_ids) if token is not None]
    usable = [token for token in special if token < rows and token not in written]
    if not usable:
        raise ValueError("its config.json has no image_token_index, and no token is free to stand for the image")
    return usable[0]


def crossing_attention(model, layer=None):
    """The Q-Former's attention module to read, at a layer that counts those with cross-attention from 0.

    Raises:
        ValueError: naming the layer that the Q-Former does not have and the range that it has.
    """
    crossing = [each.crossattention.attention for each in model.qformer.encoder.layer if each.has_cross_attention]
    layer = getattr(model.config, "qformer_layer", QFORMER_LAYER) if layer is None else layer
    return crossing[valid_layer(layer, range(len(crossing)), "the Q-Former (cross-attention only)")]


class BlipAdapter(Adapter):
    """InstructBLIP (see adapters.Adapter). Images are squashed to the model's square: a map covers all of them.

    Options:
        qformer_layer: the Q-Former layer to read, counting those with cross-attention from 0; default: the
            checkpoint's `config.qformer_layer`, else QFORMER_LAYER.
    """

    options = {"geometry": "exact", "qformer_layer": None}

    def __init__(self, model, processor, **options):
        super().__init__(model, processor, **options)
        self.connector = crossing_attention(model, self.given["qformer_layer"]), model.qformer

    @classmethod
    def check(cls, model, **options):
        super().check(model, **options)
        if model.config.image_token_id is None:
            raise ValueError("its config has no image_token_index: vicrop.load_model gives it one")
        if not model.config.use_decoder_only_language_model:
            raise ValueError(
                f"its language model ({model.config.text_config.model_type}) is an encoder-decoder, as in the Flan-T5 "
                "checkpoints: maps are read from a decoder-only one, as in Salesforce/instructblip-vicuna-7b"
            )
        crossing_attention(model, options.get("qformer_layer"))

    @classmethod
    def prepare(cls, model, processor):
        rows = len(model.get_input_embeddings().weight)
        if model.config.image_token_id is None:
            model.config.image_token_index = place_token(processor.tokenizer, rows)
        if not 0 <= model.config.image_token_id < rows:
            own = model.config.image_token_id
            raise ValueError(f"<image> is token {own}, and its model has embeddings of tokens 0 to {rows - 1}")

    @property
    def vision(self):
        return self.model.vision_model

    @property
    def speaker(self):
        return self.model.language_model

    def prompt(self, question):
        return PROMPT.format(question=question)

    def phrase(self, text):
        return text  # the image comes before it by itself

    @classmethod
    def default_layer(cls, model):
        return getattr(model.config, "att_layer", LM_LAYER)

    def layouts(self, inputs, sizes):
        *_, height, width = inputs["pixel_values"].shape
        patch = self.model.config.vision_config.patch_size
        index = raster(height // patch, width // patch, first=1)  # of the patches; the CLS feature comes first
        return [Layout(self.model.config.num_query_tokens, index, whole(size)) for size in sizes]

    def tokenize(self, prompt, counts):
        """The queries' places come before everything, also before the text's first token."""
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        text = self.processor.tokenizer(prompt, return_tensors="pt").input_ids[0]
        image = self.model.config.image_token_id
        if (text == image).any():
            raise ValueError(f"the image comes before a prompt of InstructBLIP, not into it: {prompt!r}")
        return torch.cat([torch.full((sum(counts),), image), text])

    def encode_images(self, inputs, count):
        """Only as far as the question does not change it: the Q-Former reads that."""
        return [ImageFeatures(each) for each in self.model.vision_model(**inputs).last_hidden_state.chunk(count)]

    def qformer_inputs(self, prompt, device):
        """What the Q-Former reads of a prompt."""
        read = self.processor.qformer_tokenizer(prompt, return_tensors="pt").to(device)
        longest, places = read.input_ids.shape[1], self.model.config.qformer_config.max_position_embeddings
        if longest > places:
            raise ValueError(f"a prompt of {longest} tokens is too long for the Q-Former, which reads up to {places}")
        return {f"qformer_{name}": read[name] for name in ("input_ids", "attention_mask")}

    def forward_inputs(self, prompt, ids, images):
        asked = self.qformer_inputs(prompt, ids.device)
        asked = {name: value.expand(len(images), -1) for name, value in asked.items()}
        return {"attention_mask": torch.ones_like(ids)[None], "pixel_values": images[0].features.pooled, **asked}

    def as_encoded(self, images):
        """The vision tower gives what it has given before: the Q-Former goes on from there, in the model's forward."""
        features = torch.cat([image.features.pooled for image in images])
        output = BaseModelOutputWithPooling(last_hidden_state=features)
        return replaced(self.model.vision_model, "forward", lambda *_, **__: output)

    def stock_inputs(self, prompt, ids, inputs):
        return super().stock_inputs(prompt, ids, inputs) | self.qformer_inputs(prompt, ids.device)


ADAPTER = BlipAdapter
rel_att = rel_attention_blip = MapMethod("rel_attention_blip", BlipAdapter, relative_attention)
grad_att = gradient_attention_blip = MapMethod("gradient_attention_blip", BlipAdapter, gradient_attention)
pure_grad = pure_gradient_blip = MapMethod("pure_gradient_blip", BlipAdapter, pure_gradient)
loc_att = localization_attention_blip = MapMethod("localization_attention_blip", BlipAdapter, localization_attention)
