"""What it costs to prepare a prompt, beside the question: ids, features in their places, positions, masks.

    python -m benchmarks.front [--image_tokens 4000] [--device cuda]

A Qwen2.5-VL of random weights is shown an image of so many tokens. Prepared are the question, the general prompt, and
the prompt with the crop; the share is that of a whole question (both answers and the map of rel_att).
"""

import argparse
import statistics
import time
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from benchmarks.shapes import build
from vicrop.attention import replaced
from vicrop.crop import QuestionBatch, model_module
from vicrop.prefix_cache import PrefixStore
from vicrop.session import ImageSession

TOKEN_SIDE = 28  # pixels


@contextmanager
def timing(owner, name, spent: list):
    """Seconds of each call of a class's method, added to a list."""
    method = getattr(owner, name)

    def timed(*args, **kwargs):
        synchronize()
        began = time.perf_counter()
        found = method(*args, **kwargs)
        synchronize()
        spent.append(time.perf_counter() - began)
        return found

    with replaced(owner, name, timed):
        yield


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def question(model, processor, image, method, pixels: int) -> tuple[float, float]:
    """(seconds of preparing prompts, seconds of the question)."""
    front: list[float] = []
    synchronize()
    began = time.perf_counter()
    session = ImageSession([image], model, processor, max_new_tokens=4, max_pixels=pixels)
    batch = QuestionBatch(session, ["what number is on the red sign?"])
    with timing(ImageSession, "decoder_call", front), timing(PrefixStore, "row", front):
        batch.results(method, batch.original_answers({"rel_att": method}))
    synchronize()
    return sum(front), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_tokens", type=int, default=4000)
    parser.add_argument("--shape", default="qwen2.5-vl-small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dtype = torch.bfloat16 if "cuda" in args.device else torch.float32
    family, model, processor = build(args.shape, args.device, dtype)
    side = round(args.image_tokens**0.5) * TOKEN_SIDE
    pixels = np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    method = model_module(family).rel_att.bind(model)
    question(model, processor, image, method, side**2)
    rounds = [question(model, processor, image, method, side**2) for _ in range(args.rounds)]
    front, whole = (statistics.median(each) for each in zip(*rounds, strict=True))
    share = statistics.median(each / total for each, total in rounds)
    print(f"{args.shape}, {(side // TOKEN_SIDE) ** 2} image tokens, {args.device}: prompts {1000 * front:.0f} ms "
          f"of a question's {1000 * whole:.0f} ms, {100 * share:.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
