"""Small models of families that cut an image into tiles, or resample it, as those of families.py.

Some image processors need torchvision, and one vision tower timm: NEEDS says which. `make test-torchvision` has both.
"""

import types

import transformers
from builders import GENERAL, make_tokenizer
from families import (
    LAYERS,
    MROPE,
    STATES,
    internvl,
    model_of,
    siglip,
    square,
    template,
    text,
    untyped,
    vision,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vicrop.attention import replaced
from vicrop.guard import ADMITTED

NEEDS = dict.fromkeys(("cohere2_vision", "llama4", "lfm2_vl", "molmo2", "minicpm_ocr"), "torchvision")
NEEDS["perception_lm"] = "timm"  # and torchvision
# Families whose stock model fails in a version of transformers, so that nothing can be compared with it.
BROKEN = {"llama4": "5.24"}  # asks its language model for image_outputs
NO_VIDEOS = types.SimpleNamespace(slice_mode=True, downsample_mode="16x")  # what MiniCPM-V's processor asks of its half


def admitted(model):
    """A model that was compared with the stock one, as the tests do it."""
    setattr(model, ADMITTED, True)
    return model


def measured(name, processor, **config):
    return admitted(model_of(name, **config)), processor


def with_no_videos(processor_class, image_processor, tokenizer, **options):
    """A processor with a stand-in for its half for videos."""
    check = ProcessorMixin.check_argument_for_proper_class
    lenient = lambda self, name, value: None if value is NO_VIDEOS else check(self, name, value)  # noqa: E731
    with replaced(ProcessorMixin, "check_argument_for_proper_class", lenient):
        return processor_class(image_processor, NO_VIDEOS, tokenizer, **options)


# -------------------------------------------------------------------------------------------------- tiles, by formula
def qianfan_ocr():
    _, processor = internvl()
    tokenizer = make_tokenizer([GENERAL], start_image_token="<img>", end_image_token="</img>",
                               context_image_token="<IMG_CONTEXT>", place_token="<image>")  # fmt: skip
    processor = transformers.QianfanOCRProcessor(processor.image_processor, tokenizer, image_seq_length=4,
                                                 chat_template=template("<image>"))  # fmt: skip
    tower = untyped(vision(side=[28, 28], patch=[7, 7]))
    return model_of("QianfanOCR", vision_config=tower, text_config=text(tokenizer, "qwen3"), image_seq_length=4,
                    image_token_id=tokenizer.context_image_token_id), processor  # fmt: skip


def cohere2_vision():
    marks = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>",
             "img_line_break_token": "<|IMG_LINE_BREAK|>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], **marks)
    image_processor = transformers.Cohere2VisionImageProcessor(size=square(28), max_patches=6, patch_size=2)
    processor = transformers.Cohere2VisionProcessor(image_processor, tokenizer,
                                                    chat_template=template("<|IMG_PATCH|>"))  # fmt: skip
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return model_of(
        "Cohere2Vision", vision_config=siglip(28, 7), downsample_factor=2, alignment_intermediate_size=64,
        text_config=text(tokenizer, "cohere2", sliding_window=24, layer_types=kinds),
        image_token_id=tokenizer.image_token_id,
    ), processor  # fmt: skip


# -------------------------------------------------------------------------------------------------- tiles, as measured
PLACES = {f"row_{row}_col_{column}_token": f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)}


