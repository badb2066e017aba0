"""Progress of a long command on standard error: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from edgellm.cli.standard_streams import error_is_terminal

DETAIL = " · "  # parts what is being done from how it is getting on, which a bar shows in its own line
__all__ = ["DETAIL", "stages"]


@contextmanager
def stages() -> Iterator[Callable[[str, float], None]]:
    """Gives a function that is told what is being done and how much of it (0 to 1)."""
    if error_is_terminal():
        with _bar() as tell:
            yield tell
        return
    start, last = time.perf_counter(), [""]

    def tell_plainly(what: str, share: float) -> None:
        if what != last[0]:
            last[0] = what
            click.echo(f"{time.perf_counter() - start:7.1f} s  {what}", err=True)

    yield tell_plainly


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
