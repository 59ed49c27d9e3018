"""What ViCrop costs, against the published way of computing it and against the two answers alone.

    python -m benchmarks.vicrop --shape small [--method rel_att] [--tokens 4 20] [--batch_size 1] [--device cuda]

(a) reference: as published: every pass on its own, eager attention, all attention matrices, all logits, autograd at
    work and weights not frozen, one question at a time;
(a') separate: the same passes with SDPA, of the attention only the rows that are needed, and all questions together;
(b) two answers: stock `generate` about the image, and about image and crop; nothing is found out;
(c) ours: both answers and the map; the first answer is a draft of the second (of random weights it is no good one). So
    three ways more: with no draft; with the very answer that will come out, computed beforehand; with a wrong one.
Weights are random (but for --shape tiny), and every answer has a forced length. Each round runs all ways one after the
other, every second round in the opposite order; medians and quartiles, of ratios those of the rounds. A ratio is left
out whose quartiles are further apart than it is from 1: on a busy machine it would say nothing.

    python -m benchmarks.vicrop --agreement data/results/*-rel_att.json     # how often drafts are confirmed, really
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.utils import logging as transformers_logging

from benchmarks.shapes import GROUPS, QUESTIONS, SHAPES, TINY, build
from vicrop import session as session_module
from vicrop.attention import capture_attention, replaced
from vicrop.attribution import edge_mask
from vicrop.boxes import bbox_in_region
from vicrop.crop import QuestionBatch, model_module
from vicrop.decoding import Decoding
from vicrop.prefix_cache import PrefixStore, Row, on_top_of
from vicrop.session import ImageSession, Read
from vicrop.tables import GENERAL_PROMPT


class Trial:
    """A model of some shape, pictures and questions, and the four ways."""

    def __init__(self, shape, method, device, tokens, batch_size):
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        family, self.model, self.processor = build(shape, device, dtype)
        self.method, self.tokens = method, tokens
        self.bound = getattr(model_module(family), method).bind(self.model)
        rng = np.random.default_rng(0)
        coarse = [Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)) for _ in range(batch_size)]
        self.images = [image.resize((640, 480), Image.Resampling.BICUBIC) for image in coarse]
        self.questions = [QUESTIONS[number % 2] for number in range(batch_size)]
        self.layers, self.known = self.bound.layers(self.model), {}
        session_module.end_tokens = lambda *_, **__: [-1]
        for model in (self.model, getattr(self.model, "language_model", None)):
            if hasattr(model, "generation_config"):
                model.generation_config.eos_token_id = None

    def ours(self, drafts=None):
        """Boxes by the toolkit's way, with both answers; `drafts` in the place of the first answers."""
        return [found.bbox for found in self.asked(drafts)[0]]

    def asked(self, drafts=None):
        """([CropResult], the tokens of the answers with crop)."""
        count = len(self.images)
        batch = QuestionBatch(self.session(self.images), self.questions, range(count), [None] * count, [{}] * count)
        originals = batch.original_answers({self.method: self.bound})
        if drafts is not None:
            originals = [answer._replace(tokens=draft) for answer, draft in zip(originals, drafts, strict=True)]
        results = batch.results(self.bound, originals)
        return results, [batch.with_crops[number, found.bboxes].tokens for number, found in enumerate(results)]

    def no_draft(self):
        return self.ours([()] * len(self.images))

    def draft_accepted(self):
        return self.ours(self.right)

    def draft_rejected(self):
        return self.ours([rejected(draft) for draft in self.right])

    @property
    def right(self):
        """The tokens of the answers with crop, computed once for each length."""
        if self.tokens not in self.known:
            self.known[self.tokens] = self.asked([()] * len(self.images))[1]
        return self.known[self.tokens]

    def session(self, images):
        """A fresh session: nothing is shared with another."""
        return ImageSession(images, self.model, self.processor, self.tokens)

    def answers(self, images, questions, crops=None):
        """Stock `generate` for a batch of images, or of images and crops."""
        with torch.inference_mode():
            return Stock(self.session(images), questions, crops).generate(self.tokens)

    def two_answers(self):
        """Nothing but both answers; the crop is the middle of the image."""
        crops = [image.crop((200, 120, 440, 360)) for image in self.images]
        return self.answers(self.images, self.questions), self.answers(self.images, self.questions, crops)

    def by_parts(self, images, questions, reading):
        """Boxes with both answers, every pass on its own."""
        self.answers(images, questions)
        session = self.session(images)
        with torch.enable_grad() if reading is all_softmaxes else session.frozen.frozen_eval():
            maps = FORMULAS[self.method](session, questions, self.layers, reading)
        boxes = [bbox_in_region(att_map.detach().float().cpu().numpy(), layout.region, image.size,
                                session.adapter.bbox_size)
                 for att_map, layout, image in zip(maps, session.layouts, images, strict=True)]  # fmt: skip
        self.answers(images, questions, [image.crop(box) for image, box in zip(images, boxes, strict=True)])
        return boxes

    def separate(self):
        return self.by_parts(self.images, self.questions, needed_rows)

    def reference(self):
        found = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        pairs = zip(self.images, self.questions, strict=True)
        boxes = [self.by_parts([image], [question], all_softmaxes)[0] for image, question in pairs]
        self.model.set_attn_implementation(found)
        return boxes


