"""Qwen2.5-VL: what its look is, and the three ViCrop methods over it. For all sizes (3B, 7B, 72B).

An image keeps its aspect ratio, so grids vary; 2 x 2 patches become one token; positions have three axes (mrope).
"""

import torch
from transformers import ProcessorMixin, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from look import Look
from maps import MapFunction, gradient_attention, localization_attention, pure_gradient, relative_attention
from utils import multiple_size, pixel_range, resize_to_multiple

ATT_LAYER = 22
BBOX_SIZE = 224
PROMPT = "{question} Answer the question using a single word or phrase."
MODEL_CLASS = Qwen2_5_VLForConditionalGeneration


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its half for videos, which alone needs torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


ImageTextProcessor.__name__ = Qwen2_5_VLProcessor.__name__  # it is saved under this name, which AutoProcessor knows


def load_processor(source, **where):
    """The processor of a folder or a hub id; its chat template may also be where a tokenizer keeps one."""
    processor = ImageTextProcessor.from_pretrained(source, **where)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return processor


def chat_prompt(processor, text):
    """The chat template of a checkpoint, filled in for a user's text about one image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


class QwenLook(Look):
    """What a Qwen2.5-VL model has seen of some images (see `look.Look`).

    Args:
        images: PIL images or paths. A map covers the whole image.
        model, processor: a loaded Qwen2_5_VLForConditionalGeneration and its processor, with or without its video half.
        geometry: "exact", or "upstream" for the published edge mask of pure_grad.
        min_pixels, max_pixels: every image and crop is scaled into this range; default: the processor's, but at most
            256 * 28 * 28.

    A prompt is the filled in chat template (`prompt`); a text without it is taken as the user's message.
    """

    block = "<|vision_start|><|image_pad|><|vision_end|>"

    def __init__(self, images, model, processor, geometry="exact", min_pixels=None, max_pixels=None):
        self._size = pixel_range(processor, min_pixels, max_pixels)
        self._merge = model.config.vision_config.spatial_merge_size
        super().__init__(images, model, processor, geometry, min_pixels=min_pixels, max_pixels=max_pixels)
        self.bbox_size = BBOX_SIZE

    @classmethod
    def check(cls, model, min_pixels=None, max_pixels=None, **options):
        super().check(model, **options)
        low, high = 1 if min_pixels is None else min_pixels, max_pixels
        if low < 1 or (high is not None and high < low):
            raise ValueError(f"min_pixels is at least 1, not {low}, and max_pixels at least min_pixels, not {high}")

    @classmethod
    def prepare(cls, model, processor):
        super().prepare(model, processor)
        if not processor.chat_template:
            raise ValueError("it has no chat template, neither chat_template.jinja nor one in tokenizer_config.json")
        text = PROMPT.format(question="what is it?")
        prompt = chat_prompt(processor, text)
        for part in (cls.block, processor.image_token, text):
            if prompt.count(part) != 1:
                raise ValueError(f"its chat template writes {part} {prompt.count(part)} times for an image and a text")

    @property
    def vision(self):
        return self.model.model.visual

    def preprocess(self, images):
        """As published: both sides to the nearest multiple of a token's side, then to a size within the limits."""
        settings = self.processor.image_processor
        images = [resize_to_multiple(image, settings.patch_size * settings.merge_size) for image in images]
        return dict(settings(images=images, size=self._size, return_tensors="pt"))

    @staticmethod
    def default_layer(model):
        return getattr(model.config, "att_layer", ATT_LAYER)

    def prompt(self, question):
        return chat_prompt(self.processor, PROMPT.format(question=question))

    def grids_of(self, inputs):
        return [(high // self._merge, wide // self._merge) for _, high, wide in inputs["image_grid_thw"].tolist()]

    def tokens(self, prompt, counts):
        if self.processor.image_token not in prompt:
            prompt = chat_prompt(self.processor, prompt)
        return super().tokens(prompt, counts)

    def positions(self, ids, grids):
        """(3, T): time, height and width of an image's tokens; a text's three are equal."""
        patches = torch.tensor([[1, h * self._merge, w * self._merge] for h, w in grids], device=ids.device)
        image = (ids == self.model.config.image_token_id).int()[None]
        return self.model.model.get_rope_index(ids[None], mm_token_type_ids=image, image_grid_thw=patches)[0][:, 0]

    def stock_inputs(self, ids, prompt):
        image = (ids == self.model.config.image_token_id).int()  # without it there would be no mrope, silently
        return super().stock_inputs(ids, prompt) | {"mm_token_type_ids": image}

    def canvas(self, values):
        """A row of `values` is a patch: 3 colours x 2 copies in time; rows come by tokens, of 2 x 2 patches each."""
        vision, (h, w) = self.model.config.vision_config, self.grids[0]
        copies, side, merge = vision.temporal_patch_size, vision.patch_size, self._merge
        values = values.reshape(h, w, merge, merge, 3, copies, side, side)
        pictures = values.permute(5, 4, 0, 2, 6, 1, 3, 7)  # (copies, 3, h, merge, side, w, merge, side)
        return pictures.reshape(copies, 3, h * merge * side, w * merge * side)

    def record_fields(self, of, crops):
        """`num_img_tokens`: the image tokens of the prompt with image and crop."""
        settings, fields = self.processor.image_processor, []
        limits = {"min_pixels": self._size["shortest_edge"], "max_pixels": self._size["longest_edge"]}
        for image, crop in zip(of, crops, strict=True):
            width, height = multiple_size(crop.size, settings.patch_size * settings.merge_size)
            patches = settings.get_number_of_image_patches(height, width, limits)
            fields.append({"num_img_tokens": self.token_count(self.grids[image]) + patches // self._merge**2})
        return fields


rel_att = rel_attention_qwen2_5 = MapFunction("rel_attention_qwen2_5", QwenLook, relative_attention)
grad_att = gradient_attention_qwen2_5 = MapFunction("gradient_attention_qwen2_5", QwenLook, gradient_attention)
pure_grad = pure_gradient_qwen2_5 = MapFunction("pure_gradient_qwen2_5", QwenLook, pure_gradient)
loc_att = localization_attention_qwen2_5 = MapFunction(
    "localization_attention_qwen2_5", QwenLook, localization_attention
)
