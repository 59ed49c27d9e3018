"""Localization heads from the command line (Hydra; conf/ holds the settings, config.py explains them).

python -m localization.pipeline stage=pipeline data.image_file=IMG data.query="the bird on the branch"
python -m localization.pipeline stage=batch data.data_file=FILE.jsonl data.process_all=true
python -m localization.pipeline stage=batch_analyze data.batch_attention_dir=outputs/localization/MODEL
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vicrop.files import patient_threads
from vicrop.localization.config import Config  # the import also registers the keys of the files under conf/
from vicrop.tables import MODELS, unknown

TEXTS = ("data.image_file", "data.query", "data.attention_file", "data.data_file", "data.output_dir",
         "data.batch_attention_dir", "model.name", "model.cache_dir", "logic.drop_sinks")  # fmt: skip
CONF = Path(__file__).parent / "conf"
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")


def as_typed(argument: str) -> str:
    """The argument, quoted if its value is a text, because a comma, an apostrophe or ${ has a meaning to Hydra.

    Left to Hydra are null, a text that is already quoted as a whole, and ${...} anywhere but in a query.
    """
    key, is_, value = argument.partition("=")
    if key.lstrip("+") not in TEXTS or value == "null" or QUOTED.fullmatch(value):
        return argument
    if key == "data.query":
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return key + is_ + QuotedString(value, Quote.double).with_quotes()


def run(config: Config) -> None:
    """Run the stage that the configuration names."""
    if config.model.cache_dir:  # the hub's library reads HF_HOME only once, when it is imported
        os.environ["HF_HOME"] = config.model.cache_dir
    patient_threads()
    from vicrop.checkpoints import quiet_libraries
    from vicrop.images import allow_pixels
    from vicrop.localization import batch, sample

    allow_pixels(config.data.max_image_pixels)
    quiet_libraries()
    stages = {
        "pipeline": sample.pipeline, "collect": sample.collect, "analyze": sample.analyze_file,
        "visualize": sample.visualize, "batch": batch.batch, "batch_analyze": batch.batch_analyze,
    }  # fmt: skip
    stages[config.stage.name](config)


def without_half_an_example(arguments: Sequence[str]) -> list[str]:
    """The arguments; if only one of image and query is given, the other is null, not that of the example in conf/."""
    pair = ("data.image_file", "data.query")
    given = [name for name in pair if any(each.startswith(f"{name}=") for each in arguments)]
    return [*arguments, *(f"{name}=null" for name in pair if len(given) == 1 and name not in given)]


def with_model_files(arguments: Sequence[str]) -> list[str]:
    """The arguments; model=NAME also takes the names of tables.MODELS, and any hub id or folder.

    Some have a file under conf/model, with settings of their own; the others are a model.name without.

    Raises:
        ValueError: a name is none of these.
    """
    own = [path.stem for path in (CONF / "model").glob("*.yaml")]
    files = {"llava": "llava15_7b", "llava_next": "llava_next_7b", "blip": "instructblip", "qwen2_5": "qwen2_5_vl_3b"}
    found = []
    for each in arguments:
        key, _, given = each.partition("=")
        name = files.get(given, given)
        if key != "model" or name in own or "," in name:  # several names are a sweep of Hydra's
            found.append(f"model={name}" if key == "model" else each)
        elif "/" in name or name in MODELS or Path(name).is_dir():
            found += ["model=any", f"model.name={name}"]
        else:
            names = dict.fromkeys([*MODELS, *sorted(own)])
            raise ValueError(f"{unknown(name, names, 'model')}, or give a hub id or a folder")
    return found


def wrong_setting(error: Exception) -> str:
    """The sentence about a setting that Hydra refuses."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and key:
        names = list(settings_in(OmegaConf.structured(Config)))
        return unknown(key, names, "setting", "vicrop/localization/config.py lists all")
    first = str(cause).splitlines()[0]
    return f"{key}: {first}" if key else first


def settings_in(node: DictConfig, above: str = "") -> Iterator[str]:
    """The full keys of all settings, such as logic.threshold.method."""
    for key in node:
        name, below = f"{above}{key}", node._get_node(key)
        if isinstance(below, DictConfig) and not below._is_none():
            yield from settings_in(below, f"{name}.")
        else:
            yield name


def main(argv: Sequence[str] | None = None, prog: str = "localization") -> None:
    """The command, with the arguments that Hydra takes; `prog` is its name in messages."""

    def job(config: DictConfig) -> None:
        try:
            run(cast(Config, OmegaConf.to_object(config)))
        except (ValueError, OSError) as error:
            sys.exit(f"{prog}: {error}")

    typed = list(sys.argv[1:] if argv is None else argv)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises what is wrong, in place of printing it with much besides
    try:
        sys.argv[1:] = [as_typed(argument) for argument in with_model_files(without_half_an_example(typed))]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"{prog}: {wrong_setting(error)}")
    except ValueError as error:
        sys.exit(f"{prog}: {error}")


if __name__ == "__main__":
    main()
