"""``edgellm bench``: how fast bundles run on this device, alone and beside each other."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.bench_report import workload_text
from edgellm.cli.device import device_option
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option
from edgellm_runtime.errors import OptionError
from edgellm_runtime.kernel_choice import CHOICES
from edgellm_runtime.kernel_choice import VARIABLE as KERNELS

if TYPE_CHECKING:
    from edgellm_runtime.checks.study import Cell

__all__ = ["bench"]

_MOST_BYTES = 64 << 20  # of a result
_DIFF = "diff"


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # click 8.4 made it generic
    """Whole numbers with commas between them."""

    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no whole number, or several with commas between them", param, ctx)


_NUMBERS = _Numbers()


@click.command(context_settings={"show_default": True})
@click.argument("bundles", metavar="BUNDLE...", type=click.Path(), nargs=-1, required=True)
@click.option("--prompt-tokens", type=_NUMBERS, default="128", envvar="PROMPT_TOKENS", show_envvar=True,
              help="Prompt length; several, with commas between them, are measured each.")  # fmt: skip
@click.option("--new-tokens", type=_NUMBERS, default="128", envvar="NEW_TOKENS", show_envvar=True,
              help="Steps after it; several likewise.")  # fmt: skip
@click.option(
    "--depth", type=_NUMBERS, default="0", help="Tokens read before the prompt, unmeasured; several likewise."
)
@click.option("--batch", type=_NUMBERS, default="1", help="Rows; several likewise.")
@functools.partial(threads_option, envvar="THREADS")  # beside PROMPT_TOKENS and NEW_TOKENS, a workload
@click.option("--sweep-threads", type=_NUMBERS, default=None, help="Numbers of CPU threads, in the place of --threads.")
@click.option("--rounds", type=int, default=5, help="Measured rounds at least, after one that is not.")
@click.option("--precision", type=float, default=0.0, metavar="PERCENT", help="Go on until half of each figure's 95% "
              "interval, or of each ratio's to the first bundle, is at most this; 0 does not.")  # fmt: skip
@click.option("--most-rounds", type=int, default=50, help="But no further than this.")
@device_option
@click.option("--kernels", multiple=True, type=click.Choice(CHOICES), show_default=False, help="Whose kernels to run: "
              "own are those of the package edgellm-kernels; given twice, each bundle is measured with both.  "
              f"[default: those that {KERNELS} says, else onnxruntime]")  # fmt: skip
@click.option("--adapter", default=None, metavar="NAME", help="Measure with this adapter of the bundle's, or of "
              "each of several bundles'.  [default: none]")  # fmt: skip
@click.option("--against", type=click.Path(path_type=Path), metavar="CHECKPOINT",
              help="Measure this checkpoint in PyTorch too, in float32 and on as many threads.")  # fmt: skip
@click.option("--seed", type=int, default=0, help="Of the random prompts.")
@click.option("--output", "outputs", type=click.Path(path_type=Path), multiple=True, metavar="FILE",
              help="Write the result there, as its suffix says: .json with every round, .csv, .md, or .html with "
              "plots; may be given several times.")  # fmt: skip
@click.option("--profile", "profiled", is_flag=True, hidden=True, help="What it was is the command profile now.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def bench(
    bundles: tuple[str, ...], prompt_tokens: list[int], new_tokens: list[int], depth: list[int], batch: list[int],
    threads: int | None, sweep_threads: list[int] | None, rounds: int, precision: float, most_rounds: int, device: str,
    kernels: tuple[str, ...], adapter: str | None, against: Path | None, seed: int, outputs: tuple[Path, ...],
    profiled: bool, as_json: bool,
) -> None:  # fmt: skip
    r"""Measure BUNDLE: loading, time to first token, decoding speed and memory.

    Random prompts, greedy; figures are medians over the rounds. Each bundle runs in a process of its own. Several take
    their rounds in turn, and each is compared with the first.

    \b
    edgellm bench diff BEFORE.json AFTER.json
        compares two results written with --output; runs nothing.
    """
    if bundles[0] == _DIFF and not Path(_DIFF).is_dir():
        _diff(bundles[1:], outputs, as_json)
        return
    if profiled:
        raise OptionError("bench has no --profile any more; use 'edgellm profile BUNDLE'")
    from edgellm_runtime.checks.bench import Workload
    from edgellm_runtime.checks.study import Plan, comparisons, machine_now, measure

    workloads = [Workload(*w) for w in itertools.product(prompt_tokens, new_tokens, depth, batch)]
    openers = {} if against is None else {str(against): "edgellm.cli.bench_pytorch"}
    plan = Plan(
        (*bundles, *openers), workloads, sweep_threads or [threads], rounds, precision / 100, max(most_rounds, rounds),
        device, seed, kernels or (None,), openers, adapter,
    )  # fmt: skip
    _check_outputs(outputs)
    before = machine_now()
    cells = _measured(plan, measure)
    result: dict[str, Any] = _result(cells, comparisons(cells), {"before": before, "after": machine_now()})
    _write(result, outputs)
    if as_json:
        print_json(_flat(result))
        return
    _print(result)


def _measured(plan: Any, measure: Any) -> list[Cell]:
    from edgellm.cli.progress import stages

    with stages() as tell:
        cells: list[Cell] = measure(plan, tell)
    return cells


def _result(cells: Sequence[Cell], compared: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    from edgellm_runtime.checks.study import FORMAT

    return {
        "format": FORMAT, "machine": machine, "cells": [cell.to_json() for cell in cells], "comparisons": compared,
    }  # fmt: skip


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    """A result of one cell with that cell's figures at the top too, where programs look for them."""
    if len(result["cells"]) != 1:
        return result
    (cell,) = result["cells"]
    figures = {name: value for name, value in cell.items() if name not in ("rounds", "bundle")}
    return {**figures, "rounds": len(cell["rounds"]), "versions": result["machine"]["before"]["versions"], **result}


