"""Maps to boxes, tiles and filters, under the names that notebooks import. Needs no torch.

From a map to boxes: vicrop/boxes.py, and without a map: vicrop/baselines.py. Large images: vicrop/tiles.py. Fine
structure: vicrop/edges.py. Qwen2.5-VL's messages: vicrop/qwen_input.py. Reading images: vicrop/images.py.
"""

from vicrop.baselines import center_crop, gt_crop, random_crop
from vicrop.boxes import (
    WINDOW_RATIOS,
    bbox_from_att_image_adaptive,
    bbox_in_region,
    bboxes_from_att_image,
    bboxes_in_region,
    clip_box,
    square_around,
)
from vicrop.dataset import box_xywh_to_xyxy
from vicrop.edges import edge_mask, edge_strength, high_pass_filter
from vicrop.images import load_image, pad_to_square
from vicrop.qwen_input import (
    MAX_PIXELS,
    encode_base64,
    multiple_size,
    pixel_range,
    prepare_qwen2_5_input,
    resize_to_multiple,
)
from vicrop.tiles import TILE_ASPECT, TILE_SIDE, high_res, high_res_split_threshold, join_maps, same_size

__all__ = [
    "MAX_PIXELS", "TILE_ASPECT", "TILE_SIDE", "WINDOW_RATIOS",
    "bbox_from_att_image_adaptive", "bbox_in_region", "bboxes_from_att_image", "bboxes_in_region", "box_xywh_to_xyxy",
    "center_crop", "clip_box", "edge_mask", "edge_strength", "encode_base64", "gt_crop", "high_pass_filter", "high_res",
    "high_res_split_threshold", "join_maps", "load_image", "multiple_size", "pad_to_square", "pixel_range",
    "prepare_qwen2_5_input", "random_crop", "resize_to_multiple", "same_size", "square_around",
]  # fmt: skip
