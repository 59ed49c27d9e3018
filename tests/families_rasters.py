"""Further families, small as in families.py: those that lay an image's tokens out as one raster, as a grid or in rows.

Those whose processor or vision tower needs torchvision (and with it timm) are in WITH_TORCHVISION.
"""

import transformers
from builders import GENERAL, make_tokenizer
from families import (
    EXPERTS,
    GLM_MARKS,
    MROPE,
    QWEN_MARKS,
    STATES,
    TOWER3,
    made,
    model_of,
    pixtral_processor,
    siglip,
    square,
    template,
    text,
    untyped,
    vision,
    without_videos,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.cohere_compass.image_processing_pil_cohere_compass import CohereCompassImageProcessorPil
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import Cosmos3EdgeImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.glmga.image_processing_pil_glmga import GlmgaImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

PATCHES = {"shortest_edge": 4 * 28**2, "longest_edge": 20 * 28**2}  # pixels of an image
FRAMES = {"shortest_edge": 2 * 4 * 28**2, "longest_edge": 2 * 20 * 28**2}  # the same where two copies are counted
QWEN_CHAT = template("<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>user\n", "", "<|im_end|>\n")
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
COMPRESSED = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
              "qk_nope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
ROUTED_AS_LLAMA = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_hidden_size": 64}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}


def ids_of(tokenizer, marks):
    """The ids of special tokens, by the names that configs have for them."""
    return {f"{mark.removesuffix('_token')}_token_id": getattr(tokenizer, f"{mark}_id") for mark in marks}


# ---------------------------------------------------------------------------------------------------------- one raster
def video_llava():
    tokenizer = make_tokenizer([GENERAL], image_token="<image>", video_token="<video>")
    processor = without_videos(
        transformers.VideoLlavaProcessor, None, None, tokenizer, patch_size=14, chat_template=template("<image>")
    )
    processor.image_processor = transformers.VideoLlavaImageProcessor(size={"shortest_edge": 56}, crop_size=square(56))
    return model_of("VideoLlava", vision_config=vision(), text_config=text(tokenizer), image_seq_length=16,
                    image_token_index=tokenizer.image_token_id,
                    video_token_index=tokenizer.video_token_id), processor  # fmt: skip


def deepseek_vl():
    tokenizer = make_tokenizer([GENERAL], image_token="<image_placeholder>")
    processor = transformers.DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size=square(64)), tokenizer, num_image_tokens=16,
        chat_template=template("<image_placeholder>"),
    )  # fmt: skip
    return model_of("DeepseekVL", vision_config=siglip(64, 16), text_config=text(tokenizer),
                    image_token_id=tokenizer.image_token_id), processor  # fmt: skip


def deepseek_vl_hybrid():
    """It sees an image in two sizes, by two towers; each token is of both."""
    tokenizer = make_tokenizer([GENERAL], image_token="<image_placeholder>")
    processor = transformers.DeepseekVLHybridProcessor(
        DeepseekVLHybridImageProcessorPil(size=square(128), high_res_size=square(256)), tokenizer, num_image_tokens=16,
        chat_template=template("<image_placeholder>"),
    )  # fmt: skip
    fine = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64,
            "image_size": 256, "patch_size": 32, "window_size": 4, "global_attn_indexes": [1]}  # fmt: skip
    return model_of("DeepseekVLHybrid", vision_config=siglip(128, 32), high_res_vision_config=fine,
                    text_config=text(tokenizer), image_token_id=tokenizer.image_token_id), processor  # fmt: skip


def janus():
    marks = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    processor = transformers.JanusProcessor(
        JanusImageProcessorPil(size=square(64)), tokenizer, num_image_tokens=16,
        chat_template=template("<image_placeholder>"),
    )  # fmt: skip
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
             "mlp_ratio": 2.0, "projection_dim": 64, "num_image_tokens": 16}  # fmt: skip
    drawing = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "num_patches": 4,
               "channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32}  # fmt: skip
    return model_of("Janus", vision_config=tower, vq_config=drawing, text_config=text(tokenizer),
                    image_token_id=tokenizer.image_token_id), processor  # fmt: skip