def _check_outputs(outputs: Sequence[Path]) -> None:
    """Before any work: a result that nobody can read is no result."""
    from edgellm.cli.bench_report import SUFFIXES

    for path in outputs:
        if path.suffix not in SUFFIXES:
            raise OptionError(f"{path}: results are written as {', '.join(SUFFIXES)}; name one of these")
        if not path.absolute().parent.is_dir():
            raise OptionError(f"{path}: its folder does not exist; make it first")


def _write(result: dict[str, Any], outputs: Sequence[Path]) -> None:
    from edgellm.cli.bench_report import written

    for path in outputs:
        path.write_text(written(result, path), encoding="utf-8")


def _diff(files: Sequence[str], outputs: Sequence[Path], as_json: bool) -> None:
    from edgellm.cli.bench_report import comparison_lines
    from edgellm_runtime.checks.study import matched

    if len(files) != 2:
        raise OptionError(f"bench diff compares two results, and {len(files)} are named; name two JSON files")
    if outputs:
        raise OptionError("bench diff writes no file; redirect what it prints, or use --json")
    found = {"comparisons": matched(*map(_read, files))}
    if as_json:
        print_json(found)
        return
    for line in comparison_lines(found):
        click.echo(line)


def _read(file: str) -> list[Cell]:
    from edgellm_runtime.checks.study import FORMAT, Cell

    try:
        if Path(file).stat().st_size > _MOST_BYTES:
            raise OptionError(f"{file}: more than {_MOST_BYTES >> 20} MB; name a result of edgellm bench")
        data = json.loads(Path(file).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{file}: cannot be read as a result ({error}); write one with --output FILE") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("cells"), list):
        raise OptionError(f"{file}: is no result of edgellm bench; write one with --output FILE")
    return [Cell.from_json(cell) for cell in data["cells"]]


def _print(result: dict[str, Any]) -> None:
    from edgellm.cli.bench_report import comparison_lines

    versions = result["machine"]["before"]["versions"]
    if len(result["cells"]) == 1:
        _print_table(result["cells"][0], versions)
    else:
        _print_cells(result["cells"], versions)
    for line in comparison_lines(result):
        click.echo(line)
    for what in _doubts(result):
        click.echo(f"Note: {what}.")


def _print_cells(cells: list[dict[str, Any]], versions: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns = ("bundle", "workload", "first token ms", "prefill tok/s", "decode tok/s", "p50 / p99 ms", "MiB")
    table = Table(*columns, caption=f"{cells[0]['device']}; {_said(versions)}; in brackets: 95% of the rounds")
    for column in table.columns[2:]:
        column.justify = "right"
    for c in cells:
        spans = [f"({low:.0f}-{high:.0f})" for low, high in c["intervals"].values()]
        peak = c["peak_rss_mb"]
        table.add_row(
            escape(Path(c["name"]).name), workload_text(c), f"{c['ttft_ms']:.1f}",
            f"{c['prefill_tokens_per_s']:.0f} {spans[0]}", f"{c['decode_tokens_per_s']:.1f} {spans[1]}",
            f"{c['itl_ms']['p50']:.2f} / {c['itl_ms']['p99']:.2f}", "" if peak is None else f"{peak:.0f}",
        )  # fmt: skip
    Console().print(table)


def _said(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {v}" for name, v in versions.items() if v)


def _doubts(result: dict[str, Any]) -> list[str]:
    """What speaks against the figures."""
    before, after = result["machine"]["before"], result["machine"]["after"]
    found = []
    if any(cell["noisy"] for cell in result["cells"]):
        found.append("rounds differ by more than 10%: the machine is busy, or its clock changes; compare in one run")
    if before["load"] is not None and before["load"] > before["cores"] / 2:
        found.append(f"{before['load']} processes wanted to run in the minute before, on {before['cores']} cores")
    if before["throttled"] is not None and (times := (after["throttled"] or 0) - before["throttled"]) > 0:
        found.append(f"the quota of its control group stopped it {times} times")
    return found


def _print_table(cell: dict[str, Any], versions: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    itl, peak, between = cell["itl_ms"], cell["peak_rss_mb"], cell["intervals"]
    rows = f", {cell['batch']} rows" if cell["batch"] > 1 else ""
    after = f" after {cell['depth']}" if cell["depth"] else ""
    table = Table(
        "measure", "value", f"95% of {len(cell['rounds'])} rounds", title=escape(cell["name"]),
        caption=f"{cell['device']}, {cell['threads']} threads{rows}; {_said(versions)}",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value, figure in (
        ("load", f"{cell['load_s']:.2f} s", ""),
        (f"time to first token ({cell['prompt_tokens']} tokens{after})", f"{cell['ttft_ms']:.1f} ms", ""),
        ("prefill", f"{cell['prefill_tokens_per_s']:.0f} tok/s", "prefill"),
        (f"decode ({cell['new_tokens']} tokens)", f"{cell['decode_tokens_per_s']:.1f} tok/s", "decode"),
        ("between tokens, p50 / p95 / p99", f"{itl['p50']:.2f} / {itl['p95']:.2f} / {itl['p99']:.2f} ms", ""),
        ("peak memory", "unknown" if peak is None else f"{peak:.0f} MiB", ""),
        *(
            [] if cell["joules_per_token"] is None
            else [("energy, prompts included", f"{cell['joules_per_token']:.2f} J a token", "")]
        ),
    ):  # fmt: skip
        low, high = between.get(f"{figure}_tokens_per_s", (0, 0))
        table.add_row(name, value, f"{low:.0f} to {high:.0f}" if figure else "")
    Console().print(table)
