"""LLaVA-1.5: what its look is, and the three ViCrop methods over it. Works with any checkpoint of the family.

To add a model of your own, write a module like this one and name it in info.MODELS.
"""

from transformers import AutoProcessor, LlavaForConditionalGeneration

from look import Look
from maps import MapFunction, gradient_attention, localization_attention, pure_gradient, relative_attention
from utils import pad_to_square

ATT_LAYER = 14
PROMPT = "<image>\nUSER: {question} Answer the question using a single word or phrase.\nASSISTANT:"
MODEL_CLASS, load_processor = LlavaForConditionalGeneration, AutoProcessor.from_pretrained


class LlavaLook(Look):
    """What a LLaVA model has seen of some images (see `look.Look`).

    Args:
        images: PIL images or paths; one KV prefix is kept per image.
        model, processor: a loaded LlavaForConditionalGeneration and its LlavaProcessor.
        geometry: "exact", the map covers what the processor shows the model; "upstream", as if it covered everything.
        image_fit: "processor", as the checkpoint's processor does; "pad", the image in a square of the mean colour.
    """

    def __init__(self, images, model, processor, geometry="exact", image_fit="processor"):
        super().__init__(images, model, processor, geometry, image_fit=image_fit)
        self.regions = [self._region(image.size) for image in self.images]
        self.bbox_size = model.config.vision_config.image_size
        self.needs_square_tiles = geometry == "exact" and (
            processor.image_processor.do_center_crop or image_fit == "pad"
        )
        # Tokens before the patches: a CLS feature, unless the checkpoint drops it as LLaVA-1.5 does.
        has_class = any(name.endswith("class_embedding") for name, _ in self.vision.named_parameters())
        self.before = int(has_class and model.config.vision_feature_select_strategy == "full")

    @property
    def vision(self):
        return self.model.model.vision_tower

    def preprocess(self, images):
        if self.options["image_fit"] == "pad":
            mean = tuple(int(255 * channel) for channel in self.processor.image_processor.image_mean)
            images = [pad_to_square(image, mean) for image in images]
        return super().preprocess(images)

    def _region(self, size):
        """The rectangle of a (width, height) image that the model's input shows, in xyxy pixels of the image."""
        width, height = size
        if self.options["geometry"] == "upstream":
            return 0, 0, width, height
        left = top = 0
        if self.options["image_fit"] == "pad":
            side = max(size)
            left, top = -((side - width) // 2), -((side - height) // 2)
            width = height = side
        processor = self.processor.image_processor
        if not processor.do_center_crop:
            return left, top, left + width, top + height
        short = processor.size.get("shortest_edge")
        if processor.do_resize and short:
            scale = short / min(width, height)
            resized = (short, int(scale * height)) if width <= height else (int(scale * width), short)
        elif processor.do_resize:
            resized = processor.size["width"], processor.size["height"]
        else:
            resized = width, height
        seen = processor.crop_size["width"], processor.crop_size["height"]
        edges = []
        for whole, small, crop, origin in zip((width, height), resized, seen, (left, top), strict=True):
            start = (small - crop) // 2  # negative where the processor pads
            first, last = round(start * whole / small), round((start + crop) * whole / small)
            edges.append((origin + first, origin + max(first + 1, last)))
        (x1, x2), (y1, y2) = edges
        return x1, y1, x2, y2

    @staticmethod
    def default_layer(model):
        return getattr(model.config, "att_layer", ATT_LAYER)

    def prompt(self, question):
        return PROMPT.format(question=question)


rel_att = rel_attention_llava = MapFunction("rel_attention_llava", LlavaLook, relative_attention)
grad_att = gradient_attention_llava = MapFunction("gradient_attention_llava", LlavaLook, gradient_attention)
pure_grad = pure_gradient_llava = MapFunction("pure_gradient_llava", LlavaLook, pure_gradient)
loc_att = localization_attention_llava = MapFunction("localization_attention_llava", LlavaLook, localization_attention)