def rejected(right):
    """A draft whose first token is wrong, of the answer that will come out."""
    return (WRONG + (right[0] == WRONG), *right[1:])


class Stock:
    """The inputs of `generate` for a batch of questions, as a user of transformers would build them."""

    def __init__(self, session, questions, crops=None):
        self.session, self.model, adapter = session, session.model, session.adapter
        self.prompts, self.shown = [adapter.prompt(question) for question in questions], [session.inputs]
        layouts = [session.layouts]
        if crops is not None:
            prepared = adapter.preprocess(crops)
            self.shown.append(adapter.placed(prepared))
            layouts.append(adapter.layouts(prepared, [crop.size for crop in crops]))
        owned = zip(*layouts, strict=True)
        rows = [adapter.tokenize(prompt, own) for prompt, own in zip(self.prompts, owned, strict=True)]
        width, pad = max(map(len, rows)), session.processor.tokenizer.pad_token_id
        self.ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
        self.ids = self.ids.to(session.device)
        self.mask = (self.ids != pad).long()

    def pixels(self):
        """The vision inputs of all images, in the order in which the prompts name them."""
        merged = {}
        for name in self.shown[0]:
            parts = [inputs[name].unflatten(0, (len(self.ids), -1)) for inputs in self.shown]
            merged[name] = torch.cat(parts, 1).flatten(0, 1)
        return merged

    def generate(self, tokens):
        limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        if self.session.adapter.connector:  # for two images, the Q-Former's outputs one after the other
            embeds, image = self.model.get_input_embeddings()(self.ids), self.ids == self.model.config.image_token_id
            asked = [self.session.adapter.qformer_inputs(prompt, self.ids.device) for prompt in self.prompts]
            asked = {name: torch.cat([each[name] for each in asked]) for name in asked[0]}
            features = [self.model.get_image_features(**inputs, **asked).pooler_output for inputs in self.shown]
            embeds = embeds.masked_scatter(image[..., None], torch.cat(features, 1).to(embeds.dtype))
            return self.model.language_model.generate(inputs_embeds=embeds, attention_mask=self.mask, **limits)
        inputs = {"input_ids": self.ids, "attention_mask": self.mask, **self.pixels()}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (self.ids == self.model.config.image_token_id).int()
        return self.model.generate(**inputs, **limits)


def read_modules(session, layers):
    """(models, attention modules) of the decoder that a map is made of."""
    return [session.decoder], [session.attention_modules[layer] for layer in layers]


@contextmanager
def all_softmaxes(session, layers, graph):
    """{attention module: its whole softmax}, of every layer: what `output_attentions` of an eager model holds."""
    kept, (_, modules) = {}, read_modules(session, session.attention_modules)
    hooks = [m.register_forward_hook(lambda module, _, output: kept.__setitem__(module, output[1])) for m in modules]
    yield kept
    for hook in hooks:
        hook.remove()


@contextmanager
def needed_rows(session, layers, graph):
    """{attention module: its last row's softmax} of the layers that are read."""
    models, modules = read_modules(session, layers)
    with capture_attention(models, modules, graph=graph, leaf=session.adapter.connector is None) as captured:
        yield captured.probs


def whole_pass(session, texts, reading, layers=(), graph=False, images=None):
    """(v, {module: attention}, queries, Read) of one pass over images and texts, nothing shared, nothing cached."""
    queries = session.queries([session.adapter.prompt(text) for text in texts])
    images = images or session.encode(session.inputs, session.layouts)
    calls = [session.decoder_call(query, [images[query.image_index]], graph=graph) for query in queries]
    rows = [Row(None, call) for call in calls]
    cache, shifts = PrefixStore(session.decoder).begin(rows, len(session.decoder.layers))
    with reading(session, layers, graph) if layers else nullcontext({}) as found:
        if reading is all_softmaxes:  # one question, as the model is loaded: eager
            output = session.decoder(**calls[0].arguments() | on_top_of(cache.cache, session.decoder))
        else:
            output = cache.extend(session.decoder, calls)
    hidden = output.last_hidden_state if reading is all_softmaxes else output.last_hidden_state[:, -1:]
    v = session.model.get_output_embeddings()(hidden)[:, -1].float().log_softmax(-1).amax(-1)
    return v, found, queries, Read(output, cache, rows, shifts)


