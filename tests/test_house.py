"""The structure: imports go down only, doors are light, everything public has types, nothing grows out of a screen."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from vicrop.cli import COMMANDS
from vicrop.files import ROOT

PACKAGES = ("vicrop", "tiny")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}  # fmt: skip
DOORS = ("run.py", "get_score.py", "-m localization.evaluate_boxes", "-m tools.report", "-m tools.findings",
         "-m tools.prepare_data")  # fmt: skip


def parsed(name):
    return ast.parse(MODULES[name].read_text())


def imported(name):
    """The modules of the package that a module imports, also those that it imports late."""
    found = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGES):
            found.add(node.module)
            found.update(f"{node.module}.{each.name}" for each in node.names)
        if isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
    return found & MODULES.keys()


def test_imports_go_down_only():
    """Neither modules nor folders import each other in a circle."""
    TopologicalSorter({name: imported(name) for name in MODULES if not name.endswith("__init__")}).prepare()
    folders = {}
    for name in (name for name in MODULES if name.count(".") > 1 or not name.endswith(("__init__", "__main__"))):
        own = name.rpartition(".")[0]
        folders.setdefault(own, set()).update(other.rpartition(".")[0] for other in imported(name))
    TopologicalSorter({own: others - {own} for own, others in folders.items()}).prepare()


def test_nobody_imports_a_command():
    """What two commands share lies below them; only doors, and the table of `vicrop`, know commands."""
    commands = {module for module, _ in COMMANDS.values()} | {"vicrop.cli"}
    for name in MODULES:
        assert not (imported(name) & commands) or name == "vicrop.__main__", name


@pytest.mark.parametrize("command", [*DOORS, *(f"-m vicrop {name}" for name in COMMANDS), "-m vicrop"])
def test_help_needs_no_torch(command):
    code = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_{}('{}', run_name='__main__')"
    kind, name = ("module", command.split()[1]) if command.startswith("-m") else ("path", command)
    code = code.format(kind, name) if kind == "path" else code.format(kind, name).replace("')", "', alter_sys=True)")
    script = f"try:\n    {code.replace('; ', chr(10) + '    ')}\nexcept SystemExit: pass\n"
    script += "print(not {'torch', 'gradio'}.isdisjoint(sys.modules))"
    arguments = [name, *command.split()[2:], "--help"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    *shown, something_large_is_there = done.stdout.splitlines()
    assert something_large_is_there == "False", done.stderr
    assert any("usage" in line for line in shown)


def functions():
    """(module, qualified name, node) of every function and method."""
    for name in MODULES:
        tree = parsed(name)
        for node in tree.body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            for each in inner:
                if isinstance(each, ast.FunctionDef):
                    owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    yield name, f"{owner}{each.name}", each


def test_functions_fit_a_screen():
    for module, name, node in functions():
        assert node.end_lineno - node.lineno < 60, f"{module}.{name}"
    for module in MODULES:
        for node in ast.walk(parsed(module)):
            if isinstance(node, ast.ClassDef):
                assert sum(isinstance(each, ast.FunctionDef) for each in node.body) <= 20, f"{module}.{node.name}"


def test_everything_public_has_types():
    """A property, a method and a function say what they take and give; `self` and what a decorator fills in do not."""
    bare = []
    for module, name, node in functions():
        if any(part.startswith("_") and part != "__init__" for part in name.split(".")):
            continue
        spec = node.args
        given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        typed = all(each.annotation for each in given if each.arg not in ("self", "cls"))
        if not typed or (node.returns is None and node.name != "__init__"):
            bare.append(f"{module}.{name}")
    assert not bare, f"{len(bare)} without types: {', '.join(bare)}"


def test_at_the_top_is_what_users_know():
    known = {"run.py", "get_score.py", "info.py", "utils.py", "llava_methods.py", "llava_next_methods.py",
             "blip_methods.py", "qwen2_5_methods.py"}  # fmt: skip
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name for name in tracked if "/" not in name} == known or not tracked