def granite_docling():
    tokenizer = make_tokenizer([GENERAL], fake_image_token="<fake_token_around_image>", image_token="<image>",
                               global_image_token="<global-img>", **PLACES)  # fmt: skip
    image_processor = GraniteDoclingImageProcessorPil(size=square(28), max_patches=6)
    processor = transformers.GraniteDoclingProcessor(image_processor, tokenizer, image_seq_len=4,
                                                     chat_template=template("<image>"))  # fmt: skip
    tower = vision(side=28, patch=7, num_hidden_layers=3, out_hidden_size=64, scale_factor=2,
                   deepstack_visual_indexes=[0, 1], use_fine_route=False)  # fmt: skip
    return measured("GraniteDocling", processor, vision_config=untyped(tower), text_config=untyped(text(tokenizer)),
                    image_token_id=tokenizer.image_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip


def ovis2():
    names = "<image>", "<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"
    tokenizer = make_tokenizer([GENERAL], **{f"mark{number}_token": name for number, name in enumerate(names)})
    image_processor = Ovis2ImageProcessorPil(size=square(28), crop_to_patches=True, min_patches=1, max_patches=6)
    processor = transformers.Ovis2Processor(image_processor, tokenizer, image_seq_length=4,
                                            chat_template=template("<image>"))  # fmt: skip
    marks = [tokenizer.convert_tokens_to_ids(names[number]) for number in (1, 3, 4, 5, 6)]
    tower = vision(side=28, patch=7, vocab_size=64, hidden_stride=2)
    return measured(
        "Ovis2", processor, vision_config=untyped(tower), text_config=text(tokenizer, "qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"), visual_indicator_token_ids=marks,
        vocab_size=len(tokenizer), hidden_size=64,
    )  # fmt: skip


def llama4():
    names = "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"
    tokenizer = make_tokenizer([GENERAL], **{f"mark{number}_token": name for number, name in enumerate(names)})
    image_processor = transformers.Llama4ImageProcessor(size=square(28), max_patches=4, resize_to_max_canvas=False)
    processor = transformers.Llama4Processor(image_processor, tokenizer, patch_size=7, pixel_shuffle_ratio=0.5,
                                             chat_template=template("<|image|>"))  # fmt: skip
    tower = vision(side=28, patch=7, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    start, end, patch = (tokenizer.convert_tokens_to_ids(names[number]) for number in (1, 2, 3))
    words = text(tokenizer, "llama4_text", intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=32,
                 num_hidden_layers=4, moe_layers=[])  # fmt: skip
    return measured("Llama4", processor, vision_config=untyped(tower) | {"intermediate_size": 128}, text_config=words,
                    image_token_index=patch, boi_token_index=start, eoi_token_index=end)  # fmt: skip


def perception_lm():
    tokenizer = make_tokenizer([GENERAL], image_token="<|image|>", video_token="<|video|>")
    image_processor = transformers.PerceptionLMImageProcessor(
        tile_size=32, max_num_tiles=6, vision_input_type="thumb+tile", size=square(32)
    )
    processor = transformers.PerceptionLMProcessor(
        transformers.PerceptionLMVideoProcessor(), image_processor, tokenizer, patch_size=8, pooling_ratio=2,
        chat_template=template("<|image|>"),
    )  # fmt: skip
    sizes = {"embed_dim": 32, "img_size": [32, 32], "depth": 2, "num_heads": 2, "patch_size": 8, "global_pool": "",
             "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]}  # fmt: skip
    tower = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "hidden_size": 32,
             "num_classes": 0, "do_pooling": True, "global_pool": "map", "model_args": sizes}  # fmt: skip
    return measured(
        "PerceptionLM", processor, vision_config=tower, text_config=text(tokenizer), projector_pooling_ratio=2,
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id, vision_use_cls_token=True,
    )  # fmt: skip


def lfm2_vl():
    places = {f"tile_{row}_{column}_token": f"<|img_row_{row}_col_{column}|>"
              for row in range(1, 5) for column in range(1, 5)}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], image_token="<image>", image_start_token="<|image_start|>",
                               image_end_token="<|image_end|>", image_thumbnail_token="<|img_thumbnail|>",
                               **places)  # fmt: skip
    image_processor = transformers.Lfm2VlImageProcessor(
        tile_size=32, encoder_patch_size=8, downsample_factor=2, min_tiles=2, max_tiles=6, min_image_tokens=4,
        max_image_tokens=9, use_thumbnail=True, do_image_splitting=True, max_pixels_tolerance=1.0,
    )  # fmt: skip
    processor = transformers.Lfm2VlProcessor(image_processor, tokenizer, chat_template=template("<image>", "<s>USER: "))
    tower = vision("siglip2_vision_model", patch=8, num_patches=16, vision_use_head=False)
    del tower["image_size"]
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    return measured(
        "Lfm2Vl", processor, vision_config=tower, downsample_factor=2, projector_hidden_size=64,
        text_config=text(tokenizer, "lfm2", layer_types=kinds, num_hidden_layers=4),
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip


def minicpm(name, image_processor, make, **more):
    marks = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
             "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
             "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL, "\n"], **marks)
    processor = make(image_processor(max_slice_nums=4, scale_resolution=56, patch_size=7), tokenizer,
                     chat_template=template("<|image_pad|>"))  # fmt: skip
    tower = vision(side=56, patch=7, num_hidden_layers=3, insert_layer_id=1)
    rope = {"rope_parameters": MROPE | {"mrope_interleaved": True}}
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("image_token", "video_token")}
    places = {"image_start": "image_start_token", "image_end": "image_end_token", "slice_start": "slice_start_token",
              "slice_end": "slice_end_token"}  # fmt: skip
    if name == "MiniCPMV4_7":
        more |= {f"{place}_id": getattr(tokenizer, f"{mark}_id") for place, mark in places.items()}
        more["newline_id"] = tokenizer("\n", add_special_tokens=False).input_ids[0]
    return measured(
        name, processor, text_config=text(tokenizer, "qwen3_5_text", **STATES, **rope), vision_config=untyped(tower),
        insert_layer_id=1, **{f"{key}_id": value for key, value in ids.items()}, **more,
    )  # fmt: skip


