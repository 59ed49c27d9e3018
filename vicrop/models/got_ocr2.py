"""GOT-OCR 2: a square of tokens for an image that is squashed to one; each shows a part of its neighbours as well."""

from typing import Any

from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.squares import SquareAdapter


class GotOcr2Adapter(SquareAdapter):
    """A map covers the whole image; a processor that cuts it as well (crop_to_patches) is refused."""

    def image_text(self, inputs: dict[str, Any], number: int) -> str:
        if int(inputs["num_patches"][number]) != 1:
            raise ValueError("its processor cuts images by itself (crop_to_patches): maps are read without that")
        return self.image_token * self.processor.num_image_tokens


ADAPTER = GotOcr2Adapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("got_ocr2")
