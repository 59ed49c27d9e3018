"""The files of localization heads: their names, and how attention is written and read. Needs no model.

A sample has `<id>.npz` (or `.pkl.gz`) and `<id>_meta.json`, and the files that are made from its attention, with the
endings FOUND and PICTURES. Each file is first written under another name and then renamed.
"""

import gzip
import hashlib
import json
import logging
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from vicrop.files import atomic_path, write_atomically
from vicrop.localization.config import AttentionStorage

Meta = dict[str, Any]  # where attention comes from and how to read it, ready for JSON (see Collector.collect)
Stored = tuple[np.ndarray, Meta]  # attention [L, H, 1, V]: layers, heads, one text token, cells of the map
ENDINGS = {"npz": ".npz", "pkl": ".pkl.gz"}  # format -> the ending of its attention files
FOUND, PICTURES = ("_bbox.json", "_analysis.json", "_mask.png"), ("_topK.png", "_heads.png")
NAME_BYTES = 180  # of an id in a file's name: file systems allow 255, and the ending and `atomic_path` add some

log = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------------------- names
def safe_id(key: Any) -> str:
    """An id as part of a file's name; different ids get different names, long ones end in a hash."""
    name = quote(str(key), safe=" ", errors="surrogatepass")
    if name.startswith("."):  # else the file would be hidden
        name = "%2E" + name[1:]
    if len(name) > NAME_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name[: NAME_BYTES - 1 - len(digest)]}-{digest}"
    return name


def safe_model(name: str) -> str:
    """The name of a checkpoint as a folder's name."""
    return re.sub(r"[^\w.-]+", "_", str(name)).strip("_")


def stem_of(attention_file: str | Path) -> Path:
    """The path of an attention file without its ending; the sample's other files add their endings to it."""
    for ending in ENDINGS.values():
        if str(attention_file).endswith(ending):
            return Path(str(attention_file).removesuffix(ending))
    raise ValueError(f"{attention_file} is no attention file: those end in {' or '.join(ENDINGS.values())}")


def beside(stem: Path, ending: str) -> Path:
    """The path of a sample's file: `stem` is its folder and id (OUT/model/7), `ending` as in _bbox.json."""
    return Path(f"{stem}{ending}")


def forget(stem: Path, endings: Sequence[str]) -> None:
    """Delete the files of a sample with these endings, if they exist."""
    for ending in endings:
        beside(stem, ending).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- attention
def map_shape(meta: Meta) -> tuple[int, int]:
    """(h, w), the number of a map's cells, from `patch_size`: one number, or two if they differ."""
    size = meta["patch_size"]
    h, w = (size, size) if isinstance(size, int) else size
    return h, w


def as_maps(attn: np.ndarray, meta: Meta) -> np.ndarray:
    """(layers, heads, h, w) view of stored attention [L, H, 1, V]."""
    h, w = map_shape(meta)
    return attn.reshape(*attn.shape[:2], h, w)


def write_npz(stem: Path, attn: np.ndarray, meta: Meta, compress: bool) -> None:
    """Write OUT/id.npz: `attn`, and `meta` as a JSON text, so that reading it never unpickles anything."""
    with atomic_path(beside(stem, ".npz")) as temporary:
        (np.savez_compressed if compress else np.savez)(temporary, attn=attn, meta=np.array(json.dumps(meta)))


def write_pkl(stem: Path, attn: np.ndarray, meta: Meta, compress: bool) -> None:
    """Write OUT/id.pkl.gz: a gzipped pickle of {"attn", "meta"}."""
    with atomic_path(beside(stem, ".pkl.gz")) as temporary:
        temporary.write_bytes(gzip.compress(pickle.dumps({"attn": attn, "meta": meta}), 6 if compress else 0))


WRITERS = {"npz": write_npz, "pkl": write_pkl}


def write_attention(stem: Path, attn: np.ndarray, meta: Meta, how: AttentionStorage) -> Path:
    """Store attention [L, H, 1, V] and its meta; returns the file.

    Files that were made from earlier attention of this sample are deleted.
    """
    others = [ending for name, ending in ENDINGS.items() if name != how.format.name]
    # Deleted first: after a kill, no old file may seem to belong to the new attention.
    forget(stem, ["_meta.json", "_meta.pkl", *others, *FOUND, *PICTURES])
    meta = meta | {"attn_dtype": how.dtype.name}
    WRITERS[how.format.name](stem, attn.astype(how.dtype.name), meta, how.compress)
    if how.keep_meta_pickle:
        with atomic_path(beside(stem, "_meta.pkl")) as temporary:
            temporary.write_bytes(pickle.dumps(meta))
    write_atomically(beside(stem, "_meta.json"), meta)
    return written_file(stem, how)


def written_file(stem: Path, how: AttentionStorage) -> Path:
    """The attention file of a sample that `write_attention` writes."""
    return beside(stem, ENDINGS[how.format.name])


def attention_file(stem: Path) -> Path | None:
    """The attention file of a sample, or None."""
    return next((path for path in (beside(stem, ending) for ending in ENDINGS.values()) if path.is_file()), None)


def read_attention(path: str | Path) -> Stored:
    """(attn [L, H, 1, V], meta) of an attention file. Reading a pickle may run code: a warning comes first.

    Raises:
        FileNotFoundError, ValueError: there is no such file; it is no attention file, or a broken one.
    """
    path = Path(path)
    stem_of(path)
    if not path.is_file():
        raise FileNotFoundError(f"no attention file at {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                attn, meta = file["attn"], json.loads(str(file["meta"]))
        else:
            log.warning("%s is a pickle: reading it can run code, so read only those that you have made", path)
            with gzip.open(path) as file:
                stored = pickle.load(file)
            attn, meta = stored["attn"], stored["meta"]
        h, w = map_shape(meta)
    except Exception as error:  # a torn or foreign file may raise anything
        raise ValueError(f"{path} is no attention file of this toolkit: {type(error).__name__}: {error}") from error
    if attn.ndim != 4 or attn.shape[2:] != (1, h * w):
        raise ValueError(f"{path} holds attention of shape {attn.shape}, and its meta is about [L, H, 1, {h * w}]")
    return attn, meta


def attention_files(folder: str | Path) -> list[Path]:
    """The attention files of a folder, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with attention files")
    found = sorted(path for ending in ENDINGS.values() for path in folder.glob(f"[!.]*{ending}"))
    if not found:
        raise FileNotFoundError(f"no attention file ({', '.join(ENDINGS.values())}) in {folder}")
    return found
