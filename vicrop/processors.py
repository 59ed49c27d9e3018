"""Processors, loaded with what transformers leaves out or cannot load without torchvision; and do they fit the model?

`prepare` is called once for a checkpoint that has been loaded: what its config leaves open is filled in, if that can be
done, and what does not fit together is refused by a ValueError.
"""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, ProcessorMixin, Qwen2_5_VLProcessor
from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from vicrop.attention import replaced

QUESTION = "what is it?"
ROOT_TOKENIZER = "its tokenizer (tokenizer.json, or the vocabulary in place of it)"
QFORMER_TOKENIZER = "the tokenizer of its Q-Former (folder qformer_tokenizer)"


def prepare(model: PreTrainedModel, processor: Any) -> None:
    """The tokenizer fits the model; the image token of both is the same, and has an embedding."""
    refuse_other_tokenizer(processor.tokenizer, ROOT_TOKENIZER, embeddings(model), processor.image_token)
    image, own = processor.image_token, model.config.image_token_id
    token = processor.tokenizer.convert_tokens_to_ids(image)
    if token != own:
        raise ValueError(f"{image} is token {own} by its config.json, and {token} by its tokenizer")
    refuse_token_without_row(model, image)


def embeddings(model: PreTrainedModel) -> int:
    """How many tokens a model has embeddings of; that may be more than its tokenizer has."""
    rows: Any = model.get_input_embeddings().weight
    return len(rows)


def refuse_other_tokenizer(tokenizer: Any, shown: str, rows: int, image: str = "<image>") -> None:
    """ValueError unless a tokenizer knows words, and each of its words has one of `rows` embeddings.

    Special tokens may have none: fine-tunes add a padding token that nothing ever looks up.
    """
    try:
        ids = tokenizer(QUESTION, add_special_tokens=False).input_ids
    except Exception as error:  # the tokenizers library raises no other kind
        raise ValueError(f"{shown} cannot read {QUESTION!r}: {error}") from error
    special = {key for key, token in tokenizer.added_tokens_decoder.items() if token.special}
    if set(ids) <= {tokenizer.unk_token_id, *tokenizer.all_special_ids, *special}:
        raise ValueError(f"{shown} must know the words of a question, and {QUESTION!r} is {ids or 'nothing'} by it")
    words = ((token, key) for token, key in tokenizer.get_vocab().items() if token != image and key not in special)
    token, last = max(words, key=lambda pair: pair[1])
    if last >= rows:
        raise ValueError(f"{shown} has {token!r} as token {last}, and its model has embeddings of 0 to {rows - 1}")


def refuse_token_without_row(model: PreTrainedModel, image: str) -> None:
    """ValueError if the token that stands for an image has no embedding."""
    own, rows = model.config.image_token_id, embeddings(model)
    if not 0 <= own < rows:
        raise ValueError(f"{image} is token {own}, and its model has embeddings of tokens 0 to {rows - 1}")


# ------------------------------------------------------------------------------------------------------- InstructBLIP
def prepare_qformer(model: PreTrainedModel, processor: Any) -> None:
    """Both tokenizers fit the model; a config from before `image_token_index` gets one."""
    refuse_other_tokenizer(processor.qformer_tokenizer, QFORMER_TOKENIZER, model.config.qformer_config.vocab_size)
    prepare_queries(model, processor)


def prepare_queries(model: PreTrainedModel, processor: Any) -> None:
    """The tokenizer fits a model whose Q-Former reads no prompt; a config without `image_token_index` gets one."""
    rows = embeddings(model)
    refuse_other_tokenizer(processor.tokenizer, ROOT_TOKENIZER, rows)
    if model.config.image_token_id is None:
        model.config.image_token_index = place_token(processor.tokenizer, rows)
    refuse_token_without_row(model, "<image>")


def load_qformer_processor(source: str | Path, **where: Any) -> ProcessorMixin:
    """The processor of a folder or a hub id.

    The Q-Former's tokenizer is read once more: without it transformers would put the language model's in its place.
    """
    if Path(source).is_dir() and not Path(source, "qformer_tokenizer").is_dir():
        raise FileNotFoundError("it lacks the folder qformer_tokenizer, the tokenizer of its Q-Former")
    processor = AutoProcessor.from_pretrained(source, **where)
    processor.qformer_tokenizer = AutoTokenizer.from_pretrained(source, subfolder="qformer_tokenizer", **where)
    return processor


def place_token(tokenizer: Any, rows: int) -> int:
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


# --------------------------------------------------------------------------------------------------------- chat models
def prepare_tokens(model: PreTrainedModel, processor: Any) -> None:
    """The tokenizer fits the model, which has an embedding for the token of an image."""
    image = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    refuse_other_tokenizer(processor.tokenizer, ROOT_TOKENIZER, embeddings(model), image)
    refuse_token_without_row(model, image)


def prepare_chat(model: PreTrainedModel, processor: Any) -> None:
    """As `prepare_tokens`, and there is a chat template."""
    prepare_tokens(model, processor)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise ValueError("it has no chat template, neither chat_template.jinja nor one in tokenizer_config.json")


# ------------------------------------------------------------------------------------------------- without torchvision
class _NoVideos:
    """Stands for the half of a processor that is for videos, which cannot be loaded without torchvision."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> None:
        """Nothing."""


def load_any(source: str | Path, **where: Any) -> ProcessorMixin:
    """The processor of a folder or a hub id; without torchvision it has no half for videos."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(source, **where)
    table, proper = type(MODALITY_TO_AUTOPROCESSOR_MAPPING), ProcessorMixin.check_argument_for_proper_class
    look_up = table.__getitem__

    def without_videos(self: Any, key: str) -> Any:
        return _NoVideos if key == "video_processor" else look_up(self, key)

    def lenient(self: Any, name: str, value: Any) -> Any:
        return None if value is None and name == "video_processor" else proper(self, name, value)

    check = replaced(ProcessorMixin, "check_argument_for_proper_class", lenient)
    with check, replaced(table, "__getitem__", without_videos):
        try:
            return AutoProcessor.from_pretrained(source, **where)
        except AttributeError as error:
            if "'NoneType'" not in str(error):
                raise
            raise ImportError("its processor asks something of its half for videos, which needs torchvision "
                              "(pip install torchvision)") from error  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- Qwen-VL
class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its half for videos, which alone needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


ImageTextProcessor.__name__ = Qwen2_5_VLProcessor.__name__  # it is saved under this name, which AutoProcessor knows


def load_qwen_processor(source: str | Path, **where: Any) -> ImageTextProcessor:
    """The processor of a folder or a hub id; its chat template may also be where a tokenizer keeps one."""
    processor = ImageTextProcessor.from_pretrained(source, **where)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return processor


def chat_prompt(processor: Any, text: str, images: int = 1) -> str:
    """The chat template of a checkpoint, filled in for a user's text about an image, or several."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prepare_qwen(model: PreTrainedModel, processor: Any) -> None:
    """There is a chat template, and it places an image and a text once."""
    prepare(model, processor)
    if not processor.chat_template:
        raise ValueError("it has no chat template, neither chat_template.jinja nor one in tokenizer_config.json")
    prompt = chat_prompt(processor, QUESTION)
    for part in ("<|vision_start|><|image_pad|><|vision_end|>", processor.image_token, QUESTION):
        if prompt.count(part) != 1:
            raise ValueError(f"its chat template writes {part} {prompt.count(part)} times for an image and a text")
