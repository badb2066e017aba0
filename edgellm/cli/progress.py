"""Progress of a long command on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from edgellm.cli.standard_streams import error_is_terminal

_EVERY = 30.0  # seconds after which a stage that goes on says how far it is
DETAIL = " · "  # parts what is being done from how it is getting on, which a bar shows in its own line
__all__ = ["DETAIL", "stages"]


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """Gives a function that is told what is being done and how much of it (0 to 1)."""
    if error_is_terminal():
        with _bar() as tell:
            yield tell
        return
    yield _Lines().tell


class _Lines:
    """A line for each stage and, of one that takes long, for how far it is."""

    def __init__(self) -> None:
        self._start = self._told = time.perf_counter()
        self._what, self._share = "", 0.0

    def tell(self, what: str, share: float) -> None:
        now, goes_on = time.perf_counter(), what == self._what
        if goes_on and (share <= self._share or now < self._told + _EVERY):
            return
        self._told, self._what, self._share = now, what, share
        done = f"{DETAIL}{share:.0%}" if goes_on else ""
        click.echo(f"{now - self._start:7.1f} s  {what}{done}", err=True)


@contextmanager
def _bar() -> Iterator[Callable[[str, float], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, object] = {}

        def tell(what: str, share: float) -> None:
            stage = what.partition(DETAIL)[0]
            if stage not in tasks:
                for done in tasks.values():
                    progress.update(done, completed=1.0)  # type: ignore[arg-type]
                tasks[stage] = progress.add_task(what, total=1.0)
            progress.update(tasks[stage], completed=share, description=what)  # type: ignore[arg-type]

        yield tell
