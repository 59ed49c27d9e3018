"""A small model of the same kind as a checkpoint: its own config with few layers, and random weights that matter.

In bfloat16 the stock model's own rounding may be as large as a lost mask, so what is exact is shown on such a twin.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

LAYERS = 4  # of the decoder, at least; more where its kinds of layers, or deepstack features, need them
TOWER_LAYERS = 4
WIDTHS = {"intermediate_size": 256, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
OF_DECODER_WIDTH = ("out_hidden_size", "projection_dim", "text_hidden_size")
NEIGHBOURS = 0.1  # weights of a depthwise convolution beside its middle, in those of the middle
KEPT_LAYERS = (-1, -2, None)  # numbers of the tower's layer that features are of, which do not depend on its depth


def small_twin(
    config: PreTrainedConfig, model_class: Any = AutoModelForImageTextToText, **size: Any
) -> PreTrainedModel:
    """A float32 model on the CPU with a small version of a config and random weights; the config stays as it is.

    Args:
        model_class: a class of transformers, or AutoModelForImageTextToText.
        size: narrow=False keeps the decoder as wide as it is.
    """
    small = smaller(copy.deepcopy(config), **size)
    if model_class is AutoModelForImageTextToText:
        model_class = AutoModelForImageTextToText._model_mapping[type(config)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        return vivid(model_class._from_config(small, dtype=torch.float32))
    finally:
        torch.set_rng_state(state)


def smaller(config: Any, narrow: bool = True) -> Any:
    """A config with fewer layers and, unless it is told otherwise, with a narrower decoder."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    if vision is not None and vision is not text:
        _shorten_tower(config, vision)
    deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    _shorten(text, max(LAYERS, deepstack + 1))
    if narrow:
        _narrow(config, text)
    for name, most in WIDTHS.items() if narrow else ():
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, min(getattr(text, name), most))
    return config


def _shorten(text: Any, wanted: int) -> None:
    """Fewer layers, of each kind some, in the order in which the config has them."""
    depth, kinds = text.num_hidden_layers, list(getattr(text, "layer_types", None) or ())
    if depth <= wanted:
        return
    firsts = [number for number, kind in enumerate(kinds) if kinds[:number].count(kind) < 2]  # two of each kind
    others = [number for number in range(depth) if number not in firsts]
    numbers = sorted([*firsts, *others[: max(0, wanted - len(firsts))]])
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:  # a value for each layer
            setattr(text, name, [value[number] for number in numbers])
    text.num_hidden_layers = len(numbers)


def _shorten_tower(config: Any, vision: Any) -> None:
    """Fewer layers of the vision tower, where nothing else depends on their number."""
    name = next((each for each in ("num_hidden_layers", "depth") if isinstance(getattr(vision, each, None), int)), None)
    parts = [config, *(getattr(config, each, None) for each in config.sub_configs)]
    layers = [getattr(part, "vision_feature_layer", None) for part in parts]
    if name is None or getattr(vision, name) <= TOWER_LAYERS:
        return
    if any(isinstance(layer, (list, tuple)) or layer not in KEPT_LAYERS for layer in layers):
        return
    behind = [number for key, number in vars(vision).items() if key.endswith("layer_id")]  # a layer before something
    depth, fewer = getattr(vision, name), max([TOWER_LAYERS, *(number + 2 for number in behind if number is not None)])
    for key, value in vars(vision).items():
        numbers = isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value)
        if numbers and "index" in key and max(value) < depth:  # layers of which something is special
            fewer = max(fewer, len(value) + 1)
            setattr(vision, key, list(range(len(value))))
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            return
    setattr(vision, name, min(depth, fewer))


def _narrow(config: Any, text: Any) -> None:
    """A decoder with few heads; what hands it features follows."""
    heads, width = text.num_attention_heads, text.hidden_size
    groups = getattr(text, "num_key_value_heads", None) or heads
    fewer = 2 if groups > 2 else 1
    if heads % groups or width % heads or heads == 1:
        return
    text.head_dim = getattr(text, "head_dim", None) or width // heads
    text.num_attention_heads = heads // groups * fewer
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = fewer
    text.hidden_size = width // heads * text.num_attention_heads
    parts = [getattr(config, name, None) for name in config.sub_configs]
    for part, names in [(config, ("hidden_size", *OF_DECODER_WIDTH)), *((part, OF_DECODER_WIDTH) for part in parts)]:
        for name in names:
            if part is not text and getattr(part, name, None) == width:
                setattr(part, name, text.hidden_size)


def vivid(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights with which everything matters: matrices keep the size of what passes them."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        spread = _spread(name, weight)
        if spread is not None:
            weight.data.normal_(0, spread, generator=generator)
            keep_near(weight)
        elif any(part in name for part in ("lambda", "gamma", "layer_scale")):
            weight.data.fill_(0.5)
    return model.eval()


def keep_near(weight: torch.Tensor) -> None:
    """A convolution of each channel by itself mostly looks at its own place, as trained ones do."""
    side = weight.shape[-1]
    if weight.dim() == 4 and weight.shape[1] == 1 and side % 2 and side > 1:
        own = weight.data[..., side // 2, side // 2] * side  # as large as what passes
        weight.data.mul_(NEIGHBOURS)
        weight.data[..., side // 2, side // 2] = own


SPREADS: tuple[tuple[tuple[str, ...], Callable[[float], float]], ...] = (
    (("position_embed", "pos_embed"), lambda fan: 0.3),
    (("embed", "newline", "query_tokens"), lambda fan: 1.0),
    (("q_proj", "k_proj", "qkv", ".query", ".key"), lambda fan: 1.6 * fan**-0.5),  # far from even attention
    (("",), lambda fan: fan**-0.5),
)


def _spread(name: str, weight: torch.Tensor) -> float | None:
    """The standard deviation of a parameter's values; None: it stays as it is."""
    if weight.dim() < 2:
        return {"bias": 0.05, "newline": 1.0}.get(next((each for each in ("newline", "bias") if each in name), ""))
    if "norm" in name or "bias_table" in name:
        return None
    fan = weight.shape[-1] if weight.dim() == 2 else weight[0].numel()
    return next(spread(fan) for parts, spread in SPREADS if any(part in name for part in parts))
