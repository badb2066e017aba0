"""Standard input and output as they come: closed, not of UTF-8, or of few characters."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import click

__all__ = ["error_is_terminal", "input_is_terminal", "print_json", "read_input", "read_lines", "tolerate", "unescaped"]

_ESCAPE = re.compile(r"\\(?:([\\nrt])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))")
_LETTERS = {"\\": "\\", "n": "\n", "r": "\r", "t": "\t"}


def tolerate() -> None:
    """Let what an output cannot show be written as ``?``, so that no answer ends in the middle."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def print_json(data: Any) -> None:
    """Print one line of JSON; with escapes where the output has not all characters."""
    from edgellm_runtime.json_text import json_text

    encoding = getattr(sys.stdout, "encoding", None) or ""
    click.echo(json_text(data, ensure_ascii=encoding.lower().replace("-", "") != "utf8"))


def read_input() -> str:
    """All of standard input, without the line break at its end, which a shell's ``echo`` adds.

    Raises:
        OptionError: it is closed, or its bytes are no text.
    """
    data = _buffer().read()
    text = _decoded(data, "standard input")
    return text.removesuffix("\n").removesuffix("\r")


def read_lines() -> Iterator[str]:
    """The lines of standard input, without their ends.

    Raises:
        OptionError: it is closed, or a line is no text.
    """
    for number, line in enumerate(iter(_buffer().readline, b""), start=1):
        yield _decoded(line, f"line {number} of standard input").rstrip("\r\n")


def input_is_terminal() -> bool:
    """Whether somebody types."""
    return sys.stdin is not None and sys.stdin.isatty()


def error_is_terminal() -> bool:
    """Whether somebody reads what is written to standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def unescaped(text: str) -> str:
    r"""A text with ``\n``, ``\r``, ``\t``, ``\\``, ``\xHH`` and ``\uHHHH`` read; other backslashes stay."""
    return _ESCAPE.sub(lambda m: _LETTERS[m[1]] if m[1] else chr(int(m[2] or m[3], 16)), text)


def _buffer() -> Any:
    from edgellm_runtime import OptionError

    if sys.stdin is None or sys.stdin.closed:
        raise OptionError("standard input is closed; give the prompt as an argument, or input to read")
    return sys.stdin.buffer


def _decoded(data: bytes, what: str) -> str:
    from edgellm_runtime import OptionError

    encoding = sys.stdin.encoding or "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{what} is not {encoding.upper()} at byte {error.start}; convert it first, or say with PYTHONIOENCODING "
            "what it is"
        ) from error
