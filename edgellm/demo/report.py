"""The demo's summary: one column for each bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["print_report"]

_LINES: Sequence[tuple[str, Callable[[dict[str, Any]], str]]] = (
    ("target", lambda r: str(r["target"])),
    ("weights", lambda r: str(r["weights"])),
    ("size", lambda r: f"{r['bytes'] / 1e6:.1f} MB"),
    ("KL from PyTorch, nats", lambda r: f"{r['kl_mean']:.1e}"),
    ("top-1 as PyTorch's", lambda r: f"{r['top1_agreement']:.1%}"),
    ("checks that hold", lambda r: f"{r['checks'] - len(r['failed_checks'])} of {r['checks']}"),
    ("time to first token", lambda r: f"{r['ttft_ms']:.1f} ms"),
    ("  in PyTorch", lambda r: f"{r['pytorch']['ttft_ms']:.1f} ms"),
    ("decode", lambda r: f"{r['decode_tokens_per_s']:.0f} tok/s"),
    ("  in PyTorch", lambda r: f"{r['pytorch']['decode_tokens_per_s']:.0f} tok/s"),
    ("speed-up of decode", lambda r: f"{r['speedup']:.1f} x"),
    ("peak memory (RSS)", lambda r: f"{r['peak_rss_mb'] or 0:.0f} MiB"),
    ("  in PyTorch", lambda r: f"{r['pytorch']['peak_rss_mb']:.0f} MiB"),
)


def print_report(result: dict[str, Any]) -> None:
    """Print the table on standard output.

    Args:
        result: as ``edgellm demo --json`` prints it.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    workload = result["workload"]
    caption = (
        f"batch 1, greedy, prompt of {workload['prompt_tokens']} tokens, {workload['new_tokens']} new ones, "
        f"{workload['threads']} threads, median of {workload['rounds']}"
    )
    table = Table("", *(r["model"] for r in result["bundles"]), caption=caption)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in _LINES:
        table.add_row(name, *(value(r) for r in result["bundles"]))
    console = Console(highlight=False)
    console.print(table)
    if result["load_average"] > result["cores"] + 1:
        console.print(
            f"[yellow]Other programs were busy, load {result['load_average']} on {result['cores']} cores: these times "
            "say little.", soft_wrap=True,
        )  # fmt: skip
    for check in result["checks"]:
        console.print(
            f"[{'green' if check['ok'] else 'red'}]{'✓' if check['ok'] else '✗'}[/] {escape(check['what'])}",
            soft_wrap=True,
        )