def minicpmv4_6():
    make = lambda *parts, **options: with_no_videos(transformers.MiniCPMV4_6Processor, *parts, **options)  # noqa: E731
    return minicpm("MiniCPMV4_6", MiniCPMV4_6ImageProcessorPil, make, image_size=56)


def minicpmv4_7():
    make = lambda *parts, **options: with_no_videos(transformers.MiniCPMV4_7Processor, *parts, **options)  # noqa: E731
    return minicpm("MiniCPMV4_7", MiniCPMV4_6ImageProcessorPil, make, image_size=56)


def minicpm_ocr():
    def make(image_processor, tokenizer, **options):
        videos = transformers.MiniCPMOcrVideoProcessor()
        return transformers.MiniCPMOcrProcessor(image_processor, videos, tokenizer, **options)

    return minicpm("MiniCPMOcr", transformers.MiniCPMOcrImageProcessor, make)


def molmo2():
    marks = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>", "<frame_end>",
             "<im_low>"]  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], bos=None, image_token="<|image|>", video_token="<|video|>",
                               **{f"mark{number}_token": mark for number, mark in enumerate(marks)})  # fmt: skip
    image_processor = transformers.Molmo2ImageProcessor(size=square(56), max_crops=6, overlap_margins=[1, 1],
                                                        patch_size=7, pooling_size=[2, 2])  # fmt: skip
    processor = transformers.Molmo2Processor(image_processor, transformers.Molmo2VideoProcessor(), tokenizer,
                                             chat_template=template("<|image|>"))  # fmt: skip
    names = ("image_patch_id", "image_col_id", "image_start_token_id", "low_res_image_start_token_id",
             "frame_start_token_id", "image_end_token_id", "frame_end_token_id")  # fmt: skip
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 32,
             "intermediate_size": 64}  # fmt: skip
    tower = sizes | {"num_hidden_layers": 3, "image_size": [56, 56], "patch_size": 7, "num_position_embeddings": 64}
    return measured(
        "Molmo2", processor, vision_config=tower, text_config=untyped(text(tokenizer, additional_vocab_size=16)),
        adapter_config=sizes | {"vision_feature_layer": [-1, -2], "text_hidden_size": 64},
        **dict(zip(names, tokenizer.convert_tokens_to_ids(marks[:7]), strict=True)),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------- behind a resampler
def idefics2():
    tokenizer = make_tokenizer([GENERAL], image_boundary_token="<fake_token_around_image>", image_token="<image>",
                               end_of_utterance_token="<end_of_utterance>")  # fmt: skip
    image_processor = Idefics2ImageProcessorPil(size={"shortest_edge": 28, "longest_edge": 56},
                                                do_image_splitting=False)  # fmt: skip
    processor = transformers.Idefics2Processor(image_processor, tokenizer, image_seq_len=8,
                                               chat_template=template("<image>", between=""))  # fmt: skip
    resampler = {"hidden_size": 64, "resampler_n_latents": 8, "resampler_depth": 2, "resampler_n_heads": 4,
                 "resampler_head_dim": 16, "num_key_value_heads": 2}  # fmt: skip
    return model_of(
        "Idefics2", vision_config=untyped(vision(side=56, patch=7)), perceiver_config=resampler,
        text_config=text(tokenizer, "mistral", sliding_window=None), image_token_id=tokenizer.image_token_id,
    ), processor  # fmt: skip


def blip_2():
    tokenizer = make_tokenizer([GENERAL], place_token="<image>")  # not under the name that its processor looks for
    processor = transformers.Blip2Processor(BlipImageProcessorPil(size=square(56)), tokenizer, num_query_tokens=8)
    sizes = untyped(vision())
    queries = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
               "encoder_hidden_size": 32}  # fmt: skip
    words = {"model_type": "opt", "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": LAYERS,
             "num_attention_heads": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 512,
             "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    model = model_of("Blip2", vision_config=sizes, qformer_config=queries, text_config=words, num_query_tokens=8,
                     image_token_index=tokenizer.place_token_id)  # fmt: skip
    model.query_tokens.data.normal_(0, 1)  # zeros at first: then all queries attend alike
    return model, processor


TILES = {build.__name__: build for build in (
    qianfan_ocr, cohere2_vision, granite_docling, ovis2, llama4, perception_lm, lfm2_vl, minicpmv4_6, minicpmv4_7,
    minicpm_ocr, molmo2, idefics2,
)} | {"blip-2": blip_2}  # fmt: skip
