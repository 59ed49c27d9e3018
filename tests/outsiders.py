"""The models of external croppers, small and with random weights, on their real classes, saved as checkpoints."""

import torch
from builders import GENERAL, make_tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SamConfig,
    SamModel,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def build_clip(side=28, patch=14):
    tokenizer = make_tokenizer([GENERAL])
    text = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": 2}
    vision = SMALL | {"image_size": side, "patch_size": patch}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    size = {"height": side, "width": side}
    processor = CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size), tokenizer)
    torch.manual_seed(0)
    return CLIPModel._from_config(config).eval(), processor


def build_yolos(side=32):
    config = YolosConfig(**SMALL, image_size=[side, side], patch_size=16, num_detection_tokens=9, num_labels=1)
    torch.manual_seed(0)
    model = YolosForObjectDetection._from_config(config).eval()
    for layer in model.bbox_predictor.layers:
        layer.weight.data.mul_(20)  # else all boxes are the middle
    return model, YolosImageProcessorPil(size={"shortest_edge": side, "longest_edge": 2 * side})


def build_rt_detr(side=64, sure=-9.0):
    """One that is sure of nothing, or of things of its first kind: `sure` is how it sees everything, as a logit."""
    backbone = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1],
                                  out_features=["stage2", "stage3", "stage4"])  # fmt: skip
    config = RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[16, 16, 32], encoder_ffn_dim=32,
        encoder_attention_heads=2, d_model=32, num_queries=9, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=32,
        decoder_layers=2, decoder_attention_heads=2, encoder_layers=1, num_denoising=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RTDetrForObjectDetection._from_config(config).eval()
    for layer in model.model.decoder.class_embed:
        layer.weight.data.mul_(20)  # else all things are alike
        layer.bias.data[:] = torch.tensor([sure, -99, -99])
    return model, RTDetrImageProcessorPil(size={"height": side, "width": side})


def build_sam(side=64):
    """A SAM that is sure of its masks, whatever they are: else its filters leave none."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": side, "patch_size": 16,
              "output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 16,
              "initializer_range": 0.5}  # fmt: skip
    prompt = {"hidden_size": 32, "image_size": side, "patch_size": 16, "image_embedding_size": side // 16}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    torch.manual_seed(0)
    model = SamModel._from_config(
        SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    ).eval()
    head = model.mask_decoder.iou_prediction_head.proj_out
    head.weight.data.zero_()
    head.bias.data.fill_(0.99)
    for network in model.mask_decoder.output_hypernetworks_mlps:
        network.proj_out.weight.data.mul_(1e6)  # a mask's edge is sharp
        network.proj_out.bias.data.mul_(1e6)
    sides = {"longest_edge": side}
    square = {"height": side, "width": side}
    return model, SamImageProcessorPil(size=sides, pad_size=square, mask_size={"longest_edge": side // 4},
                                       mask_pad_size={"height": side // 4, "width": side // 4})  # fmt: skip


OUTSIDERS = {"clip": build_clip, "detector": build_yolos, "sam": build_sam}


def saved_in(folder):
    """[--clip, FOLDER, --detector, ...]: each saved in a folder of its own."""
    options = []
    for name, build in OUTSIDERS.items():
        for part in build():
            part.save_pretrained(folder / name)
        options += [f"--{name}", str(folder / name)]
    return options
