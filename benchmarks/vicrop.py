"""What ViCrop costs, against the published way of computing it and against the two answers alone.

    python -m benchmarks.vicrop --shape llava-small [--method rel_att] [--tokens 4] [--batch_size 1] [--device cuda]

(a) reference: every pass on its own, eager attention, all attention matrices, as the published code does it;
(b) two answers: stock `generate` about the image, and about image and crop; nothing is found out;
(c) ours: both answers and the map.
Weights are random, and every answer has a forced length. Each round runs (a), (b), (c); medians and quartiles.
"""

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import look as look_module
from attention import undisturbed
from benchmarks.shapes import SHAPES, build
from info import GENERAL_PROMPT
from run import Case, look_class, model_module
from utils import bbox_in_region, edge_mask

QUESTIONS = ("what number is on the red sign?", "which digit is on the blue sign?")


class Trial:
    """A model of some shape, pictures and questions, and the three ways."""

    def __init__(self, args):
        dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
        family, self.model, self.processor = build(args.shape, args.device, dtype)
        self.module, self.method, self.tokens = model_module(family), args.method, args.tokens
        self.kind, self.function = look_class(self.module), getattr(self.module, args.method)
        rng = np.random.default_rng(0)
        coarse = [Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)) for _ in range(args.batch_size)]
        self.images = [image.resize((640, 480), Image.Resampling.BICUBIC) for image in coarse]
        self.questions = [QUESTIONS[number % 2] for number in range(args.batch_size)]
        self.layers = self.function.layers(self.model)
        look_module.MAX_NEW_TOKENS, look_module.end_tokens = args.tokens, lambda *_, **__: [-1]
        for model in (self.model, getattr(self.model, "language_model", None)):
            if hasattr(model, "generation_config"):
                model.generation_config.eos_token_id = None

    def ours(self):
        """Boxes by the toolkit's way, with both answers."""
        case = Case(self.kind(self.images, self.model, self.processor), self.questions, range(len(self.images)),
                    [None] * len(self.images), [{}] * len(self.images))  # fmt: skip
        originals = case.original_answers({self.method: self.function})
        return [found.bbox for found in case.findings(self.method, self.function, originals)]

    def answers(self, images, crops=None):
        """Stock `generate` for a batch of images, or of images and crops."""
        looks = self.kind(images, self.model, self.processor)
        inputs = Stock(looks, self.questions[: len(images)], crops)
        with torch.inference_mode():
            return inputs.generate(self.tokens)

    def two_answers(self):
        """Nothing but both answers; the crop is the middle of the image."""
        crops = [image.crop((200, 120, 440, 360)) for image in self.images]
        return self.answers(self.images), self.answers(self.images, crops)

    def reference(self):
        """Boxes by separate eager passes, one question at a time."""
        boxes, found = [], self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        for image, question in zip(self.images, self.questions, strict=True):
            self.answers([image])
            look = self.kind([image], self.model, self.processor)
            with undisturbed(self.model):
                att_map = REFERENCES[self.method](look, question, self.layers)
            box = bbox_in_region(att_map.float().cpu().numpy(), look.regions[0], image.size, look.bbox_size)
            self.answers([image], [image.crop(box)])
            boxes.append(box)
        self.model.set_attn_implementation(found)
        return boxes


class Stock:
    """The inputs of `generate` for a batch of questions, as a user of transformers would build them."""

    def __init__(self, look, questions, crops=None):
        self.look, self.model = look, look.model
        prompts = [look.prompt(question) for question in questions]
        shown = [look.inputs] if crops is None else [look.inputs, look.placed(look.preprocess(crops))]
        grids = [look.grids_of(inputs) for inputs in shown]
        rows = [look.tokens(prompt, [look.token_count(grid[n]) for grid in grids]) for n, prompt in enumerate(prompts)]
        width = max(map(len, rows))
        pad = look.processor.tokenizer.pad_token_id
        self.ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
        self.ids = self.ids.to(look.device)
        self.mask = (self.ids != pad).long()
        self.prompts, self.shown = prompts, shown

    def pixels(self):
        """The vision inputs of all images, in the order in which the prompts name them."""
        merged = {}
        for name in self.shown[0]:
            parts = [inputs[name].unflatten(0, (len(self.ids), -1)) for inputs in self.shown]
            merged[name] = torch.cat(parts, 1).flatten(0, 1)
        return merged

    def generate(self, tokens):
        limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        if self.model.config.model_type == "instructblip":  # for two images, the Q-Former's outputs one after the other
            embeds = self.model.get_input_embeddings()(self.ids)
            features = [torch.stack(self.look.embed(self.look.see(inputs), self.prompts)) for inputs in self.shown]
            image = (self.ids == self.model.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(image, torch.cat(features, 1).to(embeds.dtype))
            return self.model.language_model.generate(inputs_embeds=embeds, attention_mask=self.mask, **limits)
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, **self.pixels()}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (self.ids == self.model.config.image_token_id).int()
        return self.model.generate(**inputs, **limits)


@contextmanager
def all_softmaxes(look):
    """{attention module: its whole softmax}, of every attention module in the language model and the connector."""
    kept, modules = {}, list(look.attention_modules)
    if hasattr(look, "_cross"):
        modules.append(look._cross)
    hooks = [m.register_forward_hook(lambda module, _, output: kept.__setitem__(module, output[1])) for m in modules]
    yield kept
    for hook in hooks:
        hook.remove()