def got_ocr2():
    """Its tower is SAM's, and convolutions make a token of 4 x 4 patches and a part of their neighbours."""
    tokenizer = make_tokenizer([GENERAL], image_token="<imgpad>", start_token="<img>", end_token="</img>")
    processor = transformers.GotOcr2Processor(
        GotOcr2ImageProcessorPil(size=square(128)), tokenizer, chat_template=template("<img><imgpad></img>")
    )
    processor.num_image_tokens = 16
    tower = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64,
             "image_size": 128, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1]}  # fmt: skip
    return model_of("GotOcr2", vision_config=tower, text_config=text(tokenizer, "qwen2"), image_seq_length=16,
                    image_token_index=tokenizer.image_token_id), processor  # fmt: skip


def fast_vlm():
    tokenizer = make_tokenizer([GENERAL], image_token="<image>")
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 128}, crop_size=square(128)), tokenizer, patch_size=32,
        vision_feature_select_strategy="full", num_additional_image_tokens=0, chat_template=template("<image>"),
    )  # fmt: skip
    tower = {"model_type": "timm_wrapper", "architecture": "fastvit_mci0", "do_pooling": True, "global_pool": "avg",
             "hidden_size": 1024, "num_classes": 0, "model_args": {"inference_mode": True}}  # fmt: skip
    return model_of("FastVlm", vision_config=tower, text_config=text(tokenizer, "qwen2"), image_seq_length=16,
                    image_token_index=tokenizer.image_token_id), processor  # fmt: skip


def gemma3n():
    """Images are large beside the tower's strides, whose padding moves what a token shows by half a stride."""
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
    }
    tokenizer = make_tokenizer([GENERAL], **marks)
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(), SiglipImageProcessorPil(size=square(512)), tokenizer,
        chat_template=template("<image_soft_token>"),
    )  # fmt: skip
    size = len(tokenizer)
    words = text(
        tokenizer, "gemma3n_text", num_hidden_layers=4, vocab_size_per_layer_input=size, hidden_size_per_layer_input=16,
        sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2,
        laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
    )  # fmt: skip
    return model_of(
        "Gemma3n", text_config=words,
        vision_config={"architecture": "mobilenetv5_300m_enc", "hidden_size": 2048, "vocab_size": 16,
                       "vocab_offset": size, "model_args": {"channel_multiplier": 0.1}},
        audio_config={"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "vocab_size": 16,
                      "vocab_offset": size + 16},
        **ids_of(tokenizer, marks),
    ), processor  # fmt: skip


# ------------------------------------------------------------------------------------------- grids of patches, any size
def qwen_like(name, processor_class, image_processor, words, tower, **more):
    """A model that a processor with Qwen's marks goes with."""
    tokenizer = make_tokenizer([GENERAL], bos=None, eos="<|im_end|>", pad="<|endoftext|>", **QWEN_MARKS)
    processor = without_videos(processor_class, image_processor, tokenizer, None, chat_template=QWEN_CHAT)
    marks = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    own = transformers.CONFIG_MAPPING[name.lower()] if name.islower() else getattr(transformers, f"{name}Config")
    known = {name: value for name, value in ids_of(tokenizer, marks).items() if name in vars(own())}
    return made(
        getattr(transformers, f"{name}ForConditionalGeneration"),
        own(text_config=words(tokenizer), vision_config=tower, **known, **more),
    ), processor


def exaone4_5():
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64,
             "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56}  # fmt: skip
    images = Qwen2VLImageProcessorPil(size=PATCHES, patch_size=14)
    return qwen_like("Exaone4_5_", transformers.Exaone4_5_Processor, images,
                     lambda tokenizer: text(tokenizer, "exaone4", **WINDOWS), tower)  # fmt: skip


def hyperclovax_vision_v2():
    tower = {"model_type": "qwen2_5_vl_vision", "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
             "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 56}  # fmt: skip
    images = Qwen2VLImageProcessorPil(size=PATCHES, patch_size=14)
    return qwen_like("HyperCLOVAXVisionV2", transformers.HyperCLOVAXVisionV2Processor, images,
                     lambda tokenizer: text(tokenizer, "hyperclovax"), tower)  # fmt: skip


def lfm3_vl():
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "patch_size": 16, "layer_types": ["conv", "full_attention"]}  # fmt: skip
    images = Qwen2VLImageProcessorPil(size=PATCHES, patch_size=16)
    kinds = ["conv", "sliding_attention", "conv", "full_attention"]
    return qwen_like("Lfm3Vl", transformers.Lfm3VlProcessor, images,
                     lambda tokenizer: text(tokenizer, "lfm3", num_hidden_layers=4, layer_types=kinds,
                                            sliding_window=24), tower, projector_hidden_size=64)  # fmt: skip


