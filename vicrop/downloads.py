"""How much a model's download is, said before it begins; the hub's own bars then say how long it takes."""

import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.utils import enable_progress_bars

from vicrop.command_line import gigabytes

ENDINGS = (".safetensors", ".bin")  # of weights: transformers takes the first kind that there is


def show_hub_bars() -> None:
    """Have the hub show its bars, unless the environment forbids them."""
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


def say_download(
    hub_id: str, weights: tuple[str, ...], revision: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Print how large the weights of a hub id are, if the cache has none of them.

    Where the hub cannot be asked, nothing is said: the download itself then says what is wrong.

    Args:
        weights: names of files, of which the cache has one if it has the weights.
    """
    where = {"cache_dir": cache_dir, "revision": revision}
    if constants.HF_HUB_OFFLINE or any(isinstance(try_to_load_from_cache(hub_id, name, **where), str)
                                       for name in weights):  # fmt: skip
        return
    try:
        files = HfApi().model_info(hub_id, revision=revision, files_metadata=True).siblings or []
    except (OSError, ValueError):
        return
    sizes = [[file.size or 0 for file in files if file.rfilename.endswith(ending) and "/" not in file.rfilename]
             for ending in ENDINGS]  # fmt: skip
    total = sum(next(filter(None, sizes), []))
    print(f"{hub_id}: {gigabytes(total)} of weights to download, once, into {cache_dir or constants.HF_HUB_CACHE}",
          file=sys.stderr)  # fmt: skip