def whole_pass(look, question, pixels=None):
    """(softmaxes, v) of one pass over image and question, nothing shared, nothing cached."""
    asks = look.asks(look.prompt(question))
    scripts, inputs = [look.script(ask) for ask in asks], look.inputs
    inputs = inputs if pixels is None else {**inputs, "pixel_values": pixels}
    with all_softmaxes(look) as kept:
        features = [[each] for each in look.embed(look.see(inputs), [asks[0].prompt])]
        v = look._confidence(look._read_on(look._unread(scripts, features), scripts))
    return kept, v, (asks, scripts[0].stop)


def reference_rel_att(look, question, layers):
    maps = []
    for text in (question, GENERAL_PROMPT):
        kept, _, (asks, end) = whole_pass(look, text)
        maps.append(look._maps(kept, layers, asks, end)[0].mean((0, 1)))
    return maps[0] / maps[1]


def reference_grad_att(look, question, layers):
    with torch.enable_grad():
        pixels = look.inputs["pixel_values"].detach().clone().requires_grad_()  # so that every softmax has a gradient
        kept, v, (asks, end) = whole_pass(look, question, pixels)
        gradients = torch.autograd.grad(v.sum(), list(kept.values()))
    weighted = {module: kept[module] * gradient.relu() for module, gradient in zip(kept, gradients, strict=True)}
    return look._maps(weighted, layers, asks, end)[0].mean((0, 1)).detach()


def reference_pure_grad(look, question, layers):
    norms = []
    for text in (question, GENERAL_PROMPT):
        with torch.enable_grad():
            pixels = look.inputs["pixel_values"].detach().clone().requires_grad_()
            _, v, _ = whole_pass(look, text, pixels)
            gradient = torch.autograd.grad(v.sum(), pixels)[0]
        norms.append(look.canvas(gradient.float()).sum(0).norm(dim=0))
    settings, (h, w) = look.processor.image_processor, look.grids[0]
    shown = look.canvas(look.pixels)[0].permute(1, 2, 0).numpy() * settings.image_std + np.array(settings.image_mean)
    masked = norms[0] / norms[1] * torch.from_numpy(edge_mask(shown)).to(norms[0].device)
    return masked.reshape(h, masked.shape[0] // h, w, -1).mean((1, 3))


REFERENCES = {"rel_att": reference_rel_att, "grad_att": reference_grad_att, "pure_grad": reference_pure_grad}
WAYS = {"reference": Trial.reference, "two answers": Trial.two_answers, "ours": Trial.ours}


def count_work(trial, way):
    """(images encoded, tokens read by the language model before and between answers' own steps) of one way."""
    images, tokens = [], []
    look = trial.kind(trial.images[:1], trial.model, trial.processor)

    def vision(_, args, kwargs):
        grids = kwargs.get("grid_thw")
        images.append(len(grids) if grids is not None else len(next(iter([*args, *kwargs.values()]))))

    def text(_, args, kwargs):
        embeds = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        tokens.append(embeds.shape[0] * embeds.shape[1] if embeds.shape[1] > 1 else 0)

    hooks = [look.vision.register_forward_pre_hook(vision, with_kwargs=True),
             trial.model.get_decoder().register_forward_pre_hook(text, with_kwargs=True)]  # fmt: skip
    way(trial)
    for hook in hooks:
        hook.remove()
    return sum(images) / len(trial.images), sum(tokens) / len(trial.images)


def timed(trial, way):
    cuda = trial.model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way(trial)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(trial.images)


def peak_memory(args, name):
    """Bytes above the weights: on a GPU as the allocator counts, on a CPU the resident set of a process of its own."""
    same = {name: getattr(args, name) for name in ("shape", "method", "device", "tokens", "batch_size")}
    options = [str(part) for option, value in same.items() for part in (f"--{option}", value)]
    command = [sys.executable, "-m", "benchmarks.vicrop", *options, "--peak_of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(args):
    trial = Trial(args)
    if trial.model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        WAYS[args.peak_of](trial)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted anew from here
        WAYS[args.peak_of](trial)
        print(resident("VmHWM") - before)


def resident(what):
    """Bytes of this process's resident set: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llava-small")
    add("--method", choices=REFERENCES, default="rel_att")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch_size", type=int, default=1, help="questions that (b) and (c) ask together; (a) has no batches")
    add("--tokens", type=int, default=4, help="length of every answer")
    add("--rounds", type=int, default=5)
    add("--no_memory", action="store_true", help="do not measure peak memory (a process for each way)")
    add("--peak_of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args)
        return
    trial = Trial(args)
    if trial.reference() != trial.ours():
        print("note: the boxes of (a) and (c) differ", file=sys.stderr)
    rounds = [{name: timed(trial, way) for name, way in WAYS.items()} for _ in range(args.rounds)]
    parameters = sum(parameter.numel() for parameter in trial.model.parameters()) / 1e6
    where = f"{trial.model.device.type} {trial.model.dtype}, {torch.get_num_threads()} threads"
    print(f"{args.shape} ({parameters:.0f} M parameters), {args.method}, {args.tokens} new tokens, "
          f"batch {args.batch_size}, {where}")  # fmt: skip
    print("way           s per question (quartiles)   x ours   images encoded   tokens prefilled   peak memory (MB)")
    for name, way in WAYS.items():
        low, middle, high = statistics.quantiles([each[name] for each in rounds], n=4)
        ratio = statistics.median(each[name] / each["ours"] for each in rounds)
        images, tokens = count_work(trial, way)
        memory = "" if args.no_memory else f"{peak_memory(args, name) / 1e6:.0f}"
        spread = f"{middle:8.3f} ({low:.3f} to {high:.3f})"
        print(f"{name:12}  {spread}  {ratio:7.2f}  {images:15.1f}  {tokens:17.0f}  {memory:>17}")


if __name__ == "__main__":
    main()
