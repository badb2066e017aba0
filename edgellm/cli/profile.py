"""``edgellm profile``: where the time of a prompt and of a token goes, by operator and by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgellm.cli.device import device_option
from edgellm.cli.progress import stages
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option
from edgellm_runtime.errors import OptionError
from edgellm_runtime.kernel_choice import CHOICES
from edgellm_runtime.kernel_choice import VARIABLE as KERNELS

__all__ = ["profile"]

_MOST_ROWS = 8  # of a table of operators
_FEW_LAYERS = 6  # that the table lists one by one
_TITLES = {"prefill": "a prompt of {} tokens", "decode": "a token"}


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", type=int, default=128, help="Prompt length.")
@click.option("--new-tokens", type=int, default=16, help="Steps after it.")
@click.option("--depth", type=int, default=0, help="Tokens read before the prompt, unmeasured.")
@click.option("--rounds", type=int, default=5, help="Rounds with the profiler and without it, in turn, after one that "
              "does not count; the faster half of each step's counts.")  # fmt: skip
@device_option
@threads_option
@click.option("--kernels", type=click.Choice(CHOICES), default=None, show_default=False, help="Whose kernels to run: "
              "own are those of the package edgellm-kernels.  "
              f"[default: those that {KERNELS} says, else onnxruntime]")  # fmt: skip
@click.option("--seed", type=int, default=0, help="Of the random prompts.")
@click.option("--html", "page", type=click.Path(path_type=Path), metavar="FILE",
              help="Write all of it there as one page, with plots.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the last round there as a timeline for https://ui.perfetto.dev.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def profile(
    bundle: Path, prompt_tokens: int, new_tokens: int, depth: int, rounds: int, device: str, threads: int | None,
    kernels: str | None, seed: int, page: Path | None, trace: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Tell where BUNDLE's time goes: by operator and by layer, for prefill and for decode.

    Beside each time stand the bytes that must be moved for it, against the memory bandwidth that this machine has at
    the moment. docs/measuring.md says what is counted.
    """
    for file in (page, trace):
        if file is not None and not file.absolute().parent.is_dir():
            raise OptionError(f"{file}: its folder does not exist; make it first")
    from edgellm_runtime.checks.profile import profile as run
    from edgellm_runtime.checks.profile_report import report

    with stages() as tell:
        found = run(
            bundle, prompt_tokens=prompt_tokens, new_tokens=new_tokens, depth=depth, rounds=rounds, threads=threads,
            device=device, kernels=kernels, seed=seed, tell=tell,
        )  # fmt: skip
    result = report(found, str(bundle))
    if page is not None:
        from edgellm_runtime.checks.profile_page import profile_page

        page.write_text(profile_page(result), encoding="utf-8")
    if trace is not None:
        from edgellm_runtime.checks.profile_trace import profile_trace

        trace.write_text(json.dumps(profile_trace(found, bundle.name), allow_nan=False), encoding="utf-8")
    print_json(result) if as_json else _print(result)


def _print(result: dict[str, Any]) -> None:
    for name, phase in result["phases"].items():
        _print_operators(_TITLES[name].format(phase["tokens"]), phase)
    _print_layers(result["phases"])
    for line in _sentences(result):
        click.echo(line)


def _print_operators(title: str, phase: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from edgellm_runtime.checks.profile_page import known, megabytes

    table = Table("operator", "runs", "ms", "share", "MB moved", "GB/s", "of roof", title=title)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    rows = phase["operators"]
    for row in rows[:_MOST_ROWS]:
        table.add_row(
            row["name"], f"{row['count']:.4g}", f"{row['ms']:.3f}", f"{row['share']:.1%}", megabytes(row),
            known(row["gb_per_s"], ".1f"), known(row["roof_share"], ".0%"),
        )  # fmt: skip
    if rest := rows[_MOST_ROWS:]:
        spent = sum(row["ms"] for row in rest)
        share = sum(row["share"] for row in rest)
        table.add_row(f"{len(rest)} others", f"{sum(r['count'] for r in rest):.4g}", f"{spent:.3f}", f"{share:.1%}")
    Console().print(table)


def _print_layers(phases: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from edgellm_runtime.checks.profile_page import known

    table = Table("layer", *(head for name in phases for head in (f"{name} ms", "%")), "weights MB")
    for column in table.columns[1:]:
        column.justify = "right"
    for title, rows in _layer_rows(phases):
        weights = rows[-1]["bytes"]["weights"] / 1e6 if rows[-1]["bytes"] else None
        figures = [text for row in rows for text in (f"{row['ms']:.3f}", f"{100 * row['share']:.1f}")]
        table.add_row(escape(title), *figures, known(weights, ".2f"))
    Console().print(table)


def _layer_rows(phases: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each layer's row of each phase; where there are many, the one in the middle and the slowest stand for them."""
    names = [row["name"] for row in phases["decode"]["layers"]]
    by_name = {name: [next(r for r in p["layers"] if r["name"] == name) for p in phases.values()] for name in names}
    inner = [name for name in names if "." in name]
    if len(inner) <= _FEW_LAYERS:
        return list(by_name.items())
    ranked = sorted(inner, key=lambda name: float(by_name[name][-1]["ms"]))
    middle, slowest = ranked[len(ranked) // 2], ranked[-1]
    told = {f"{middle} (middle of {len(inner)})": by_name[middle], f"{slowest} (slowest)": by_name[slowest]}
    before, after = names[: names.index(inner[0])], names[names.index(inner[-1]) + 1 :]
    rows = {**{n: by_name[n] for n in before}, **told, **{n: by_name[n] for n in after}}
    return list(rows.items())


def _sentences(result: dict[str, Any]) -> list[str]:
    from edgellm_runtime.checks.profile_page import known

    roof, lines = result["roof"], []
    if roof is None:
        lines.append(f"Roof: {known(None, '')} on device {result['device']}, whose memory is not measured.")
    else:
        lines.append(
            f"Roof, measured between the rounds with {roof['threads']} threads: {roof['gb_per_s']:.1f} GB/s read from "
            f"memory, {roof['gflop_per_s']:.0f} GFLOP/s in float32."
        )
    for name, p in result["phases"].items():
        step = p["step"]
        lines.append(
            f"{name}: {p['plain_ms']:.2f} ms a step, {known(step['gb_per_s'], '.1f')} GB/s, roof "
            f"{known(step['roof_share'], '.0%')}; profiled {p['step_ms']:.2f} ms ({p['profiler_overhead']:+.1%}), of "
            f"which kernels {p['kernels_ms']:.2f}, between them {known(p['between_kernels_ms'], '.2f')}, outside the "
            f"library {known(p['outside_library_ms'], '.2f')}."
        )
    return [*lines, *(f"Note: {what}." for what in result["doubts"])]
