"""PaddleOCR-VL: as Qwen-VL, a grid of patches of which 2 x 2 are a token, but the patches come row by row."""

from torch import Tensor

from vicrop.layouts import Layout, unpatchify
from vicrop.methods import family_methods

# How its checkpoints are loaded and asked is that of all chat models.
from vicrop.models.chat import MODEL_CLASS, PROMPT, load_processor, prepare  # noqa: F401
from vicrop.models.merged_patches import MergedPatchesAdapter


class PatchRowsAdapter(MergedPatchesAdapter):
    """A map covers the whole image, which is scaled to a multiple of a token's side."""

    def canvas(self, values: Tensor, inputs: dict[str, Tensor], layout: Layout) -> Tensor:
        """The patches (patches, 3 x copies, side, side) as pictures."""
        settings = self.processor.image_processor
        rows, columns = (cells * self.merge for cells in layout.grid)
        return unpatchify(values, (rows, columns), 1, settings.temporal_patch_size, settings.patch_size)


ADAPTER = PatchRowsAdapter
rel_att, grad_att, pure_grad, loc_att, question_att = family_methods("patch_rows")
