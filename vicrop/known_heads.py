"""Which localization heads are known of a model: those of its row in info.MODELS, given ones, or those of a file."""

import os
import warnings
from collections.abc import Collection
from pathlib import Path

from vicrop.checkpoints import local_or_hub
from vicrop.files import read_json
from vicrop.heads import Head, parse_heads
from vicrop.tables import MODELS, PER_SAMPLE, checkpoint_of


def heads_of(name: str, model_id: str | Path | None = None, given: str | Path | None = None) -> list[Head] | None:
    """The localization heads that loc_att reads: [(layer, head)], or None for the best ones of each image.

    Args:
        name, model_id: as for `load_model`.
        given: "L14H24,L14H13", a file that `localization.pipeline stage=batch_analyze` has written, or PER_SAMPLE.
            None: those of info.MODELS, if it is that very checkpoint; another one has other heads.
    """
    row = MODELS.get(name, {})
    if given is None:
        own = Path(local_or_hub(name)) == Path(local_or_hub(name, model_id))
        given = row.get("loc_heads", PER_SAMPLE) if own else PER_SAMPLE
    if given == PER_SAMPLE:
        return None
    if Path(given).suffix == ".json" or os.path.isfile(given):  # os.path's takes texts that no file name could be
        given = heads_of_file(given, {checkpoint_of(name), checkpoint_of(str(model_id))})
    return parse_heads(str(given))


def heads_of_file(path: str | Path, names: Collection[str]) -> str:
    """ "L14H24,L14H13" of a file of `batch_analyze`; warns if it is about a checkpoint that is none of these."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path} with localization heads")
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("heads"), str):
        raise ValueError(f"{path} is no localization_heads.json of localization.pipeline stage=batch_analyze")
    if checkpoint_of(str(found.get("model"))) not in names:
        warnings.warn(f"{path} has the heads of {found.get('model')}: another model has other heads", stacklevel=3)
    return found["heads"]
