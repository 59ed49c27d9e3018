"""The embedded models before training: tokenizers, processors, real transformers models of a few million parameters.

A `Family` is also all that training has to know about a kind of model: what it is shown, how it is asked, where its
vision features come from, and how several questions about an image go through it at once.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from tiny.boards import CHARACTERS
from tiny.canvas import COLORS
from tiny.packing import IGNORE, Turn, pack, packed_attention
from tiny.questions import ASKED_SHAPES, vocabulary
from vicrop.attention import replaced
from vicrop.models import instructblip as blip_methods
from vicrop.models import llava as llava_methods
from vicrop.models import qwen2_5_vl as qwen2_5_methods
from vicrop.processors import ImageTextProcessor, chat_prompt
from vicrop.tables import GENERAL_PROMPT

Batch = dict[str, Any]  # collated: tensors by their names, and the slots
DEPTH = 6  # layers of each vision tower
TEXT = {"hidden_size": 128, "intermediate_size": 304, "num_hidden_layers": 6, "num_attention_heads": 8}


def make_tokenizer(prompts: Sequence[str], words: Sequence[str] = (), **marks: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of the drawn world: every word of its language is one token, any other text falls into bytes.

    A digit or a capital on a sign is a token of its own, whatever stands beside it.

    Args:
        prompts: the texts around the questions (templates already filled in), so that their words become tokens too.
        words: further words that are one token each ("ASSISTANT" would be nine).
        marks: the special tokens, as of `bpe_tokenizer`.
    """
    texts = [*vocabulary(), *(f"{c} {c}" for c in CHARACTERS), *prompts]
    tokenizer = bpe_tokenizer(texts, pre_tokenizers.Split(Regex(r" ?[0-9A-Z](?![a-z])"), "isolated"), **marks)
    tokenizer.add_tokens(list(words))
    return tokenizer