def separate_rel_att(session, questions, layers, reading):
    maps = []
    for texts in (questions, [GENERAL_PROMPT] * len(questions)):
        _, found, queries, read = whole_pass(session, texts, reading, layers)
        found = {module: each.float() for module, each in found.items()}  # eager attention is in the weights' dtype
        maps.append([att_map.mean((0, 1)) for att_map in session.maps(found, layers, queries, read)])
    return [specific / general for specific, general in zip(*maps, strict=True)]


def separate_grad_att(session, questions, layers, reading):
    with torch.enable_grad():
        v, found, queries, read = whole_pass(session, questions, reading, layers, graph=True)
        modules = [session.attention_modules[layer] for layer in layers]
        through = [row.rest.through for row in read.rows if row.rest.through is not None]
        probs = [*(found[module] for module in modules), *through]
        gradients = torch.autograd.grad(v.sum(), probs)
    weighted = [(each * gradient.relu()).float() for each, gradient in zip(probs, gradients, strict=True)]
    rows, through = dict(zip(modules, weighted, strict=False)), weighted[len(modules) :]
    return [att_map.mean((0, 1)) for att_map in session.maps(rows, layers, queries, read, through or None)]


def separate_pure_grad(session, questions, layers, reading):
    """Image by image, as a graph of a whole pass is kept."""
    return [pure_grad_map(session.only(number), question, reading) for number, question in enumerate(questions)]


