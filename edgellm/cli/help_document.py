"""The reference of the command line, made from the commands' own help: ``make docs`` writes it to docs/cli.md."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from edgellm.cli import COMMANDS, cli

__all__ = ["reference"]

_HEAD = """\
# The command line

Made from the commands' help by `make docs`; a test compares the two.

Every command but `chat` and `serve` has `--json`: one object on standard output and nothing else there. Progress and
errors go to standard error. The exit status is 0 for success, 1 for a fault, told in one line, or a check that does not
hold, 2 for wrong usage, and 130 after Ctrl-C or SIGTERM; `serve` ends with 0 then. `edgellm COMMAND --help` shows a
command's part of this page.
"""


def reference() -> str:
    """The whole of docs/cli.md."""
    with click.Context(cli, info_name="edgellm", **cli.context_settings) as parent:
        commands = [(name, cli.get_command(parent, name)) for name in COMMANDS]
        parts = [part for name, command in commands if command is not None for part in _command(parent, name, command)]
    return "\n".join([_HEAD, *parts])


def _command(parent: click.Context, name: str, command: click.Command) -> Iterator[str]:
    with click.Context(command, info_name=name, parent=parent, **command.context_settings) as context:
        yield f"## edgellm {name}\n"
        yield f"    edgellm {name} {' '.join(command.collect_usage_pieces(context))}\n"
        yield inspect.cleandoc(command.help or "").replace("\b\n", "") + "\n"
        yield "| option | what |\n|---|---|"
        for parameter in command.params:
            record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
            if record is not None:
                option, what = (_cell(text) for text in record)
                yield f"| `{option}` | {what} |"
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
