"""The files of localization heads: their names, and attention in both directions. No model in here.

Of a sample there are `<id>.npz` (or `.pkl.gz`) and `<id>_meta.json`, and what its attention has given: FOUND, PICTURES.
Each is written under another name first and then renamed.
"""

import gzip
import hashlib
import json
import logging
import pickle
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np

from vicrop.files import atomic_path, write_atomically

ENDINGS = {"npz": ".npz", "pkl": ".pkl.gz"}  # format -> of its attention files
FOUND, PICTURES = ("_bbox.json", "_analysis.json", "_mask.png"), ("_topK.png", "_heads.png")
NAME_BYTES = 180  # of an id in a file's name: file systems allow 255, of which an ending and `atomic_path` take some

log = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------------------- names
def safe_id(key):
    """An id as part of a file's name; different ids stay different, long ones by a hash."""
    name = quote(str(key), safe=" ", errors="surrogatepass")
    if name.startswith("."):  # hidden files are others' business
        name = "%2E" + name[1:]
    if len(name) > NAME_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name[: NAME_BYTES - 1 - len(digest)]}-{digest}"
    return name


def safe_model(name):
    """A checkpoint's name as a folder's."""
    return re.sub(r"[^\w.-]+", "_", str(name)).strip("_")


def stem_of(attention_file):
    """The path of an attention file without its ending, to which those of its sample's other files are added."""
    for ending in ENDINGS.values():
        if str(attention_file).endswith(ending):
            return Path(str(attention_file).removesuffix(ending))
    raise ValueError(f"{attention_file} is no attention file: those end in {' or '.join(ENDINGS.values())}")


def beside(stem, ending):
    """The path of a sample's file: `stem` is its folder and id (OUT/model/7), `ending` as in _bbox.json."""
    return Path(f"{stem}{ending}")


def forget(stem, endings):
    """Delete those of a sample's files that are there."""
    for ending in endings:
        beside(stem, ending).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- attention
def map_shape(meta):
    """(h, w) of the map's cells, from `patch_size`: the side, or both where they differ."""
    size = meta["patch_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def as_maps(attn, meta):
    """(layers, heads, h, w) view of stored attention [L, H, 1, V]."""
    h, w = map_shape(meta)
    return attn.reshape(*attn.shape[:2], h, w)


def write_npz(stem, attn, meta, compress):
    """OUT/id.npz: `attn`, and `meta` as a JSON text, so that nothing in it has to be unpickled."""
    with atomic_path(beside(stem, ".npz")) as temporary:
        (np.savez_compressed if compress else np.savez)(temporary, attn=attn, meta=np.array(json.dumps(meta)))


def write_pkl(stem, attn, meta, compress):
    """OUT/id.pkl.gz: a gzipped pickle of {"attn", "meta"}."""
    with atomic_path(beside(stem, ".pkl.gz")) as temporary:
        temporary.write_bytes(gzip.compress(pickle.dumps({"attn": attn, "meta": meta}), 6 if compress else 0))


WRITERS = {"npz": write_npz, "pkl": write_pkl}


def write_attention(stem, attn, meta, how):
    """Store attention [L, H, 1, V] and its meta; returns the file. `how` is a config.AttentionStorage.

    What was made of other attention under this name is deleted.
    """
    others = [ending for name, ending in ENDINGS.items() if name != how.format.name]
    # First: a kill must leave nothing that passes for this sample's.
    forget(stem, ["_meta.json", "_meta.pkl", *others, *FOUND, *PICTURES])
    meta = meta | {"attn_dtype": how.dtype.name}
    WRITERS[how.format.name](stem, attn.astype(how.dtype.name), meta, how.compress)
    if how.keep_meta_pickle:
        with atomic_path(beside(stem, "_meta.pkl")) as temporary:
            temporary.write_bytes(pickle.dumps(meta))
    write_atomically(beside(stem, "_meta.json"), meta)
    return attention_file(stem)


def attention_file(stem):
    """The attention file of a sample, or None."""
    return next((path for path in (beside(stem, ending) for ending in ENDINGS.values()) if path.is_file()), None)


def read_attention(path):
    """(attn [L, H, 1, V], meta) of an attention file. A pickle may run code while it is read: that is said first.

    Raises:
        FileNotFoundError, ValueError: no such file; it is no attention file, or broken.
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


def attention_files(folder):
    """The attention files of a folder, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with attention files")
    found = sorted(path for ending in ENDINGS.values() for path in folder.glob(f"[!.]*{ending}"))
    if not found:
        raise FileNotFoundError(f"no attention file ({', '.join(ENDINGS.values())}) in {folder}")
    return found
