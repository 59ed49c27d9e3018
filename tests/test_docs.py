"""README and docs/ as a reader takes them: commands do what they say, options exist, links lead somewhere.

A `bash` block runs line by line on the embedded models, with small limits; each page in a folder of its own, which
has the pictures of a clone. `<!-- needs a download -->` or `<!-- long -->` stands before a block that cannot
run here: of its commands only the options are checked, by the commands' own parsers. A `python` block runs; a block
after `<!-- file NAME -->` becomes that file.
"""

import glob
import importlib
import re
import shlex
import sys

import pytest
import yaml
from matplotlib.figure import Figure

from vicrop import __version__, cli
from vicrop.files import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE = ("CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "benchmarks/README.md")
TEXTS = [*PAGES, *(ROOT / name for name in MORE), *sorted((ROOT / "vicrop/embedded").rglob("README.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<why>[^>\n]*) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
WHY_NOT = ("needs a download", "long")
OTHERS = ("pip", "lmms-eval", "source", "export", "make", "git", "python -m venv",
          ".venv/bin/python -m pytest")  # not the toolkit's  # fmt: skip
QUESTIONS = 2  # of a dataset, at most

RUN, FINDINGS, PIPELINE = "vicrop.evaluation.command", "vicrop.findings.command", "vicrop.localization.pipeline"
# Where the work of a command begins once its options are read.
WORK = {
    "vicrop.ask": ("ask",), "vicrop.evaluation.runner": ("run_task",),
    "vicrop.evaluation.score_table": ("report", "show_comparison", "show_ensemble", "show_gates"),
    "vicrop.evaluation.report": ("readable",), "vicrop.findings.sizes": ("sizes",), PIPELINE: ("run",),
    "vicrop.findings.attention": ("attention",), "vicrop.findings.layers": ("layers",),
    "vicrop.findings.overhead": ("overhead",), "vicrop.findings.kinds": ("kinds",),
    "vicrop.findings.windows": ("windows",),
    "vicrop.findings.high": ("high",), "vicrop.findings.gate": ("gate",), "vicrop.findings.budget": ("budget",),
    "vicrop.findings.heads": ("heads",), "vicrop.findings.causal": ("causal",),
    "vicrop.prepare.releases": ("fetch", "prepare"),
    "vicrop.localization.evaluate_boxes": ("evaluate",), "vicrop.localization.refcoco": ("convert",),
    "vicrop.localization.evaluate_masks": ("evaluate",), "vicrop.localization.refine": ("refine",),
    "tiny.scenes": ("write_dataset",), "tiny.sets": ("write_set",), "vicrop.app.command": ("serve",),
}  # fmt: skip
COMMANDS = [*(module for module, _ in cli.COMMANDS.values()), "vicrop.localization.evaluate_boxes",
            "vicrop.localization.refcoco", "vicrop.localization.evaluate_masks", "vicrop.localization.refine",
            "tiny.scenes", "tiny.sets"]  # fmt: skip


class OptionsAreRead(BaseException):
    """The work would begin now. No Exception: nobody shall catch it."""


def page_name(path):
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------------------ commands
def lines_of(block):
    """The command lines of a block."""
    lines = block["text"].replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def command_of(line):
    """(the module whose main it is, its arguments) of a command of the toolkit; None for one of others."""
    words = shlex.split(line, comments=True)
    words = [each for word in words for each in (sorted(glob.glob(word)) if "*" in word else [word])]
    words = [word.replace("$SLURM_ARRAY_TASK_ID", "0") for word in words]
    if words[0] == "srun":
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *words[words.index("run.py") :]]
    if words[:3] == ["python", "-m", "vicrop"]:
        words = words[2:]
    if words[0] == "vicrop":
        return cli.COMMANDS[words[1]][0], words[2:]
    if words[:2] == ["bash", "run_all.sh"]:
        return RUN, ["--task", words[2], "--model", words[3], "--method", words[4], *words[5:]]
    if words[0] == "python" and words[1].endswith(".py"):
        return behind(words[1]), words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith(("tools.", "localization.", "tiny.")):
        return behind(words[2].replace(".", "/") + ".py"), words[3:]
    assert line.startswith(OTHERS), f"what is {line!r}?"
    return None


def behind(door):
    """The module whose main a file at the top, of tools/ or of localization/ calls."""
    found = re.search(r"^from (vicrop\.\S+) import main$", (ROOT / door).read_text(), re.MULTILINE)
    return found[1] if found else door.removesuffix(".py").replace("/", ".")


def small(module, arguments):
    """The arguments, with limits."""
    if module in (RUN, FINDINGS) and "--image" not in arguments:
        return [*arguments, "--limit", str(QUESTIONS)]  # the last one counts
    if module == "tiny.scenes":
        return [*arguments, "--per_size", "2"]
    if "data.process_all=true" in arguments:
        rest = [each for each in arguments if each != "data.process_all=true"]
        return [*rest, "data.start_index=0", f"data.end_index={QUESTIONS}"]
    return arguments


def call(module, arguments, monkeypatch):
    """A command as it is typed; it must not end with an error."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    code = 0
    try:
        importlib.import_module(module).main()
    except SystemExit as end:
        code = end.code
    assert not code, f"{module} {shlex.join(arguments)}: {code}"


@pytest.fixture
def coarse_pictures(monkeypatch):
    """Pictures are drawn in few pixels and without a layout: here they only have to come."""
    save = Figure.savefig

    def coarse(figure, path, **_):
        figure.set_layout_engine("none")
        save(figure, path, dpi=20)

    monkeypatch.setattr(Figure, "savefig", coarse)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
@pytest.mark.usefixtures("coarse_pictures")
def test_what_a_page_says_can_be_typed(page, tmp_path, monkeypatch):
    for folder in ("data/demo", "data/streets", "localization/examples"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.finditer(page.read_text()):
        if (block["why"] or "").startswith("file "):
            path = tmp_path / block["why"].removeprefix("file ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"])
            continue
        assert block["why"] in (None, *WHY_NOT), block["why"]
        if block["kind"] == "python":
            assert block["why"] is None
            exec(compile(block["text"], page_name(page), "exec"), {})
        for line in lines_of(block) if block["kind"] == "bash" and block["why"] is None else ():
            module, arguments = command_of(line)
            call(module, small(module, arguments), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_options_of_commands_that_do_not_run_here_exist(page, tmp_path, monkeypatch):
    def reached(*_, **__):
        raise OptionsAreRead

    for module, names in WORK.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(module), name, reached)
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in BLOCK.finditer(page.read_text()) if block["kind"] == "bash" and block["why"]]
    for command in filter(None, (command_of(line) for block in blocks for line in lines_of(block))):
        with pytest.raises(OptionsAreRead):
            call(*command, monkeypatch)


def test_every_option_that_is_named_exists(capsys, monkeypatch):
    for module in COMMANDS:
        call(module, ["--help"], monkeypatch)
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        for code in re.findall(r"`([^`\n]+)`", text):
            if not code.startswith(("ACCELERATE", "ruff")):
                assert set(re.findall(r"(?<![\w-])--[\w-]+", code)) <= known, f"{page_name(page)}: {code}"


# --------------------------------------------------------------------------------------------------------------- texts
def headings(path):
    """What GitHub calls the headings of a page in links."""
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@pytest.mark.parametrize("page", TEXTS, ids=page_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert path.resolve().is_relative_to(ROOT), target
        assert not heading or heading in headings(path), target


def test_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\]\(([^)#]+)", text))


def test_what_others_read_is_in_their_form():
    """The citation names this version and both papers; workflows and issue forms are YAML."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    papers = [identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]]
    assert papers == ["arXiv:2502.17422", "arXiv:2503.06287"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    for path in (ROOT / ".github").rglob("*.yml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
