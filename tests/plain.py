"""The plain computation of every map: stock processor, stock forward, eager attention everywhere, full backward.

Nothing of `attention.py` or of the method modules is used here.
"""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from vicrop.edges import edge_mask
from vicrop.qwen_input import resize_to_multiple


class Plain:
    """One eager forward of the processor's own inputs, everything in the graph: `pixels`, `probs` by module, `v`."""

    def __init__(self, model, processor, images, prompt):
        self.model, self.processor = model, processor
        found, self.probs = model.config._attn_implementation, {}
        model.set_attn_implementation("eager")
        keep = lambda module, _, output: self.probs.__setitem__(module, output[1])  # noqa: E731
        hooks = [module.register_forward_hook(keep) for module in self.watched()]
        self.inputs = self.prepare(images, prompt)
        floating = self.inputs["pixel_values"].to(model.device, model.dtype)
        self.pixels = floating.requires_grad_()
        rest = {name: value.to(model.device) for name, value in self.inputs.items() if name != "pixel_values"}
        self.logits = model(pixel_values=self.pixels, **rest).logits[0, -1].float()
        self.v = self.logits.log_softmax(-1).max()
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(found)

    def decoder_modules(self):
        return [layer.self_attn for layer in self.model.get_decoder().layers]

    watched = decoder_modules

    def prepare(self, images, prompt):
        return self.processor(images=images, text=prompt, return_tensors="pt")

    def rows(self, probs, layer):
        """(heads, rows, tokens): every row over the image's map tokens."""
        return probs[self.decoder_modules()[layer]][0][..., self.map_tokens()].float()

    def st(self, probs, layer):
        """(heads, tokens): the last row."""
        return self.rows(probs, layer)[:, -1]

    def map_tokens(self):
        return self.inputs["input_ids"][0] == self.model.config.image_token_id

    def map_of(self, probs, layer):
        """(h, w) head-mean of softmax probabilities, or of anything of their shapes."""
        return self.placed(probs, self.st(probs, layer).mean(0))

    def placed(self, probs, row):
        """(h, w) of a row (tokens,)."""
        return self.grid(row)

    def picture(self, values):
        """(H, W, 3) of values laid out as pixel_values, copies summed."""
        return values[0].permute(1, 2, 0)

    copies = 1


class PlainLlava(Plain):
    def map_tokens(self):
        at = super().map_tokens().nonzero()[:, 0]
        return at[1:] if self.model.config.vision_feature_select_strategy == "full" else at

    def grid(self, tokens):
        side = int(len(tokens) ** 0.5)
        return tokens.unflatten(0, (side, side))

    cell = property(lambda self: self.model.config.vision_config.patch_size)


