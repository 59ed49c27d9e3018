"""The models of external croppers, on transformers' own classes: CLIP, object detectors, Segment Anything (SAM)."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForMaskGeneration,
    AutoModelForObjectDetection,
    AutoProcessor,
    CLIPModel,
    PreTrainedModel,
)

from vicrop.checkpoints import WEIGHTS, in_a_sentence, local_or_hub, refuse_other_weights
from vicrop.downloads import say_download
from vicrop.layouts import Region

CROPS = 32  # that CLIP sees at once
SURE = 0.25  # boxes that the detector is less sure of are left out, as in the paper
POINTS = 32  # on a side of the grid of points at each of which SAM is asked for masks: as many as usual
OVERLAP = 0.7  # of two boxes of SAM with more IoU the surer one stays: the usual bound of its mask generation


def load(model_class: Any, processor_class: Any, name: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """(model in float32, processor) of a hub id or folder.

    Raises:
        ValueError: one sentence: there is no such checkpoint, or it lacks weights of a model of this class.
    """
    source = local_or_hub(name, name)
    if not Path(source).is_dir():
        say_download(str(source), WEIGHTS)
    with in_a_sentence(name, source):
        processor = processor_class.from_pretrained(source)
        model, report = model_class.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    refuse_other_weights(name, model, report)
    return model.eval().to(device), processor


class Clip:
    """How similar parts of an image are to a text, by CLIP: `(image, text, boxes) -> scores`."""

    def __init__(self, source: str, device: torch.device):
        self.model, self.processor = load(CLIPModel, AutoProcessor, source, device)

    @torch.no_grad()
    def __call__(self, image: Image.Image, text: str, boxes: Sequence[Region]) -> list[float]:
        """A score for each box (xyxy pixels), the cosine of both embeddings; a long text is cut off at its end."""
        scores, longest = [], self.model.config.text_config.max_position_embeddings
        for start in range(0, len(boxes), CROPS):
            crops = [image.crop(box) for box in boxes[start : start + CROPS]]
            inputs = self.processor(text=[text], images=crops, truncation=True, max_length=longest, return_tensors="pt")
            output = self.model(**inputs.to(self.model.device))
            scores += (output.image_embeds @ output.text_embeds[0]).tolist()
        return scores


class Detector:
    """The boxes of objects in an image, by a model of AutoModelForObjectDetection: `image -> boxes`."""

    def __init__(self, source: str, device: torch.device):
        self.model, self.processor = load(AutoModelForObjectDetection, AutoImageProcessor, source, device)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[list[float]]:
        """[[x1, y1, x2, y2]] pixels, of which the model is sure by SURE at least."""
        inputs = self.processor(images=[image], return_tensors="pt").to(self.model.device)
        sizes = [(image.height, image.width)]
        (found,) = self.processor.post_process_object_detection(self.model(**inputs), SURE, sizes)
        return found["boxes"].tolist()


class Segmenter:
    """The boxes of SAM's automatic masks of an image: `image -> boxes`."""

    def __init__(self, source: str, device: torch.device):
        from transformers import pipeline  # it imports all kinds of pipelines

        model, processor = load(AutoModelForMaskGeneration, AutoImageProcessor, source, device)
        self.generator: Any = pipeline("mask-generation", model=model, image_processor=processor, device=device)

    def __call__(self, image: Image.Image) -> list[list[float]]:
        """[[x1, y1, x2, y2]] pixels of the masks that pass SAM's usual filters, without near duplicates."""
        # The pipeline's own last step needs torchvision, and encodes masks of which only the boxes are wanted.
        parts = []
        for inputs in self.generator.preprocess(image, points_per_crop=POINTS):
            part = self.generator.forward(inputs)
            # Its masks are as large as the image: they go before those of the next points are made.
            parts.append([part[name].float().cpu().numpy() for name in ("boxes", "iou_scores")])
        boxes, scores = map(np.concatenate, zip(*parts, strict=True))
        # They end at a mask's last row and column; ours end behind these.
        return [(boxes[number] + (0, 0, 1, 1)).tolist() for number in distinct(boxes, scores, OVERLAP)]


def distinct(boxes: np.ndarray, scores: np.ndarray, overlap: float) -> list[int]:
    """The numbers of boxes (n, 4), best scores first, without those that overlap a better one by more IoU than that."""
    kept: list[int] = []
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    for number in np.argsort(-scores, kind="stable").tolist():
        corners = np.maximum(boxes[kept, :2], boxes[number, :2]), np.minimum(boxes[kept, 2:], boxes[number, 2:])
        both = np.prod((corners[1] - corners[0]).clip(0), axis=1)
        if not (both > overlap * (areas[kept] + areas[number] - both)).any():
            kept.append(number)
    return kept


KINDS = {"clip": Clip, "detector": Detector, "sam": Segmenter}  # option, as in tables.CROPPERS -> what is made of it


@lru_cache(maxsize=4)
def loaded_once(kind: type[Any], source: str, device: torch.device) -> Any:
    """One of KINDS with a checkpoint, on a device; methods that need the same one share it."""
    return kind(source, device)