def cosmos3_omni():
    images = Qwen2VLImageProcessorPil(size=PATCHES, patch_size=16)
    return qwen_like("Cosmos3Omni", transformers.Qwen3VLProcessor, images, interleaved,
                     TOWER3 | {"deepstack_visual_indexes": [0, 1]})  # fmt: skip


def interleaved(tokenizer, **more):
    """Words of a decoder with Qwen3-VL's positions."""
    return untyped(text(tokenizer, rope_parameters=MROPE | {"mrope_interleaved": True}, **more))


def qwen4_exp():
    images = Qwen2VLImageProcessorPil(size=PATCHES, patch_size=16)
    sparse = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
              "indexer_compress_ratio": 4}  # fmt: skip
    layers = STATES | {"layer_types": ["linear_attention", "indexed_attention"] * 2}
    return qwen_like("Qwen4Exp", transformers.Qwen3VLProcessor, images,
                     lambda tokenizer: interleaved(tokenizer, **layers, **EXPERTS, **sparse, hc_count=2, hc_lowrank=8,
                                                   shared_expert_intermediate_size=32), TOWER3)  # fmt: skip


def cosmos3_edge():
    images = Cosmos3EdgeImageProcessorPil(size=PATCHES)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "patch_size": 16, "num_patches": 16}  # fmt: skip
    return qwen_like("Cosmos3Edge", transformers.Cosmos3EdgeProcessor, images,
                     lambda tokenizer: untyped(text(tokenizer, rope_parameters=MROPE)), tower,
                     projector_hidden_size=64)  # fmt: skip


def video_llama_3():
    images = VideoLlama3ImageProcessorPil(size=PATCHES, patch_size=14, merge_size=2)
    tower = untyped(vision(patch=14))
    tower.pop("image_size")
    return qwen_like("VideoLlama3", transformers.VideoLlama3Processor, images,
                     lambda tokenizer: text(tokenizer, "qwen2"), tower)  # fmt: skip


def paddleocr_vl():
    images = PaddleOCRVLImageProcessorPil(size=PATCHES)
    return qwen_like("PaddleOCRVL", lambda images, tokenizer, _, **more: transformers.PaddleOCRVLProcessor(
                         images, tokenizer, **more), images,
                     lambda tokenizer: untyped(text(tokenizer, rope_parameters=MROPE)), untyped(vision()))  # fmt: skip


def omni(name, config_name, processor_name, patch, tower, words, hearing):
    """The part of an omni model that looks and listens; images are read as by Qwen-VL."""
    marks = QWEN_MARKS | {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>",
                          "audio_eos_token": "<|audio_eos|>", "vision_bos_token": "<|vision_bos|>",
                          "vision_eos_token": "<|vision_eos|>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], bos=None, eos="<|im_end|>", pad="<|endoftext|>", **marks)
    parts = {"video_processor": None, "tokenizer": tokenizer,
             "feature_extractor": transformers.WhisperFeatureExtractor(),
             "image_processor": Qwen2VLImageProcessorPil(size=PATCHES, patch_size=patch)}  # fmt: skip
    chat = template("<|vision_bos|><|image_pad|><|vision_eos|>", "<|im_start|>user\n", "", "<|im_end|>\n")
    processor = without_videos(getattr(transformers, processor_name), **parts, chat_template=chat)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("image", "video", "audio")}
    suffix = "index" if "2_5" in name else "id"
    config = getattr(transformers, config_name)(
        vision_config=tower, text_config=words(tokenizer), audio_config=hearing,
        **{f"{kind}_token_{suffix}": number for kind, number in ids.items()},
        vision_start_token_id=tokenizer.vision_bos_token_id,
    )  # fmt: skip
    return made(getattr(transformers, name), config), processor


