"""Running edgellm's own commands, each in a process of its own.

So the demo shows commands that anyone can run, and each one's peak memory is its own. This process stays small: on
Linux a child's peak begins at its parent's size.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import click

__all__ = ["Commands"]

_EDGELLM = ("-c", "from edgellm.cli import main; main()")
_PYTORCH = ("-m", "edgellm.demo.pytorch")


class Commands:
    """Runs commands one after the other and tells on standard error which.

    Args:
        total: how many there will be.
    """

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0

    def edgellm(self, what: str, *arguments: object, may_fail: bool = False) -> dict[str, Any]:
        """Run ``edgellm ARGUMENTS --json``.

        Args:
            what: a sentence for the person who waits.
            arguments: the command, its arguments and options.
            may_fail: whether exit status 1 is an answer too.

        Returns:
            The object that it printed.

        Raises:
            click.ClickException: it failed.
        """
        words = [str(a) for a in arguments]
        return self._run(what, ["edgellm", *words], [*_EDGELLM, *words, "--json"], (0, 1) if may_fail else (0,))

    def pytorch(self, what: str, *arguments: object) -> dict[str, Any]:
        """Run :mod:`edgellm.demo.pytorch`; otherwise as :meth:`edgellm`."""
        words = [*_PYTORCH, *map(str, arguments)]
        return self._run(what, ["python", *words], words, (0,))

    def _run(
        self, what: str, shown: Sequence[str], arguments: Sequence[str], accepted: Sequence[int]
    ) -> dict[str, Any]:
        self._done += 1
        click.secho(f"\n[{self._done}/{self._total}] {what}", err=True, bold=True)
        click.secho(f"$ {shlex.join(shown)}", err=True, dim=True)
        # -P: a json.py in the current directory is not ours
        done = subprocess.run([sys.executable, "-P", *arguments], stdout=subprocess.PIPE, check=False)
        if done.returncode not in accepted:
            raise click.ClickException(f"{what}: failed with status {done.returncode}; the lines above say why")
        try:
            result: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise click.ClickException(f"{what}: status {done.returncode} and no result; see above") from None
        return result
