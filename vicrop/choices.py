"""Which model looks, and how the crop is chosen: what a command line says, frozen."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vicrop.tables import CROPPERS, MAX_NEW_TOKENS, REGION_SHARE, VIEWS


@dataclass(frozen=True)
class ModelChoice:
    """A model, and how it is to be loaded and asked (see loaded.load_chosen).

    Attributes:
        name: of tables.MODELS, or a hub id or folder; revision: on the hub.
        model_id: another checkpoint of the same family as `name`, hub id or folder.
        dtype: a name of tables.DTYPES; auto: bfloat16 on CUDA, float32 elsewhere.
        device: a torch device; None: the GPU of this process, else the CPU. device_map: "auto" spreads the model.
        options: of the model's adapter, each with its value (geometry, ...); `prompt` and `generation`
            where they were given.
        max_new_tokens: an answer has at most so many tokens.
    """

    name: str
    model_id: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def checkpoint(self) -> tuple[str, str | None, str | None]:
        """(name, model_id, revision), as the functions of checkpoints.py take them."""
        return self.name, self.model_id, self.revision


@dataclass(frozen=True)
class Regions:
    """How many regions of an image are cropped for a question.

        Regions(most=2, share=0.5)

    Attributes:
        most: at most so many.
        share: a further one counts where its window holds at least this share of what the first one's holds.
    Raises:
        ValueError: there must be at least one; a share is 0 to 1.
    """

    most: int = 1
    share: float = REGION_SHARE

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"regions must be at least 1, got {self.most}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"region_share must be 0 to 1, got {self.share}")


ONE_REGION = Regions()


@dataclass(frozen=True)
class MethodChoice:
    """Methods, and what they read.

    Attributes:
        names: of tables.METHODS.
        layer: for methods that read layers: a number from 0, "mean", or None for the model's own.
        heads: for loc_att: the heads (layer, head); None: the best ones of each image.
        max_image_pixels: open images of up to so many pixels; None: Pillow's own limit.
        crop_below: crop only where the model is less sure of its first answer than this (see `wants_crop`).
        views: of the `_zoom` methods, how many views of an image they may take.
        regions: how many crops of an image a question is asked with.
        croppers: the checkpoints of external croppers, as in tables.CROPPERS.
    """

    names: tuple[str, ...] = ("rel_att",)
    layer: int | str | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    max_image_pixels: int | None = None
    crop_below: float | None = None
    views: int = VIEWS
    regions: Regions = ONE_REGION
    croppers: Mapping[str, str] = field(default_factory=lambda: dict(CROPPERS))


def wants_crop(confidence: float, crop_below: float | None) -> bool:
    """Is a question to be answered with a crop, given how probable its first answer was? Always if nothing is said.

    A bound of 1 or more is always, too, and one of 0 never.
    """
    return crop_below is None or crop_below >= 1 or confidence < crop_below
