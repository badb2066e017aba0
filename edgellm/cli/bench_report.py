"""What ``edgellm bench`` measured, as sentences, JSON, CSV, Markdown, or a page that needs no other file."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from edgellm_runtime.errors import OptionError

__all__ = ["SUFFIXES", "comparison_lines", "workload_text", "written"]

_COLUMNS = ("bundle", "prompt", "new", "depth", "rows", "threads", "first token ms", "prefill tok/s", "decode tok/s",
            "between tokens ms p50", "p95", "p99", "peak MiB", "load s")  # fmt: skip
_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;"
    "padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;text-align:right;"
    "border-bottom:1px solid #8884}td:first-child,th:first-child{text-align:left}"
    ".wide{overflow-x:auto}svg{width:100%;height:auto}svg text{font-size:12px;fill:currentColor}"
)
_WIDTH, _ROW, _LEFT = 900, 34, 220


def written(result: dict[str, Any], path: Path) -> str:
    """A result in the form that a file's suffix names.

    Raises:
        OptionError: it names none.
    """
    if path.suffix not in SUFFIXES:
        raise OptionError(f"{path}: results are written as {', '.join(SUFFIXES)}; name one of these")
    return SUFFIXES[path.suffix](result)


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """A sentence for each figure of each comparison."""
    lines = []
    for found in result["comparisons"]:
        what = workload_text(found)
        for figure in ("prefill", "decode"):
            f = found[figure]
            lines.append(
                f"{figure}, {what}: {found['second']} is {f['verdict']} than {found['first']}"
                if f["verdict"] != "no difference"
                else f"{figure}, {what}: no difference between {found['first']} and {found['second']}"
            )
            lines[-1] += f", {f['speed']:.3f}x ({f['low']:.3f} to {f['high']:.3f})"
        tokens = "the same tokens" if found["same_tokens"] else "other tokens"
        lines.append(f"tokens, {what}: {tokens} came out of both")
    return lines


def workload_text(found: dict[str, Any]) -> str:
    """What a cell or a comparison is of."""
    text = f"{found['prompt_tokens']} + {found['new_tokens']} tokens"
    text += f" after {found['depth']}" if found["depth"] else ""
    text += f", {found['batch']} rows" if found["batch"] > 1 else ""
    return f"{text}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}"


def _rows(result: dict[str, Any]) -> Iterable[Sequence[Any]]:
    for c in result["cells"]:
        itl, peak = c["itl_ms"], c["peak_rss_mb"]
        yield (
            c["name"], c["prompt_tokens"], c["new_tokens"], c["depth"], c["batch"], c["threads"], c["ttft_ms"],
            c["prefill_tokens_per_s"], c["decode_tokens_per_s"], itl["p50"], itl["p95"], itl["p99"],
            "" if peak is None else round(peak), c["load_s"],
        )  # fmt: skip


def _json(result: dict[str, Any]) -> str:
    return json.dumps(result, allow_nan=False, indent=1) + "\n"


def _csv(result: dict[str, Any]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    table.writerows(_rows(result))
    return text.getvalue()


def _markdown(result: dict[str, Any]) -> str:
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in _rows(result)]
    lines += ["", *(f"- {line}." for line in comparison_lines(result)), *([""] if result["comparisons"] else [])]
    return "\n".join([*lines, _machine_line(result), ""])


def _machine_line(result: dict[str, Any]) -> str:
    before, after = result["machine"]["before"], result["machine"]["after"]
    versions = ", ".join(f"{name} {version}" for name, version in before["versions"].items() if version)
    text = f"{before['processor']}, {before['cores']} cores, load {before['load']} before and {after['load']} after"
    if before["throttled"] is not None and after["throttled"] is not None:
        text += f", stopped {after['throttled'] - before['throttled']} times by its quota"
    return f"{text}; {versions}; {before['time']}."


def _page(result: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(value))}</td>' for value in row)}</tr>" for row in _rows(result)
    )
    said = "".join(f"<li>{html.escape(line)}</li>" for line in comparison_lines(result))
    plots = "".join(_plot(result, figure) for figure in ("prefill", "decode"))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>edgellm bench</title><style>{_STYLE}</style><h1>edgellm bench</h1>"
        f"<p>{html.escape(_machine_line(result))}</p>"
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div><ul>{said}</ul>{plots}'
        "</html>\n"
    )


def _plot(result: dict[str, Any], figure: str) -> str:
    """Each round a dot, the median's interval a bar; one line a bundle and workload."""
    drawn: list[tuple[str, list[float], list[float]]] = []
    for c in result["cells"]:
        count = c["batch"] * c["prompt_tokens" if figure == "prefill" else "new_tokens"]
        rates = [count / (r["ttft_s"] if figure == "prefill" else sum(r["steps_s"])) for r in c["rounds"]]
        drawn.append((f"{Path(c['bundle']).name}, {workload_text(c)}", rates, c["intervals"][f"{figure}_tokens_per_s"]))
    most = max(max(rates) for _, rates, _ in drawn) * 1.05
    height = _ROW * len(drawn) + 30

    def x(rate: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - 20) * rate / most, 1)

    parts = []
    for at, (name, rates, (low, high)) in enumerate(drawn):
        y = _ROW * at + _ROW // 2
        parts.append(f'<text x="0" y="{y + 4}">{html.escape(name[:40])}</text>')
        parts.append(
            f'<rect x="{x(low)}" y="{y - 8}" width="{max(1.5, x(high) - x(low))}" height="16" fill="#2a78" rx="2"/>'
        )
        parts += [f'<circle cx="{x(rate)}" cy="{y}" r="2.5" fill="#26c" fill-opacity=".7"/>' for rate in rates]
    parts += [
        f'<text x="{x(tick)}" y="{height - 6}" text-anchor="middle">{tick:.0f}</text>'
        for tick in (0, most / 4, most / 2, 3 * most / 4, most)
    ]
    return (
        f"<h2>{figure}, tokens/s</h2><p>Dots are rounds, bars the 95% interval of the median.</p>"
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'
    )


SUFFIXES: dict[str, Callable[[dict[str, Any]], str]] = {
    ".json": _json, ".csv": _csv, ".md": _markdown, ".html": _page,
}  # fmt: skip