def bpe_tokenizer(
    texts: Sequence[str],
    *splits: pre_tokenizers.PreTokenizer,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = "<pad>",
    **marks: str | None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which the words of `texts` are tokens.

    Args:
        texts: what it is trained on.
        splits: pre-tokenizers that cut a text before its bytes are looked at.
        bos: put before every text; None: nothing is.
        marks: further special tokens, by the attribute that holds them (`image_token="<image>"`).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    special = {name: token for name, token in special.items() if token}
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[*special.values(), *marks.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 5, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=marks, padding_side="left", **special
    )


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The language model of llava and blip, for as many tokens as the tokenizer has by now."""
    return LlamaConfig(
        **TEXT, num_key_value_heads=8, vocab_size=len(tokenizer), max_position_embeddings=2048,
        tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def fan_in_init(model: PreTrainedModel) -> PreTrainedModel:
    """The model, its weights drawn with std 1/sqrt(fan_in), half of that into the residual stream.

    The library's constant 0.02 is meant for wide models: at a width of 128 it left training at chance.
    """
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_stream = any(
                part in name for part in ("o_proj", "down_proj", "out_proj", "fc2", "attn.proj", "projection")
            )
            std = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5 * (0.5 if into_stream else 1.0)
            weight.data.normal_(std=std, generator=generator)
    if hasattr(model, "query_tokens"):  # of a Q-Former
        model.query_tokens.data.normal_(generator=generator)
    model.get_output_embeddings().weight.data.normal_(std=0.02, generator=generator)
    return model


class Family:
    """What training knows about a kind of model.

    Attributes:
        model, processor: untrained, as `make` makes them.
        tower: name of the module that sees: the vision tower.
        cell: side of a map cell in input pixels.
        constants: the checkpoint's own (its layer, ...), written into its config.json; see the model cards.
    """

    tower: str
    cell: int
    constants: dict[str, int]
    reads = (
        "answers questions about drawn streets: what the signs say (1 to 3 digits and capitals), colours and shapes, "
        "what is there, how many, left of, above, which number is larger"
    )
    keeps_aspect = False  # is an image's aspect ratio kept, or squashed?
    answer_start = " "  # between prompt and answer
    stored = torch.float16  # dtype of the finished checkpoint: it shall take less than 10 MB
    turns_per_image = 12

    def __init__(self):
        self.model, self.processor = self.make()
        self.tokenizer = self.processor.tokenizer

    def make(self) -> tuple[Any, Any]:
        """(model, processor), untrained."""
        raise NotImplementedError

    def shape(self, aspect: float = 1.0) -> tuple[int, int]:
        """(height, width) in pixels of what the model is shown of an image of that aspect ratio (width / height)."""
        raise NotImplementedError

    def prompt(self, question: str) -> str:
        """The whole prompt about one image."""
        raise NotImplementedError

    def features(self, values: Tensor) -> Tensor:
        """(batch, cells, width) of the vision tower, row by row, for the look stage's head."""
        raise NotImplementedError

    def collate(self, turns: Sequence[Sequence[Turn]], shapes: Sequence[tuple[int, int]]) -> Batch:
        """Tensors of a batch, "ids" (rows, T) and "labels" (rows, T, 3), as of Turn, among them, for `hidden`.

        Args:
            turns: for each image its [Turn].
            shapes: (height, width) of the image and of each of its crops.
        """
        raise NotImplementedError

    def hidden(self, batch: Batch, values: Tensor, crops: Sequence[Tensor] = ()) -> Tensor:
        """Hidden states (rows, T, width) of the language model over a collated batch.

        Args:
            values: (images, 3, H, W) normalised pixels.
            crops: for the first, second, ... crop of each image the like.
        """
        raise NotImplementedError

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The token ids of a text, with or without the special tokens around it."""
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def turn(self, question: str, answer: str, name_ends: Sequence[tuple[int, int, int]] = ()) -> Turn:
        """The Turn of a prompt after the image and its answer with the end token; `name_ends` as in a Lesson."""
        prompt = self.after_image(question)
        start = prompt.index(question) if question else 0
        name_ends = [(len(self.encode(prompt[: start + end])) - 1, *xy) for end, *xy in name_ends]
        answer = [*self.encode(self.answer_start + answer), self.tokenizer.eos_token_id]
        return Turn(self.encode(prompt), answer, name_ends)

    def after_image(self, question: str) -> str:
        """The part of a prompt that follows the image."""
        return self.prompt(question)


class PackedFamily(Family):
    """A kind of model whose image tokens do not depend on the question: all turns about an image go behind it.

    Attributes:
        mark: the image token as text; between: what stands between the marks of two images.
    """

    mark: str
    between = ""

    def after_image(self, question: str) -> str:
        return self.prompt(question).rpartition(self.mark)[2]

    def head(self, shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids up to the end of the images, which have these (height, width)s."""
        text = self.prompt("").rpartition(self.mark)[0] + self.mark
        text = self.between.join([text, *[self.mark] * (len(shapes) - 1)])
        cells = iter(height * width // self.cell**2 for height, width in shapes)
        first, *rest = text.split(self.mark)
        ids = self.encode(first, special=True)
        for piece in rest:
            ids += [self.tokenizer.image_token_id] * next(cells) + self.encode(piece)
        return ids

    def collate(self, turns: Sequence[Sequence[Turn]], shapes: Sequence[tuple[int, int]]) -> Batch:
        ids, labels, positions, slots = pack(self.head(shapes), turns, self.tokenizer.pad_token_id)
        return {"ids": ids, "labels": labels, "positions": positions, "slots": slots}

    def read(self, batch: Batch, **inputs: Tensor) -> Tensor:
        """Hidden states of the language model over a batch laid out in slots, and the inputs that a family adds."""
        with packed_attention(self.model.get_decoder(), batch["slots"]):
            return self.model.model(input_ids=batch["ids"], **inputs).last_hidden_state


class Llava(PackedFamily):
    """LLaVA-1.5: CLIP vision tower, two-layer projector, Llama with 6 layers of 8 heads.

    Its processor squashes the whole image to a square (no centre crop), so its map covers the whole image.
    """

    tower = "model.vision_tower"
    side, cell = 112, 8  # a 14 x 14 map
    mark = "<image>"
    constants = {"att_layer": 2}

    def make(self) -> tuple[Any, Any]:
        words = ("USER", "ASSISTANT")
        tokenizer = make_tokenizer([self.prompt(GENERAL_PROMPT)], words=words, image_token=self.mark)
        side = {"height": self.side, "width": self.side}
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
            tokenizer=tokenizer,
            patch_size=self.cell,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        vision = CLIPVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=DEPTH, num_attention_heads=4,
            image_size=self.side, patch_size=self.cell, projection_dim=128,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=vision,
            text_config=llama(tokenizer),
            image_token_index=tokenizer.image_token_id,
            image_seq_length=(self.side // self.cell) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
        model = LlavaForConditionalGeneration(config)
        return fan_in_init(model), processor

    def shape(self, aspect: float = 1.0) -> tuple[int, int]:
        return self.side, self.side

    def prompt(self, question: str) -> str:
        return llava_methods.PROMPT.format(question=question)

    def features(self, values: Tensor) -> Tensor:
        tower = self.model.model.vision_tower
        return tower(pixel_values=values, output_hidden_states=True).hidden_states[-1][:, 1:]

    def hidden(self, batch: Batch, values: Tensor, crops: Sequence[Tensor] = ()) -> Tensor:
        if crops:
            values = torch.stack([values, *crops], 1).flatten(0, 1)
        return self.read(batch, pixel_values=values, position_ids=batch["positions"])


class Qwen(PackedFamily):
    """Qwen2.5-VL: windowed vision tower with rotary positions, 2x2 merger, grouped-query language model with mrope.

    It keeps an image's aspect ratio and shows it in about 64 cells of 16 x 16 pixels.
    """

    tower = "model.visual"
    patch, cell = 8, 16
    keeps_aspect = True
    mark, between = "<|image_pad|>", "<|vision_end|><|vision_start|>"
    answer_start = ""
    constants = {"att_layer": 2}
    pixels = {"shortest_edge": 64 * cell**2, "longest_edge": 72 * cell**2}
    marks = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "turn_token": "<|im_start|>",
        "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
    }  # fmt: skip
    chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def make(self) -> tuple[Any, Any]:
        texts = ["user\n assistant\nassistant\n" + qwen2_5_methods.PROMPT.format(question=GENERAL_PROMPT)]
        words = [f"{word}\nyes\nno" for word in (*COLORS, *ASKED_SHAPES)]  # an answer begins without a space
        tokenizer = make_tokenizer(texts + words, bos=None, eos="<|im_end|>", pad="<|endoftext|>", **self.marks)
        image_processor = Qwen2VLImageProcessorPil(size=self.pixels, patch_size=self.patch, merge_size=2)
        processor = ImageTextProcessor(image_processor, tokenizer, self.chat_template)
        vision = {
            "hidden_size": 128, "depth": DEPTH, "num_heads": 4, "intermediate_size": 384, "out_hidden_size": 128,
            "patch_size": self.patch, "spatial_merge_size": 2, "window_size": 64, "fullatt_block_indexes": [1, 3, 5],
            "hidden_act": "quick_gelu",
        }  # fmt: skip
        text = {
            **TEXT, "num_key_value_heads": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        }  # fmt: skip
        config = Qwen2_5_VLConfig(
            vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id,
            video_token_id=tokenizer.video_token_id, vision_start_token_id=tokenizer.vision_start_token_id,
            vision_end_token_id=tokenizer.vision_end_token_id,
        )  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(config)
        return fan_in_init(model), processor

    def shape(self, aspect: float = 1.0) -> tuple[int, int]:
        size = round(640 / math.sqrt(aspect)), round(640 * math.sqrt(aspect))
        return smart_resize(*size, self.cell, self.pixels["shortest_edge"], self.pixels["longest_edge"])

    def prompt(self, question: str) -> str:
        return chat_prompt(self.processor, qwen2_5_methods.PROMPT.format(question=question))

    def patches(self, values: Tensor) -> Tensor:
        """(images, patches, 3 * 2 * 8 * 8) as the processor lays them out: 2x2 neighbours after each other."""
        p, (count, _, height, width) = self.patch, values.shape
        blocks = values.reshape(count, 3, height // p // 2, 2, p, width // p // 2, 2, p)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (images, h, w, 2, 2, 3, p, p)
        return blocks.unsqueeze(6).expand(*blocks.shape[:6], 2, p, p).flatten(1, 4).flatten(2)

    def grids(self, *shapes: Sequence[int]) -> Tensor:
        """(images, 3): one frame, and how many patches high and wide, of images of these (height, width)s."""
        return torch.tensor([[1, height // self.patch, width // self.patch] for height, width in shapes])

    def features(self, values: Tensor) -> Tensor:
        grids = self.grids(*[values.shape[2:]] * len(values)).to(values.device)
        features = self.model.model.visual(self.patches(values).flatten(0, 1), grid_thw=grids).pooler_output
        return features.unflatten(0, (len(values), -1))

    def hidden(self, batch: Batch, values: Tensor, crops: Sequence[Tensor] = ()) -> Tensor:
        images = [values, *crops]
        patches = torch.cat([self.patches(each) for each in images], 1).flatten(0, 1)
        grids = self.grids(*[each.shape[2:] for each in images]).to(values.device)
        prefix = batch["slots"].prefix
        head = batch["ids"][:1, :prefix]
        places, _ = self.model.model.get_rope_index(head, (head == self.tokenizer.image_token_id).int(), grids)
        turns = batch["positions"][:, prefix:] + (places.max() + 1 - prefix)  # (rows, T)
        places = torch.cat([places.expand(3, len(turns), -1), turns.expand(3, *turns.shape)], 2)
        grids = grids.repeat(len(values), 1)
        return self.read(batch, pixel_values=patches, image_grid_thw=grids, position_ids=places)


class Blip(Family):
    """InstructBLIP: vision tower of llava's shape, Q-Former that reads the question, Llama.

    The Q-Former's outputs depend on the question, so every question is a row of its own; vision features are shared.
    """

    tower = "vision_model"
    side, cell = 112, 8
    queries = 32
    turns_per_image = 6
    constants = {"att_layer": 2, "qformer_layer": 1}

    def make(self) -> tuple[Any, Any]:
        tokenizer, reader = (make_tokenizer([self.prompt(GENERAL_PROMPT)]) for _ in range(2))
        side = {"height": self.side, "width": self.side}
        processor = InstructBlipProcessor(BlipImageProcessorPil(size=side), tokenizer, reader, self.queries)
        vision = InstructBlipVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=DEPTH, num_attention_heads=4,
            image_size=self.side, patch_size=self.cell, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        )  # fmt: skip
        qformer = InstructBlipQFormerConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(reader),
            max_position_embeddings=128, pad_token_id=reader.pad_token_id, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        config = InstructBlipConfig(
            vision_config=vision.to_dict(), qformer_config=qformer.to_dict(), text_config=llama(tokenizer).to_dict(),
            num_query_tokens=self.queries, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )  # fmt: skip
        model = InstructBlipForConditionalGeneration(config)
        return fan_in_init(model), processor

    def shape(self, aspect: float = 1.0) -> tuple[int, int]:
        return self.side, self.side

    def prompt(self, question: str) -> str:
        return blip_methods.PROMPT.format(question=question)

    def features(self, values: Tensor) -> Tensor:
        return self.model.vision_model(values).last_hidden_state[:, 1:]

    def collate(self, turns: Sequence[Sequence[Turn]], shapes: Sequence[tuple[int, int]]) -> Batch:
        images = [self.model.config.image_token_id] * (self.queries * len(shapes)) + [self.tokenizer.bos_token_id]
        reader, owners, rows, question_ids = self.processor.qformer_tokenizer, [], [], []
        for owner, each in enumerate(turns):
            for turn in each:
                rows.append((torch.tensor([*images, *turn.asked, *turn.answer]), turn.labels(len(images))))
                question_ids.append(torch.tensor([reader.bos_token_id, *turn.asked]))
                owners.append(owner)
        ids, labels = zip(*rows, strict=True)
        return {
            "ids": pad_sequence(ids, True, self.tokenizer.pad_token_id), "labels": pad_sequence(labels, True, IGNORE),
            "question_ids": pad_sequence(question_ids, True, reader.pad_token_id), "owners": torch.tensor(owners),
        }  # fmt: skip

    def image_tokens(self, features: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """(batch, queries, dim): what the language model gets to see of images when the Q-Former reads a question.

        Args:
            features: (batch, 1 + patches, width) of the vision tower.
            question_ids, question_mask: (batch, T) in the Q-Former's vocabulary, and which of them are no padding.
        """
        output = BaseModelOutputWithPooling(last_hidden_state=features)
        with replaced(self.model.vision_model, "forward", lambda **_: output):
            found = self.model.get_image_features(None, question_ids, question_mask.long(), return_dict=True)
        return found.pooler_output

    def hidden(self, batch: Batch, values: Tensor, crops: Sequence[Tensor] = ()) -> Tensor:
        shown = [self.model.vision_model(each).last_hidden_state for each in (values, *crops)]
        ids = batch["question_ids"]
        mask = ids != self.processor.qformer_tokenizer.pad_token_id
        tokens = [self.image_tokens(each[batch["owners"]], ids, mask) for each in shown]
        embeds = self.model.get_input_embeddings()(batch["ids"])
        at = (batch["ids"] == self.model.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(at, torch.cat(tokens, 1).to(embeds))
        mask = (batch["ids"] != self.tokenizer.pad_token_id).long()
        return self.model.get_decoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state


FAMILIES = {"llava": Llava, "blip": Blip, "qwen2_5": Qwen}
