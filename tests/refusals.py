"""What every test of bad input asks of a command: one sentence, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.cli import run


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """The one sentence that a command fails with."""
    assert run(list(arguments)) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    said = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, captured.err
    assert captured.err.endswith(said[0] + "\n")
    assert "Traceback" not in captured.err
    return said[0].removeprefix("Error: ")


def only(folder: Path, *names: str) -> None:
    """Nothing else is in the folder, hidden files included."""
    assert {f.name for f in folder.iterdir()} == set(names)
