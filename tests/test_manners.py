"""What the commands say: defaults in --help, one line for what is wrong, what was written, how long things take."""

import importlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from builders import photo

from vicrop import cli, downloads
from vicrop.checkpoints import quiet_libraries
from vicrop.command_line import CommandParser, gigabytes
from vicrop.evaluation import command as run
from vicrop.evaluation import score_table
from vicrop.files import ROOT
from vicrop.prepare import releases
from vicrop.tables import unknown


def said(capsys, *typed):
    """(exit code, all that it printed) of a command line of `vicrop`."""
    code = 0
    try:
        cli.main(typed)
    except SystemExit as end:
        code = end.code
    printed = "".join(capsys.readouterr())
    return code if isinstance(code, int) else 1, printed + (code if isinstance(code, str) else "")


# ---------------------------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_says_its_default(name, capsys):
    code, text = said(capsys, name, "--help")
    blocks = re.split(r"\n(?=  -)", text.partition("\noptions:\n")[2])
    silent = [each for each in blocks if not re.search(r"default|required|--help", each)]
    assert code == 0
    assert len(blocks) > 2
    assert not silent, silent
    assert "None" not in text


def test_a_default_is_said_once(capsys):
    parser = CommandParser("try", "what it does")
    parser.add_argument("--one", default=1, help="so many")
    parser.add_argument("--two", help="as many; default: as one")
    parser.add_argument("--three", action="store_true", help="more")
    parser.add_argument("--four", required=True, help="least")
    text = " ".join(parser.format_help().split())
    assert "so many (default: 1)" in text
    assert "default: as one --three more (default: no)" in text
    assert text.endswith("least (required)")


def test_the_default_methods_of_a_finding_are_its_own():
    from vicrop.findings.command import FINDINGS, parse

    for finding, methods in FINDINGS.items():
        assert ",".join(parse([finding])[1].how.names) == methods
    assert parse(["--method", "grad_att", "sizes"])[1].how.names == ("grad_att",)


# -------------------------------------------------------------------------------------------------------------- errors
PICTURE = str(ROOT / "data/demo/images/scene_00001.jpg")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (("sore",), "unknown command 'sore': did you mean score? Choose from ask, run"),
        (("run", "--model", "lava"), "unknown model 'lava': did you mean llava? Choose from llava, llava_next"),
        (("ask", PICTURE, "what?", "--model", "lava"), "unknown model 'lava': did you mean llava?"),
        (("ground", PICTURE, "a sign", "--model", "lava"), "vicrop ground: unknown model 'lava': did you mean llava?"),
        (("check", "lava"), "unknown model 'lava': did you mean llava?"),
        (("app", "--models", "lava"), "unknown model 'lava': did you mean llava?"),
        (("findings", "sizes", "--model", "lava"), "unknown model 'lava': did you mean llava?"),
        (("run", "--method", "rel_at"), "unknown method 'rel_at': did you mean rel_att?"),
        (("run", "--task", "dmo"), "'dmo': did you mean demo?"),
        (("prepare", "textvq", "--source", "."), "unknown value 'textvq': did you mean textvqa?"),
        (("prepare", "textvqa", "--sorce", "."), "unknown option '--sorce': did you mean --source?"),
        (("findings", "size"), "unknown value 'size': did you mean sizes?"),
        (("ask", PICTURE, "what?", "--modle=llava"), "unknown option '--modle': did you mean --model?"),
        (("ground", PICTURE, "a sign", "--ouut", "x"), "unknown option '--ouut': did you mean --out?"),
        (("score", "--metrc", "paper"), "unknown option '--metrc': did you mean --metric?"),
        (("ground", PICTURE, "a sign", "logic.selecton=greedy"), "'logic.selecton': did you mean logic.selection?"),
        (("ground", PICTURE, "a sign", "logic.selection=gredy"), "logic.selection: Invalid value 'gredy'"),
        (("ground", "nothere.jpg", "a sign"), "vicrop ground: no image file at"),
        (("ask", PICTURE), "required: question"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_nearest_choice(typed, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vicrop"])  # Hydra reads it
    code, text = said(capsys, *typed)
    assert code
    assert says in text
    assert len(text.strip().splitlines()) == 1


def test_a_name_that_is_like_no_other_gets_no_guess():
    assert unknown("xyz", ("one", "two"), "thing") == "unknown thing 'xyz': choose from one, two"
    assert unknown("ONE", ("one", "two"), "thing").startswith("unknown thing 'ONE': did you mean one? Choose")


# --------------------------------------------------------------------------------------------------------- run_all.sh
def shell(*arguments):
    own = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "run_all.sh", *arguments], cwd=ROOT, capture_output=True, text=True, env=own)
    return done.returncode, done.stdout, done.stderr