HEARING = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 64}


def qwen2_5_omni_thinker():
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
             "fullatt_block_indexes": [1], "window_size": 56}  # fmt: skip
    words = lambda tokenizer: untyped(text(tokenizer, rope_parameters=MROPE))  # noqa: E731
    return omni("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen2_5OmniThinkerConfig", "Qwen2_5OmniProcessor", 14,
                tower, words, HEARING)  # fmt: skip


def qwen3_omni_moe_thinker():
    words = lambda tokenizer: interleaved(tokenizer, **EXPERTS)  # noqa: E731
    return omni("Qwen3OmniMoeThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerConfig", "Qwen3OmniMoeProcessor",
                16, TOWER3 | {"deepstack_visual_indexes": [0, 1]}, words,
                HEARING | {"downsample_hidden_size": 8})  # fmt: skip


def glm_like(name, image_processor, words, tower, config=None, processor=None):
    """A model that GLM-4.6V's processor goes with."""
    tokenizer = make_tokenizer([GENERAL], **GLM_MARKS)
    processor = without_videos(
        processor or transformers.Glm46VProcessor, image_processor, tokenizer, None,
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )  # fmt: skip
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "image_size": 112, "patch_size": 14,
             "out_hidden_size": 64, "intermediate_size": 64}  # fmt: skip
    config = getattr(transformers, f"{config or name}Config")(
        text_config=words(tokenizer), vision_config=sizes | tower, **ids_of(tokenizer, GLM_MARKS)
    )
    return made(getattr(transformers, f"{name}ForConditionalGeneration"), config), processor


def glm_words(tokenizer, **more):
    return untyped(text(tokenizer, rope_parameters=MROPE | {"partial_rotary_factor": 1.0}, **more))


def glm4v_moe():
    return glm_like(
        "Glm4vMoe", Glm46VImageProcessorPil(size=FRAMES), lambda tokenizer: glm_words(tokenizer, **ROUTED), {}
    )


def glm_ocr():
    return glm_like("GlmOcr", Glm46VImageProcessorPil(size=FRAMES), glm_words, {})


def glmga():
    words = lambda tokenizer: glm_words(tokenizer) | {"model_type": "glm4v_text"}  # noqa: E731
    return glm_like(
        "Glm46V", GlmgaImageProcessorPil(size=FRAMES), words, {"model_type": "glm4v_vision"}, config="Glmga"
    )


def glm5_next():
    """Its decoder has states in most layers, and attends to the best few tokens only in the others."""

    def words(tokenizer):
        return untyped(text(
            tokenizer, num_hidden_layers=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, v_head_dim=16,
            qk_nope_head_dim=16, index_topk=32, index_head_dim=16, index_n_heads=2, index_kpool=4, linear_head_dim=16,
            linear_num_heads=4, hc_mult=2, head_dim=0, mlp_layer_types=["dense", "dense", "sparse", "sparse"],
            layer_types=["linear_attention", "indexed_attention"] * 2, indexer_types=["full"] * 4, **ROUTED,
        ))  # fmt: skip

    images = Glm5NextImageProcessorPil(min_image_tokens=4, max_image_tokens=20)
    return glm_like("Glm5Next", images, words, {"projection_intermediate_size": 64},
                    processor=transformers.Glm5NextProcessor)  # fmt: skip


