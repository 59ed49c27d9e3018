"""Cosmos 3 Edge: as Qwen-VL, a grid of patches of which 2 x 2 are a token; a patch's colours lie pixel by pixel."""

from torch import Tensor

from vicrop.layouts import Layout, unpatchify
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.merged_patches import MergedPatchesAdapter


class Cosmos3EdgeAdapter(MergedPatchesAdapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side."""

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The patches (patches, side x side x 3), which come by tokens, as a picture."""
        side = self.processor.image_processor.patch_size
        return unpatchify(values.unflatten(-1, (-1, 3)).transpose(-1, -2), layout.grid, self.merge, 1, side)


ADAPTER = Cosmos3EdgeAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("cosmos3_edge")