def test_the_script_has_a_help_of_its_own():
    for arguments in (("--help",), ("demo", "llava_tiny", "rel_att", "-h")):
        code, text, errors = shell(*arguments)
        assert (code, errors) == (0, "")
        assert text.startswith("usage: bash run_all.sh [dataset] [model] [method] [options of run.py]")
        assert "set -" not in text
        assert "#" not in text


def test_the_script_says_once_what_is_wrong():
    code, text, errors = shell("dmo")
    assert (code, text) == (2, "")
    assert errors.startswith("run_all.sh: error: ")
    assert "did you mean demo?" in errors
    assert len(errors.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- what was done
@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "images").mkdir()
    photo().save(tmp_path / "images" / "a.png")
    records = [{"id": str(n), "question": "what?", "labels": ["1"], "image_path": "a.png"} for n in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def test_a_finished_run_that_is_typed_again_says_so(dataset, capsys, monkeypatch):
    typed = ["--question_path", str(dataset / "data.json"), "--task", "demo", "--save_path", str(dataset / "out"),
             "--device", "cpu"]  # fmt: skip
    run.main(typed)
    first = capsys.readouterr().out
    monkeypatch.setattr(importlib.import_module("vicrop.evaluation.runner"), "load_chosen", None)  # would fail
    run.main(typed)
    again = capsys.readouterr().out
    path = dataset / "out" / "llava_tiny-demo-rel_att.json"
    assert first == f"{path}: 2 records\n"
    assert again == f"{path}: 2 records, complete before: 2 of 2 are answered, and nothing was loaded\n"


def test_scores_lie_beside_the_results_and_are_named(dataset, capsys, monkeypatch):
    monkeypatch.chdir(dataset)
    run.main(["--question_path", str(dataset / "data.json"), "--save_path", "out", "--device", "cpu"])
    capsys.readouterr()
    score_table.main(["--data_dir", "out", "--per_sample", "each.jsonl"])
    named = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("written: ").split(", ")
    names = ["evaluation_report.json", "evaluation_report.csv", "evaluation_report.md"]
    assert named == [*(f"out/{name}" for name in names), "each.jsonl"]
    assert all((dataset / name).is_file() for name in named)
    score_table.main(["--data_dir", "out"])  # the table itself is no result
    score_table.main(["--data_dir", "out", "--save_path", "."])
    assert all((dataset / name).is_file() for name in names)


# --------------------------------------------------------------------------------------------------- how long it takes
class Hub:
    """The hub's answer about a model."""

    files = {"model-1.safetensors": 9_000_000_000, "model-2.safetensors": 5_100_000_000, "config.json": 1000,
             "pytorch_model.bin": 14_200_000_000, "original/model.safetensors": 14_000_000_000}  # fmt: skip

    def model_info(self, hub_id, revision=None, files_metadata=False):
        assert files_metadata
        if hub_id == "no/such":
            raise OSError("not to be had")
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in self.files.items()]
        )


def test_a_download_of_weights_says_how_large_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(downloads, "HfApi", Hub)
    monkeypatch.setattr(downloads.constants, "HF_HUB_OFFLINE", False)
    downloads.say_download("some/model", ("model.safetensors",), cache_dir=tmp_path)
    assert capsys.readouterr().err == f"some/model: 14.1 GB of weights to download, once, into {tmp_path}\n"
    downloads.say_download("no/such", ("model.safetensors",), cache_dir=tmp_path)
    monkeypatch.setattr(downloads, "try_to_load_from_cache", lambda *_, **__: str(tmp_path))
    downloads.say_download("some/model", ("model.safetensors",), cache_dir=tmp_path)
    assert capsys.readouterr().err == ""


def test_commands_keep_the_bars_of_downloads():
    from huggingface_hub.utils import are_progress_bars_disabled

    quiet_libraries()
    assert not are_progress_bars_disabled()


def test_preparing_a_benchmark_says_first_what_it_will_fetch(tmp_path, capsys, monkeypatch):
    sizes = {"a.zip": 6_000_000_000, "b.json": None}
    monkeypatch.setitem(releases.DOWNLOADS, "gqa", [f"https://nowhere/{name}" for name in sizes])
    monkeypatch.setattr(releases, "size_of", lambda url: sizes[url.rsplit("/", 1)[1]])
    monkeypatch.setattr(releases, "download", lambda url, path: path)
    monkeypatch.setattr(releases, "unpack", lambda path: None)
    releases.fetch("gqa", tmp_path)
    assert capsys.readouterr().out == f"gqa: 2 files to download into {tmp_path}: 6.0 GB and 1 of unknown size\n"
    for name in sizes:
        (tmp_path / name).touch()
    releases.fetch("gqa", tmp_path)
    assert capsys.readouterr().out == ""


def test_sizes_are_said_as_people_say_them():
    assert gigabytes(14_120_000_000) == "14.1 GB"
    assert gigabytes(12_345_678) == "12.3 MB"