def pure_grad_map(session, question, reading):
    norms, (layout,) = [], session.layouts
    for text in (question, GENERAL_PROMPT):
        with torch.enable_grad():
            pixels = session.inputs["pixel_values"].detach().clone().requires_grad_()
            images = session.encode({**session.inputs, "pixel_values": pixels}, session.layouts)
            v, *_ = whole_pass(session, [text], reading, images=images)
            gradient = torch.autograd.grad(v.sum(), pixels)[0]
        norms.append(session.adapter.canvas(gradient.float(), session.inputs, layout).sum(0).norm(dim=0))
    masked, (h, w) = norms[0] / norms[1] * edge_mask(session).to(norms[0].device), layout.grid
    return masked.reshape(h, masked.shape[0] // h, w, -1).mean((1, 3))


FORMULAS = {"rel_att": separate_rel_att, "grad_att": separate_grad_att, "pure_grad": separate_pure_grad}
WAYS = {
    "reference": Trial.reference,
    "separate": Trial.separate,
    "two answers": Trial.two_answers,
    "ours": Trial.ours,
    "no draft": Trial.no_draft,
    "draft accepted": Trial.draft_accepted,
    "draft rejected": Trial.draft_rejected,
}
WRONG = 300  # a token that is no special one: a draft is cut at those
BASES = "two answers", "no draft"  # what the others are divided by


def count_work(trial, way):
    """(images encoded, tokens read by the language model before and between answers' own steps) of one way."""
    images, tokens = [], []
    vision_side = trial.session(trial.images[:1]).adapter.vision

    def vision(args, kwargs):
        grids = kwargs.get("grid_thw")
        images.append(len(grids) if grids is not None else len(next(iter([*args, *kwargs.values()]))))

    def text(args, kwargs):
        embeds = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        tokens.append(embeds.shape[0] * embeds.shape[1] if embeds.shape[1] > 1 else 0)

    decoder = trial.model.get_decoder()
    with passed(vision_side, vision), passed(decoder, text):
        way(trial)
    return sum(images) / len(trial.images), sum(tokens) / len(trial.images)


@contextmanager
def passed(module, see):
    """`see(args, kwargs)` is called for each forward pass of a module; not where another stands in for it."""
    forward = module.forward

    def seen(*args, **kwargs):
        see(args, kwargs)
        return forward(*args, **kwargs)

    with replaced(module, "forward", seen):
        yield


def timed(trial, way):
    cuda = trial.model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    way(trial)
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(trial.images)


def peak_memory(name, **same):
    """Bytes above the weights: on a GPU as the allocator counts, on a CPU the resident set of a process of its own."""
    options = [str(part) for option, value in same.items() for part in (f"--{option}", value)]
    command = [sys.executable, "-m", "benchmarks.vicrop", *options, "--peak_of", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_peak(trial, way):
    if trial.model.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way(trial)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted anew from here
        way(trial)
        print(resident("VmHWM") - before)


def resident(what):
    """Bytes of this process's resident set: now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def compare(shape, args):
    """Time the ways for a shape and print a row for each."""
    same = {name: getattr(args, name) for name in ("method", "device", "batch_size")}
    trial = Trial(shape, tokens=args.tokens[0], **same)
    if trial.reference() != trial.ours():
        print(f"note: the boxes of (a) and (c) differ for {shape}", file=sys.stderr)
    parameters = sum(parameter.numel() for parameter in trial.model.parameters()) / 1e6
    for trial.tokens in args.tokens:
        if not confirmed(trial):
            print(f"note: the draft of {shape} holds a special token, and is confirmed only in part", file=sys.stderr)
        changed = sum(one != other for one, other in zip(trial.right, trial.asked(trial.right)[1], strict=True))
        if changed:  # none in float32; in bfloat16 rounding may decide between two tokens
            print(f"note: a draft changed {changed} of {len(trial.right)} answers of {shape}", file=sys.stderr)
        rounds = []
        for number in range(args.rounds):
            names = args.ways[:: -1 if number % 2 else 1]
            rounds.append({name: timed(trial, WAYS[name]) for name in names})
        for name, way in ((name, WAYS[name]) for name in args.ways):
            low, middle, high = statistics.quantiles([each[name] for each in rounds], n=4)
            ratios = [ratio_of([each[name] / each[base] for each in rounds]) if base in args.ways else "-"
                      for base in BASES]  # fmt: skip
            images, tokens = count_work(trial, way)
            row = [f"{shape}, {parameters:.0f} M", trial.tokens, name, f"{middle:.3f} ({low:.3f} to {high:.3f})",
                   *ratios, f"{images:.0f}", f"{tokens:.0f}"]  # fmt: skip
            if not args.no_memory:
                row.append(f"{peak_memory(name, shape=shape, tokens=trial.tokens, **same) / 1e6:.0f}")
            print("|", *(f"{cell} |" for cell in row), flush=True)


def ratio_of(ratios):
    """A median with quartiles; nothing where these are further apart than the median is from 1."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})" if high - low <= abs(middle - 1) else "-"


def confirmed(trial):
    """Does the draft that is right save all decoding steps of the answer with crop?"""
    steps, add, right = [], Decoding.add, trial.right
    with replaced(Decoding, "add", lambda self, scores: steps.append(None) or add(self, scores)):
        trial.ours(right)
    return len(steps) < trial.tokens  # those of the first answer


def print_agreement(paths):
    """Of result files the share of questions with one answer, without and with crop: their draft was confirmed."""
    for path in paths:
        records = [record for record in json.loads(Path(path).read_text()) if "error" not in record]
        same = sum(record["original_answer"] == record["crop_answer"] for record in records)
        print(f"{Path(path).stem}: {100 * same / len(records):.1f} % of {len(records)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=[*GROUPS, *TINY, *SHAPES], default="small", help="tiny and small are three models each")
    add("--method", choices=FORMULAS, default="rel_att")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch_size", type=int, default=1, help="questions asked together, but for the reference: it has no batches")
    add("--tokens", type=int, nargs="+", default=[4, 20], help="lengths of every answer")
    add("--rounds", type=int, default=5)
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="only these, in this order")
    add("--no_memory", action="store_true", help="do not measure peak memory (a process for each way)")
    add("--peak_of", choices=WAYS, help=argparse.SUPPRESS)
    add("--agreement", nargs="+", metavar="FILE", help="nothing but how often both answers of result files agree")
    args = parser.parse_args()
    if args.agreement:
        print_agreement(args.agreement)
        return
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds} is not at least 2: there are quartiles to tell")
    transformers_logging.disable_progress_bar()
    if args.peak_of:
        print_peak(Trial(args.shape, args.method, args.device, args.tokens[0], args.batch_size), WAYS[args.peak_of])
        return
    print(f"{args.method}, batch {args.batch_size}, {args.device}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}\n")  # fmt: skip
    columns = [
        "shape",
        "tokens",
        "way",
        "s per question",
        *(f"/ {base}" for base in BASES),
        "images encoded",
        "tokens prefilled",
    ]
    columns += [] if args.no_memory else ["peak MB"]
    print("|", *(f"{column} |" for column in columns))
    print("|" + "---|" * len(columns))
    for shape in GROUPS.get(args.shape, [args.shape]):
        compare(shape, args)


if __name__ == "__main__":
    main()