class PlainLlavaNext(PlainLlava):
    def layout(self):
        """(tile rows, tile columns, unpadded h, w) by the model's definition, in cells."""
        height, width = self.inputs["image_sizes"][0].tolist()
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        best, most = None, None
        for high, wide in self.model.config.image_grid_pinpoints:
            scale = min(wide / width, high / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            waste = high * wide - effective
            if most is None or (effective, -waste) > most:
                best, most = (high // vision.image_size, wide // vision.image_size), (effective, -waste)
        rows, columns = best
        h, w = rows * side, columns * side
        if width / height > w / h:
            h -= 2 * ((h - int(round(height * w / width, 7))) // 2)
        else:
            w -= 2 * ((w - int(round(width * h / height, 7))) // 2)
        return rows, columns, h, w

    def map_tokens(self):
        vision = self.model.config.vision_config
        return Plain.map_tokens(self).nonzero()[(vision.image_size // vision.patch_size) ** 2 :, 0]

    def grid(self, tokens):
        *_, h, w = self.layout()
        assert len(tokens) == h * (w + 1)
        return torch.stack([tokens[row * (w + 1) : row * (w + 1) + w] for row in range(h)])

    def picture(self, values):
        rows, columns, h, w = self.layout()
        lines = [torch.cat(list(values[0, 1 + row * columns : 1 + (row + 1) * columns]), -1) for row in range(rows)]
        whole = torch.cat(lines, 1)
        top, left = (whole.shape[1] - h * self.cell) // 2, (whole.shape[2] - w * self.cell) // 2
        return whole[:, top : whole.shape[1] - top, left : whole.shape[2] - left].permute(1, 2, 0)


class PlainBlip(Plain):
    qformer_layer = 4  # the third with cross-attention

    def cross(self):
        return self.model.qformer.encoder.layer[self.qformer_layer].crossattention.attention

    def watched(self):
        return [self.cross(), *self.decoder_modules()]

    def placed(self, probs, row):
        through = probs[self.cross()][0].float().mean(0)[:, 1:]
        side = int(through.shape[1] ** 0.5)
        return (row @ through).unflatten(0, (side, side))

    cell = 14


class PlainQwen(Plain):
    copies, cell = 2, 28

    def prepare(self, images, prompt):
        images = [resize_to_multiple(image, 28) for image in (images if isinstance(images, list) else [images])]
        inputs = self.processor(images=images, text=[prompt], return_tensors="pt")
        assert "mm_token_type_ids" in inputs
        return inputs

    def grid(self, tokens):
        _, high, wide = self.inputs["image_grid_thw"][0].tolist()
        return tokens.unflatten(0, (high // 2, wide // 2))

    def picture(self, values):
        """Where each number of a patch comes from is found by patchifying an image of pixel numbers."""
        _, high, wide = self.inputs["image_grid_thw"][0].tolist()
        numbers = np.arange(3 * high * 14 * wide * 14, dtype=np.float64).reshape(3, high * 14, wide * 14)
        where, *_ = self.processor.image_processor.patchify(numbers, 14, 2, 2)
        picture = torch.zeros(numbers.size, dtype=torch.float64)
        picture.index_add_(0, torch.from_numpy(where.reshape(-1).astype(np.int64)), values.flatten().double())
        return picture.reshape(numbers.shape).permute(1, 2, 0).float()


PLAIN_KINDS = {"llava": PlainLlava, "llava_next": PlainLlavaNext, "blip": PlainBlip, "qwen2_5": PlainQwen}


def rel_att(kind, model, processor, image, prompt, general, layers):
    asked, other = (kind(model, processor, image, text) for text in (prompt, general))
    maps = [asked.map_of(asked.probs, layer) / other.map_of(other.probs, layer) for layer in layers]
    return torch.stack(maps).mean(0).detach().numpy()


def grad_att(kind, model, processor, image, prompt, general, layers):
    plain = kind(model, processor, image, prompt)
    gradients = torch.autograd.grad(plain.v, list(plain.probs.values()))
    weighted = {module: plain.probs[module] * g.relu() for module, g in zip(plain.probs, gradients, strict=True)}
    return torch.stack([plain.map_of(weighted, layer) for layer in layers]).mean(0).detach().numpy()


def pure_grad(kind, model, processor, image, prompt, general, layers):
    norms = []
    for text in (prompt, general):
        plain = kind(model, processor, image, text)
        norms.append(plain.picture(torch.autograd.grad(plain.v, plain.pixels)[0].float()).norm(dim=-1))
    settings = processor.image_processor
    shown = plain.picture(plain.pixels.detach().float()).numpy() / plain.copies * settings.image_std
    mask = torch.from_numpy(edge_mask(shown + np.array(settings.image_mean)))
    return F.avg_pool2d(((norms[0] / norms[1]) * mask)[None].float(), plain.cell)[0].numpy()


def loc_att(kind, model, processor, image, prompt, general, heads):
    plain = kind(model, processor, image, prompt)
    maps = [plain.placed(plain.probs, plain.st(plain.probs, layer)[head]) for layer, head in heads]
    return sum(gaussian_filter(att_map.detach().double().numpy(), 1, truncate=3) for att_map in maps)


def own_tokens(ids, others):
    """Which tokens of a prompt, counted from its end, another one has not as well, at its beginning or end."""
    start, end = 0, len(ids)
    while ids[start] == others[start]:
        start += 1
    while ids[end - 1] == others[end - 1 - len(ids)]:
        end -= 1
    return slice(start - len(ids), end - len(ids) or None)


def question_att(kind, model, processor, image, prompt, general, layers):
    rows = own_tokens(*(processor.tokenizer(text).input_ids for text in (prompt, general)))
    plain = kind(model, processor, image, prompt)
    maps = [plain.placed(plain.probs, plain.rows(plain.probs, layer)[:, rows].mean((0, 1))) for layer in layers]
    return torch.stack(maps).mean(0).detach().numpy()


PLAIN = {
    "rel_att": rel_att, "grad_att": grad_att, "pure_grad": pure_grad, "loc_att": loc_att, "question_att": question_att,
}  # fmt: skip
