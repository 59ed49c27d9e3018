"""How the commands speak: --help says every default, and an error is one line that names the nearest valid choice."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vicrop.tables import unknown


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written; each option ends with its default, unless its own words say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        if "default" in text or action.default in (None, argparse.SUPPRESS):
            return text
        return f"{text} (default: no)" if action.default is False else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """The parser of every command.

        parser = CommandParser("vicrop check", __doc__)

    The help of an option whose default is None must say in words what happens without it.

    Args:
        prog: what the command is called; None: as it was started.
        description: what --help says first.
    """

    def __init__(self, prog: str | None = None, description: str | None = None):
        super().__init__(prog=prog, description=description, formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        """Leave with one line: without the usage, which is many."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse does; an option that there is not is an error in any case, and comes before all others."""
        self._refuse_unknown_options(args)
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As `parse_known_args`."""
        self._refuse_unknown_options(args)
        return super().parse_known_intermixed_args(args, namespace)

    def _refuse_unknown_options(self, args: Sequence[str] | None) -> None:
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for each in sys.argv[1:] if args is None else args:
            name = each.partition("=")[0]
            if each == "--":
                return
            if each.startswith("--") and not any(option.startswith(name) for option in options):
                self.error(unknown(name, options, "option", "--help lists all"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, unknown(value, list(action.choices), "value"))


def gigabytes(count: float) -> str:
    """A number of bytes as a person says it: 14.1 GB; less than 0.1 GB in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