def ernie4_5_vl_moe():
    """An image's tokens, and the marks around them, go to experts of their own."""
    marks = {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
             "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
             "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], **marks)
    processor = without_videos(
        transformers.Ernie4_5_VLMoeProcessor, Ernie4_5_VLMoeImageProcessorPil(size=PATCHES), tokenizer, None,
        chat_template=template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    )  # fmt: skip
    words = untyped(text(tokenizer, rope_parameters=MROPE | {"mrope_section": [3, 3, 2]}, moe_k=2, moe_num_experts=4,
                         moe_intermediate_size=[32, 16], moe_num_shared_experts=1))  # fmt: skip
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
    return model_of("Ernie4_5_VLMoe", text_config=words, vision_config=tower, **ids_of(tokenizer, marks)), processor


def cohere_compass():
    marks = {"image_token": "<|IMAGE_PAD|>", "video_token": "<|VIDEO_PAD|>", "vision_start_token": "<|VISION_START|>",
             "vision_end_token": "<|VISION_END|>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], **marks)
    images = CohereCompassImageProcessorPil(size=PATCHES, patch_size=16)
    processor = without_videos(
        transformers.CohereCompassProcessor, images, tokenizer, None,
        chat_template=template("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"),
    )  # fmt: skip
    rope = dict.fromkeys(WINDOWS["layer_types"], MROPE | {"mrope_interleaved": True})
    words = untyped(text(tokenizer, rope_parameters=rope, **WINDOWS))
    tower = TOWER3 | {"deepstack_visual_indexes": [0, 1]}
    return model_of("CohereCompass", text_config=words, vision_config=tower, **ids_of(tokenizer, marks)), processor


def dots3_note():
    marks = {"image_token": "<|imgpad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_comp_pad|>"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    images = Qwen2VLImageProcessorPil(size=PATCHES, patch_size=14, temporal_patch_size=1)
    parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None, "feature_extractor": None}
    processor = without_videos(transformers.Dots3NoteProcessor, **parts, chat_template=template("<|imgpad|>"))
    words = untyped(text(
        tokenizer, index_topk=32, index_head_dim=16, index_n_heads=2, sliding_window=24,
        layer_types=["indexed_attention"] * 3, mlp_layer_types=["dense", "sparse", "sparse"],
        shared_experts_intermediate_size=32, **COMPRESSED, **ROUTED,
    ))  # fmt: skip
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "adapter_in_dim": 32, "adapter_out_dim": 64, "mlp_layer_types": ["dense", "dense"]}  # fmt: skip
    hearing = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
               "adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 8}  # fmt: skip
    return model_of("Dots3Note", text_config=words, vision_config=tower, audio_config=hearing,
                    **ids_of(tokenizer, marks)), processor  # fmt: skip


def hunyuan_vl():
    """Rows of tokens with a further one behind each, and one at either end."""
    marks = {"image_token": "<image>", "image_start_token": "<im_start>", "image_end_token": "<im_end>",
             "image_newline_token": "<im_newline>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], **marks)
    processor = transformers.HunYuanVLProcessor(
        HunYuanVLImageProcessorPil(size=PATCHES, patch_size=16), tokenizer,
        chat_template=template("<im_start><image><im_end>"),
    )  # fmt: skip
    words = untyped(text(tokenizer, rope_parameters=PLAIN_ROPE | {"mrope_section": [2, 2, 2, 2]}))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "out_hidden_size": 64, "text_hidden_size": 64, "patch_size": 16, "max_image_size": 128}  # fmt: skip
    return model_of("HunYuanVL", text_config=words, vision_config=tower, image_token_id=tokenizer.image_token_id,
                    im_start_id=tokenizer.image_start_token_id, im_end_id=tokenizer.image_end_token_id,
                    im_newline_id=tokenizer.image_newline_token_id), processor  # fmt: skip


GEMMA_MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
               "boa_token": "<boa>", "eoa_token": "<eoa>", "audio_token": "<audio_soft_token>",
               "video_token": "<|video|>"}  # fmt: skip
GEMMA_CHAT = template("<image_soft_token>")


def gemma4_parts(image_processor, listener):
    tokenizer = make_tokenizer([GENERAL], **GEMMA_MARKS)
    return tokenizer, {"feature_extractor": listener(), "tokenizer": tokenizer, "video_processor": None,
                       "image_processor": image_processor(patch_size=4, max_soft_tokens=70)}  # fmt: skip


def gemma4_words(tokenizer, kind):
    return text(
        tokenizer, kind, num_hidden_layers=4, sliding_window=24, use_bidirectional_attention="vision",
        layer_types=["sliding_attention", "full_attention"] * 2, global_head_dim=16, num_global_key_value_heads=2,
    )  # fmt: skip


def gemma4_ids(tokenizer):
    return {name: number for name, number in ids_of(tokenizer, GEMMA_MARKS).items() if name != "eoa_token_id"}


