"""Importance maps on disk, compact and without pickles: `NAME.maps.npz` beside a result file (`run.py --save_maps`).

    maps = read_maps("data/results/llava_tiny-demo-rel_att.maps.npz")
    att_map, region = maps[record["id"]]

A saved map is (att_map, region): (h, w) float32, row 0 at the top, and the xyxy pixels of the image that it covers. Its
cells are kept as float16 shares of the largest one: none is off by more than 0.05 % of that, in a tiny or a huge map.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from vicrop.layouts import Region

SavedMap = tuple[np.ndarray, Region]


def _scaled(att_map: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """(float16 cells, float32 scale): the map is their product."""
    scale = np.abs(att_map).max() or np.float32(1)
    return (att_map / scale).astype("<f2"), np.float32(scale)


def packed(att_map: np.ndarray, region: Region) -> dict[str, Any]:
    """A saved map as a dict for JSON."""
    cells, scale = _scaled(np.asarray(att_map, dtype=np.float32))
    text = base64.b64encode(cells.tobytes()).decode("ascii")
    return {"shape": list(cells.shape), "region": list(map(int, region)), "scale": float(scale), "float16": text}


def unpacked(pack: dict[str, Any]) -> SavedMap:
    """(att_map, region) of a `packed` one."""
    cells = np.frombuffer(base64.b64decode(pack["float16"]), dtype="<f2").astype(np.float32)
    return cells.reshape(pack["shape"]) * np.float32(pack["scale"]), tuple(pack["region"])


def write_maps(path: str | Path, maps: Mapping[int | str, SavedMap]) -> None:
    """Write {record id: (att_map, region)}, at least one, to an `.npz` file."""
    cells, scales = zip(*(_scaled(att_map) for att_map, _ in maps.values()), strict=True)
    np.savez_compressed(
        path,
        ids=np.array([json.dumps(key) for key in maps]),
        shapes=np.array([each.shape for each in cells]),
        regions=np.array([region for _, region in maps.values()]),
        scales=np.array(scales),
        cells=np.concatenate([each.ravel() for each in cells]),  # of all maps, one after the other
    )


def read_maps(path: str | Path) -> dict[int | str, SavedMap]:
    """{record id: (att_map, region)} of such a file.

    Raises:
        FileNotFoundError, ValueError: there is none; it is something else, or broken.
    """
    names = ("ids", "shapes", "regions", "scales", "cells")
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, shapes, regions, scales, cells = (file[name] for name in names)
    except FileNotFoundError:
        raise
    except Exception as error:  # a torn or foreign file may raise anything
        raise ValueError(f"{path} holds no saved maps: {error}") from error
    flat = np.split(cells.astype(np.float32), np.cumsum(shapes.prod(1))[:-1])
    return {
        json.loads(str(key)): (part.reshape(shape) * scale, cast(Region, tuple(map(int, region))))
        for key, part, shape, region, scale in zip(ids, flat, shapes, regions, scales, strict=True)
    }
