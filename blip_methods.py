"""InstructBLIP: what its look is, and the three ViCrop methods over it. For decoder-only checkpoints (Vicuna).

Its language model never sees patches: a Q-Former reads the question, attends to the patches with 32 queries, and hands
on 32 tokens. So a map is the attention of the last token to the queries times that of the queries to the patches.
"""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, AutoTokenizer, InstructBlipForConditionalGeneration

from attention import brought_in, watch
from look import Look, valid_layer
from maps import MapFunction, gradient_attention, localization_attention, pure_gradient, relative_attention

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

    instruction_aware = True

    def __init__(self, images, model, processor, geometry="exact", qformer_layer=None):
        super().__init__(images, model, processor, geometry, qformer_layer=qformer_layer)
        self._cross = crossing_attention(model, qformer_layer)
        self._through = {}  # ask -> A_ti, (heads, queries, 1 + patches)
        self.bbox_size = model.config.vision_config.image_size

    @classmethod
    def check(cls, model, qformer_layer=None, **options):
        super().check(model, **options)
        if model.config.image_token_id is None:
            raise ValueError("its config has no image_token_index: vicrop.load_model gives it one")
        if not model.config.use_decoder_only_language_model:
            raise ValueError(
                f"its language model ({model.config.text_config.model_type}) is an encoder-decoder, as in the Flan-T5 "
                "checkpoints: maps are read from a decoder-only one, as in Salesforce/instructblip-vicuna-7b"
            )
        crossing_attention(model, qformer_layer)

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
    def generator(self):
        return self.model.language_model

    @staticmethod
    def default_layer(model):
        return getattr(model.config, "att_layer", LM_LAYER)

    def prompt(self, question):
        return PROMPT.format(question=question)

    def phrase(self, text):
        return text  # the image comes before it by itself

    def token_count(self, grid):
        return self.model.config.num_query_tokens

    def tokens(self, prompt, counts):
        """The queries' places come before everything, also before the text's first token."""
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        text = self.processor.tokenizer(prompt, return_tensors="pt").input_ids[0]
        image = self.model.config.image_token_id
        if (text == image).any():
            raise ValueError(f"the image comes before a prompt of InstructBLIP, not into it: {prompt!r}")
        return torch.cat([torch.full((sum(counts),), image), text])

    def see(self, inputs):
        return list(self.model.vision_model(**inputs).last_hidden_state)

    def embed(self, seen, prompts):
        features = torch.stack(list(seen))
        tokenizer = self.processor.qformer_tokenizer
        asked = [tokenizer(prompt, return_tensors="pt").input_ids[0].to(features.device) for prompt in prompts]
        longest, places = max(map(len, asked)), self.model.config.qformer_config.max_position_embeddings
        if longest > places:
            raise ValueError(f"a prompt of {longest} tokens is too long for the Q-Former, which reads up to {places}")
        heard = pad_sequence([torch.ones_like(ids) for ids in asked], batch_first=True)
        return list(image_tokens(self.model, features, pad_sequence(asked, batch_first=True), heard))

    def stock_inputs(self, ids, prompt):
        reader = self.processor.qformer_tokenizer(prompt, return_tensors="pt").to(ids.device)
        heard = {f"qformer_{name}": reader[name] for name in ("input_ids", "attention_mask")}
        return super().stock_inputs(ids, prompt) | heard

    def features(self, asks, seen):
        """With the Q-Former's attention on the way, which is the same whenever it reads these asks."""
        with watch([self.model.qformer], [self._cross]) as rows:
            features = super().features(asks, seen)
        self._through.update(zip(asks, rows[self._cross], strict=True))
        return features

    def _before_gradients(self, asks, scripts, layers):
        """All after the Q-Former's softmax depends on it: its rows are the leaf, and the whole pass is watched."""
        modules = [self._cross, *(self.attention_modules[layer] for layer in layers)]

        def finish():
            reading = self._unread(scripts, super(BlipLook, self).features(asks, self.seen))
            return self._read_on(reading, scripts)

        return max(script.stop for script in scripts), [self.model.qformer, self.model.get_decoder()], modules, finish

    def cells(self, rows, grid):
        return rows  # of queries: `_maps` takes them on to the patches

    def _maps(self, found, layers, asks, end):
        through = found[self._cross] if self._cross in found else [self._through[ask] for ask in asks]
        through = [row.mean(0)[:, 1:].to(self.device) for row in through]  # (queries, patches): A_ti without CLS
        maps = super()._maps(found, layers, asks, end)
        grids = [self.grids[ask.image] for ask in asks]
        return [(a @ b).unflatten(-1, grid) for a, b, grid in zip(maps, through, grids, strict=True)]


rel_att = rel_attention_blip = MapFunction("rel_attention_blip", BlipLook, relative_attention)
grad_att = gradient_attention_blip = MapFunction("gradient_attention_blip", BlipLook, gradient_attention)
pure_grad = pure_gradient_blip = MapFunction("pure_gradient_blip", BlipLook, pure_gradient)
loc_att = localization_attention_blip = MapFunction("localization_attention_blip", BlipLook, localization_attention)
