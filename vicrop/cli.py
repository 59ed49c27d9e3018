"""The command `vicrop`.

vicrop ask --model llava_tiny photo.jpg "what number is on the red sign?"
vicrop run --model llava_tiny --task demo --method rel_att
vicrop score --data_dir data/results
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from vicrop.command_line import CommandParser
from vicrop.tables import unknown

# command -> (the module whose `main(argv, prog)` it is, what it does); a module is imported when it is asked for
COMMANDS = {
    "ask": ("vicrop.ask_command", "ask about a picture: both answers, the map, the crop"),
    "run": ("vicrop.evaluation.command", "answer all questions of a dataset, and go on where a killed run stopped"),
    "score": ("vicrop.evaluation.score_table", "the table of all results in a folder"),
    "report": ("vicrop.evaluation.report", "a page to look at results: maps, crops, answers"),
    "findings": ("vicrop.findings.command", "the papers' findings, measured on a model and a dataset"),
    "ground": ("vicrop.localization.ground_command", "ground a phrase in a picture with localization heads"),
    "app": ("vicrop.app.command", "ask about pictures in a browser, and see where the model looks"),
    "check": ("vicrop.check", "does a checkpoint give here what transformers' own model gives?"),
    "prepare": ("vicrop.prepare.releases", "make data.json of a benchmark as it is released"),
}


def usage() -> str:
    """What `vicrop --help` prints."""
    rows = "\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items())
    return f"usage: vicrop COMMAND ...\n\n{rows}\n\n`vicrop COMMAND --help` lists the options of a command."


def main(argv: Sequence[str] | None = None) -> None:
    """The command, with its arguments."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        from vicrop.version import __version__

        print(f"vicrop {__version__}")
    elif name in COMMANDS:
        import_module(COMMANDS[name][0]).main(rest, prog=f"vicrop {name}")
    else:
        CommandParser("vicrop").error(unknown(name, COMMANDS, "command"))
