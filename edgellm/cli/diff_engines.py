"""``edgellm diff --engines``: which layer of a bundle's engines does not compute what its graph says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgellm.cli.diff_rows import UNKNOWN, rows_to_read, sources_to_read
from edgellm.cli.progress import stages
from edgellm.cli.standard_streams import print_json

if TYPE_CHECKING:
    from edgellm_exporters.engines.bisect import Bisection

__all__ = ["diff_engines"]


def diff_engines(path: Path, file: Path | None, *, tokens: int, window: int, as_json: bool) -> int:
    """Compare a bundle's engines with their graphs; the exit status.

    Args:
        path: of the bundle.
        file: text to read; None for the goldens' rows.
        tokens: of the text, at most.
        window: tokens of it that are read from an empty state at a time.
        as_json: whether to print one JSON object and nothing else.
    """
    from edgellm_exporters.errors import EngineError
    from edgellm_runtime.errors import BackendError, BundleError, OptionError

    try:
        found = _bisected(path, file, tokens, window)
    except (BackendError, BundleError, EngineError, OptionError) as error:  # no GPU, or no engine for the one here
        click.secho("Cannot tell: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        return UNKNOWN
    print_json(_report(found)) if as_json else _print(found, path.name)
    return 0 if found.wrong is None else 1


def _bisected(path: Path, file: Path | None, tokens: int, window: int) -> Bisection:
    from edgellm_exporters.engines.bisect import bisect_engines, built_with
    from edgellm_exporters.engines.options import EngineOptions
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.errors import OptionError
    from edgellm_runtime.loading import open_session

    with stages() as tell:
        tell("checking files", 0.0)
        bundle = Bundle(path)
        if not bundle.manifest.graphs:
            target = bundle.manifest.target["name"]
            raise OptionError(f"{path}: is for target {target}, which has no engines; compare it with --against")
        rows, sources = rows_to_read(bundle, file, tokens, window), sources_to_read(bundle, file)
        build = built_with(EngineOptions(max_batch=1))
        return bisect_engines(
            bundle, rows, lambda part: open_session(part, device="tensorrt"), build, sources=sources, tell=tell
        )  # fmt: skip


def _report(found: Bisection) -> dict[str, object]:
    trials = [
        {"name": one.name, "difference": one.difference, "bound": one.bound, "holds": one.holds} for one in found.trials
    ]
    return {"holds": found.wrong is None, "wrong": found.wrong, "trials": trials}


def _print(found: Bisection, name: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("engines up to", "worst", "bound", "verdict", title=escape(f"{name}: engines against their graphs"))
    for one in found.trials:
        verdict = "[green]rounding[/]" if one.holds else "[red]wrong[/]"
        table.add_row(escape(one.name), f"{one.difference:.2e}", f"{one.bound:.2e}", verdict)
    console = Console()
    console.print(table)
    if found.wrong is not None:
        console.print(f"the first layer whose engines are wrong: {escape(found.wrong)}")
