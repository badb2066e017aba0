"""``edgellm bench``: how fast a bundle runs on this device."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.device import device_option
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option

if TYPE_CHECKING:
    from edgellm_runtime.checks.profile import KernelTime

    Kernels = dict[str, list[KernelTime]]

__all__ = ["bench"]

_PROFILED = 32  # tokens at most: each leaves hundreds of notes


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path())
@click.option("--prompt-tokens", type=int, default=128, envvar="PROMPT_TOKENS", show_envvar=True, help="Prompt length.")
@click.option("--new-tokens", type=int, default=128, envvar="NEW_TOKENS", show_envvar=True, help="Steps after it.")
@functools.partial(threads_option, envvar="THREADS")  # beside PROMPT_TOKENS and NEW_TOKENS, a workload
@click.option("--rounds", type=int, default=5, help="Measured rounds, after one that is not.")
@device_option
@click.option("--seed", type=int, default=0, help="Of the random prompts.")
@click.option("--profile", "profiled", is_flag=True, help="Also tell which kernels a prompt and a token spend their "
              "time in, from a second, slower run (bundles for ONNX Runtime on CPU).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def bench(
    bundle: str, prompt_tokens: int, new_tokens: int, threads: int | None, rounds: int, device: str, seed: int,
    profiled: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure BUNDLE: loading, time to first token, decoding speed and memory.

    Random prompts, greedy, batch 1; figures are medians over the rounds.
    """
    from edgellm_runtime.checks.bench import bench as measure
    from edgellm_runtime.checks.profile import check_target, profile

    if profiled:
        check_target(bundle)
    result = measure(
        bundle, prompt_tokens=prompt_tokens, new_tokens=new_tokens, threads=threads, rounds=rounds, device=device,
        seed=seed,
    )  # fmt: skip
    kernels: Kernels = {}
    if profiled:
        kernels = profile(
            bundle, prompt_tokens=prompt_tokens, new_tokens=min(new_tokens, _PROFILED), threads=threads, seed=seed
        )
        result["profile"] = {what: list(map(dataclasses.asdict, each)) for what, each in kernels.items()}
    if as_json:
        print_json(result)
        return
    _print_table(bundle, result)
    for what, title in (("prompt", f"a prompt of {prompt_tokens}"), ("token", "a token")):
        if what in kernels:
            _print_kernels(title, kernels[what])


def _print_kernels(title: str, kernels: list[KernelTime]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "runs", "ms", "share", title=title, caption="counting makes small kernels look larger")
    for column in table.columns[1:]:
        column.justify = "right"
    for kernel in kernels:
        table.add_row(kernel.kernel, str(kernel.count), f"{kernel.ms:.3f}", f"{kernel.share:.1%}")
    Console().print(table)


def _print_table(bundle: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    itl = result["itl_ms"]
    peak = result["peak_rss_mb"]
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    table = Table(
        "measure", "value", title=escape(bundle), caption=f"{result['device']}, {result['threads']} threads; {versions}"
    )
    table.columns[1].justify = "right"
    for name, value in (
        ("load", f"{result['load_s']:.2f} s"),
        (f"time to first token ({result['prompt_tokens']} tokens)", f"{result['ttft_ms']:.1f} ms"),
        ("prefill", f"{result['prefill_tokens_per_s']:.0f} tok/s"),
        (f"decode ({result['new_tokens']} tokens)", f"{result['decode_tokens_per_s']:.1f} tok/s"),
        ("between tokens, p50 / p95 / p99", f"{itl['p50']:.2f} / {itl['p95']:.2f} / {itl['p99']:.2f} ms"),
        ("peak memory", "unknown" if peak is None else f"{peak:.0f} MB"),
    ):
        table.add_row(name, value)
    Console().print(table)