def gemma4():
    tokenizer, parts = gemma4_parts(Gemma4ImageProcessorPil, transformers.Gemma4AudioFeatureExtractor)
    processor = without_videos(transformers.Gemma4Processor, **parts, chat_template=GEMMA_CHAT)
    words = gemma4_words(tokenizer, "gemma4_text")
    words |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": len(tokenizer)}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 64}  # fmt: skip
    return model_of("Gemma4", text_config=words, vision_config=tower, audio_config=None,
                    **gemma4_ids(tokenizer)), processor  # fmt: skip


# ------------------------------------------------------------------------------------------------- overview and tiles
def llava_next_video(side=28, patch=7):
    tokenizer = make_tokenizer([GENERAL], image_token="<image>", video_token="<video>")
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    images = LlavaNextImageProcessorPil(size=square(side), crop_size=square(side), image_grid_pinpoints=pinpoints)
    processor = without_videos(
        transformers.LlavaNextVideoProcessor, None, images, tokenizer, patch_size=patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=template("<image>"),
    )  # fmt: skip
    return model_of(
        "LlavaNextVideo", vision_config=vision(side=side, patch=patch), text_config=text(tokenizer),
        image_token_index=tokenizer.image_token_id, video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
    ), processor  # fmt: skip


def granite4_vision(side=64, patch=8):
    """Its vision features reach the decoder in several layers, and not at all in its embeddings."""
    tokenizer = make_tokenizer([GENERAL], image_token="<image>")
    pinpoints = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    images = LlavaNextImageProcessorPil(size=square(side), crop_size=square(side), image_grid_pinpoints=pinpoints)
    processor = transformers.Granite4VisionProcessor(
        images, tokenizer, patch_size=patch, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        downsample_rate="2/4", chat_template=template("<image>"),
    )  # fmt: skip
    tower = vision(side=side, patch=patch, hidden_size=64, num_hidden_layers=3)
    words = untyped(text(tokenizer, num_hidden_layers=6, attention_multiplier=0.25))
    return model_of(
        "Granite4Vision", vision_config=tower, text_config=words, image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints, downsample_rate="2/4", deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_target_layers=[2, 3, 4, 5], qformer_config={"intermediate_size": 64},
    ), processor  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- rows
def lighton_ocr():
    marks = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    processor = transformers.LightOnOcrProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 84}, patch_size=square(7)), tokenizer, patch_size=7,
        chat_template=template("<|image_pad|>"),
    )  # fmt: skip
    tower = vision("pixtral", 84, 7, head_dim=16)
    return model_of("LightOnOcr", vision_config=tower, text_config=text(tokenizer, "qwen3"),
                    image_token_id=tokenizer.image_token_id), processor  # fmt: skip


def mistral_large4():
    """Its decoder attends to the best few tokens only."""
    marks = {"image_mark": "[IMG]", "break_mark": "[IMG_BREAK]", "end_mark": "[IMG_END]"}
    tokenizer = make_tokenizer([GENERAL], **marks)
    images = PixtralImageProcessorPil(size={"longest_edge": 84}, patch_size=square(7))
    processor = pixtral_processor()(
        images, tokenizer, patch_size=7, spatial_merge_size=2, chat_template=template("[IMG]")
    )
    words = untyped(text(tokenizer, index_topk=32, index_head_dim=16, index_n_heads=2, **COMPRESSED, **ROUTED))
    words.pop("q_lora_rank")
    return model_of("MistralLarge4", text_config=words, vision_config=vision("pixtral", 84, 7, head_dim=16),
                    image_token_index=tokenizer.image_mark_id), processor  # fmt: skip


def fuyu():
    tokenizer = make_tokenizer([GENERAL], image_token="|SPEAKER|", newline_token="|NEWLINE|", answer_token="<0x04>")
    images = FuyuImageProcessorPil(size=square(160), patch_size=square(10))
    processor = transformers.FuyuProcessor(images, tokenizer)
    processor.chat_template = template("|SPEAKER|", "", "", "")
    words = text(tokenizer, "persimmon", num_key_value_heads=4)
    config = transformers.FuyuConfig(
        text_config=words, patch_size=10, image_size=160, image_token_id=tokenizer.image_token_id
    )
    return made(transformers.FuyuForCausalLM, config), processor


