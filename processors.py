"""Processors, loaded with what transformers leaves out or cannot load without torchvision; and do they fit the model?

`prepare` is called once for a checkpoint that has been loaded: what its config leaves open is filled in, if that can be
done, and what does not fit together is refused by a ValueError.
"""

from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin, Qwen2_5_VLProcessor


def prepare(model, processor):
    """The image token of processor and model is the same, and has an embedding."""
    image, own = processor.image_token, model.config.image_token_id
    token = processor.tokenizer.convert_tokens_to_ids(image)
    if token != own:
        raise ValueError(f"{image} is token {own} by its config.json, and {token} by its tokenizer")
    refuse_token_without_row(model, image)


def refuse_token_without_row(model, image):
    """ValueError if the token that stands for an image has no embedding."""
    own, rows = model.config.image_token_id, len(model.get_input_embeddings().weight)
    if not 0 <= own < rows:
        raise ValueError(f"{image} is token {own}, and its model has embeddings of tokens 0 to {rows - 1}")


# ------------------------------------------------------------------------------------------------------- InstructBLIP
def prepare_qformer(model, processor):
    """A config from before `image_token_index` gets one."""
    if model.config.image_token_id is None:
        rows = len(model.get_input_embeddings().weight)
        model.config.image_token_index = place_token(processor.tokenizer, rows)
    refuse_token_without_row(model, "<image>")


def load_qformer_processor(source, **where):
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


# ---------------------------------------------------------------------------------------------------------- Qwen-VL
class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its half for videos, which alone needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


ImageTextProcessor.__name__ = Qwen2_5_VLProcessor.__name__  # it is saved under this name, which AutoProcessor knows


def load_qwen_processor(source, **where):
    """The processor of a folder or a hub id; its chat template may also be where a tokenizer keeps one."""
    processor = ImageTextProcessor.from_pretrained(source, **where)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return processor


def chat_prompt(processor, text):
    """The chat template of a checkpoint, filled in for a user's text about one image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prepare_qwen(model, processor):
    """There is a chat template, and it places an image and a text once."""
    prepare(model, processor)
    if not processor.chat_template:
        raise ValueError("it has no chat template, neither chat_template.jinja nor one in tokenizer_config.json")
    text = "what is it?"
    prompt = chat_prompt(processor, text)
    for part in ("<|vision_start|><|image_pad|><|vision_end|>", processor.image_token, text):
        if prompt.count(part) != 1:
            raise ValueError(f"its chat template writes {part} {prompt.count(part)} times for an image and a text")