# ------------------------------------------------------------------------------------------------ need torchvision
def kimi_k25():
    """Its decoder is DeepSeek-V3's: keys and values are kept compressed."""
    marks = {"image_token": "<|media_pad|>", "video_token": "<|video|>", "vision_start_token": "<|media_begin|>",
             "vision_end_token": "<|media_end|>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], **marks)
    processor = without_videos(
        transformers.Kimi_K25Processor, transformers.Kimi_K25ImageProcessor(max_patches=80), tokenizer, None,
        chat_template=template("<|media_begin|><|media_pad|><|media_end|>"),
    )  # fmt: skip
    words = text(tokenizer, "deepseek_v3", **COMPRESSED, **ROUTED, n_group=1, topk_group=1, first_k_dense_replace=1)
    words["head_dim"] = words["qk_rope_head_dim"]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "pos_emb_height": 8, "pos_emb_width": 8}  # fmt: skip
    return model_of("Kimi_K25", text_config=words, vision_config=tower, projection_hidden_size=32,
                    **ids_of(tokenizer, marks)), processor  # fmt: skip


def gemma4_unified():
    """A token is a patch, without a tower."""
    images, listener = transformers.Gemma4UnifiedImageProcessor, transformers.Gemma4UnifiedAudioFeatureExtractor
    tokenizer, parts = gemma4_parts(images, listener)
    processor = without_videos(transformers.Gemma4UnifiedProcessor, **parts, chat_template=GEMMA_CHAT)
    words = gemma4_words(tokenizer, "gemma4_unified_text")
    seeing = {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 32, "output_proj_dims": 64}
    return model_of("Gemma4Unified", text_config=words, vision_config=seeing, audio_config=None,
                    **gemma4_ids(tokenizer)), processor  # fmt: skip


def muse(name, between, **more):
    marks = {"image_token": "<|patch|>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
             "video_token": "<|video|>", "audio_token": "<|audio|>"}  # fmt: skip
    tokenizer = make_tokenizer([GENERAL], **marks)
    parts = {"image_processor": transformers.MuseGlimmerImageProcessor(max_image_tokens=20), "video_processor": None,
             "tokenizer": tokenizer} | ({"feature_extractor": None} if name == "MuseSpark" else {})  # fmt: skip
    processor = without_videos(getattr(transformers, f"{name}Processor"), **parts, chat_template=template("<|patch|>"))
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64}  # fmt: skip
    words = untyped(text(tokenizer, **WINDOWS, **(ROUTED_AS_LLAMA if name == "MuseSpark" else {})))
    return model_of(name, text_config=words, vision_config=tower, out_hidden_size=128, projector_hidden_size=between,
                    image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
                    **(more if name == "MuseGlimmer" else more | {"audio_token_id": tokenizer.audio_token_id}),
                    ), processor  # fmt: skip


def muse_glimmer():
    return muse("MuseGlimmer", between=96)  # with 64, chance makes rows that rounding changes in the fifth digit


def muse_spark():
    hearing = {"patch_sizes": [16, 6], "hidden_sizes": [8, 16], "depths": [1, 1], "num_hidden_layers": 2,
               "out_hidden_size": 64}  # fmt: skip
    return muse("MuseSpark", between=64, audio_config=hearing)


RASTERS = {build.__name__: build for build in (
    video_llava, deepseek_vl, deepseek_vl_hybrid, janus, got_ocr2, exaone4_5, hyperclovax_vision_v2, lfm3_vl,
    cosmos3_omni, qwen4_exp, cosmos3_edge, video_llama_3, paddleocr_vl, qwen2_5_omni_thinker, qwen3_omni_moe_thinker,
    glm4v_moe, glm_ocr, glmga, glm5_next, ernie4_5_vl_moe, cohere_compass, hunyuan_vl, gemma4,
    llava_next_video, granite4_vision, lighton_ocr,
)}  # fmt: skip
WITH_TORCHVISION = {build.__name__: build for build in (
    gemma3n, fast_vlm, kimi_k25, gemma4_unified, muse_glimmer, muse_spark,
)}  # fmt: skip
# What does not hold: `vicrop check` says so, and none of them is ever answered for.
NOT_CARRIED = {build.__name__: build for build in (dots3_note, fuyu, mistral_large4)}
