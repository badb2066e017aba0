"""A profile as one HTML file that needs nothing else: a bar for each layer, tables of operators, the roofline."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["known", "megabytes", "profile_page"]

_TITLES = {"prefill": "Prefill: a prompt of {} tokens", "decode": "Decode: a token"}
# Told apart with any kind of colour vision, on white and on black; the last is for all others together.
_COLOURS = ("#3b82c4", "#e08a1e", "#2f9e77", "#b65fa3", "#c9b21f", "#d1495b", "#5c6bc0", "#8a8f98")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
_STYLE = """
:root{color-scheme:light dark;--line:#8883;--dim:#667085;--card:#f6f7f9;--text:#1f2430;--page:#fff}
@media(prefers-color-scheme:dark){:root{--dim:#9aa4b2;--card:#1c2027;--text:#e4e7ec;--page:#13161b}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--page);max-width:64rem;margin:0 auto;
padding:1.2rem}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2.2rem 0 .4rem}h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.3rem 0}.dim{color:var(--dim)}.wide{overflow-x:auto}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:.8rem 0}
.card{background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
.card b{display:block;font-size:1.15rem;white-space:nowrap}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
td,th{padding:.22rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--dim);font-weight:500}td:first-child,th:first-child{text-align:left;padding-left:0;
white-space:normal}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.4rem 0}.key span::before,td.op::before{content:"";display:
inline-block;width:.7em;height:.7em;border-radius:.15em;background:var(--c);margin-right:.4em}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:2px .6rem;align-items:center;font-size:.85rem}
.bar{display:flex;height:1.05em;min-width:0}.bar i{display:block;background:var(--c);height:100%}
.bar i:first-child{border-radius:.2em 0 0 .2em}.bar i:last-child{border-radius:0 .2em .2em 0}
.doubt{border-left:.25rem solid #e08a1e;padding-left:.6rem}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--dim)}
.num{text-align:right;font-variant-numeric:tabular-nums;color:var(--dim)}
svg{width:100%;max-width:40rem;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:currentColor}
"""


def profile_page(result: Mapping[str, Any]) -> str:
    """The page.

    Args:
        result: from :func:`~edgellm_runtime.checks.profile_report.report`.
    """
    colours = _colours(result)
    title = html.escape(f"edgellm profile {result['bundle']}")
    body = "".join(_phase(name, phase, result, colours) for name, phase in result["phases"].items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{_head(result)}{body}{_notes(result)}</html>\n"
    )


def known(value: float | None, form: str) -> str:
    """A figure, or that it is not known."""
    return "not known" if value is None else format(value, form)


def megabytes(row: Mapping[str, Any]) -> str:
    """What a row moved; at least so much, where some is not known."""
    if row["bytes"] is None:
        return "not known"
    return f"{'≥ ' if row['bytes_not_known_ms'] else ''}{sum(row['bytes'].values()) / 1e6:.2f}"


def _head(result: Mapping[str, Any]) -> str:
    roof = result["roof"]
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items() if v)
    after = f" after {result['depth']}" if result["depth"] else ""
    cards = [
        (f"{result['phases']['prefill']['plain_ms']:.1f} ms", f"a prompt of {result['prompt_tokens']}{after}"),
        (f"{result['phases']['decode']['plain_ms']:.2f} ms", "a token"),
    ]
    if roof is not None:
        cards += [
            (f"{roof['gb_per_s']:.1f} GB/s", "memory, read"), (f"{roof['gflop_per_s']:.0f} GFLOP/s", "float32 product")
        ]  # fmt: skip
    told = "".join(f'<div class="card"><b>{html.escape(a)}</b>{html.escape(b)}</div>' for a, b in cards)
    doubts = "".join(f'<p class="doubt">Note: {html.escape(what)}.</p>' for what in result["doubts"])
    return (
        f'<p class="dim">{html.escape(result["processor"])}, {html.escape(result["device"])}, '
        f"{_count(result['threads'], 'thread')}; {html.escape(versions)}; {_count(result['rounds'], 'round')}.</p>"
        f'<div class="cards">{told}</div>{doubts}'
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _phase(name: str, phase: Mapping[str, Any], result: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    overhead, roof = f"{phase['profiler_overhead']:+.1%}", known(phase["step"]["roof_share"], ".0%")
    return (
        f"<h2>{html.escape(_TITLES[name].format(phase['tokens']))}</h2>"
        f"<p>{phase['plain_ms']:.2f} ms without the profiler. With it {phase['step_ms']:.2f} ms ({overhead}): "
        f"kernels {phase['kernels_ms']:.2f}, between them {known(phase['between_kernels_ms'], '.2f')}, outside the "
        f"library {known(phase['outside_library_ms'], '.2f')}. Of the roof: {roof}.</p>"
        f"<h3>Layers</h3>{_key(phase, colours)}{_bars(phase, colours)}"
        f"<h3>Operators</h3>{_table(phase, colours)}{_kernels(phase, colours)}"
        f"<h3>Roofline</h3>{_roofline(phase, result['roof'], colours)}"
    )


def _colours(result: Mapping[str, Any]) -> dict[str, str]:
    """A colour for each of the operators that take the most of either phase; others share the last."""
    most: dict[str, float] = {}
    for phase in result["phases"].values():
        for row in phase["operators"]:
            most[row["name"]] = max(most.get(row["name"], 0.0), row["share"])
    ranked = sorted(most, key=lambda name: most[name], reverse=True)
    return {name: _COLOURS[min(at, len(_COLOURS) - 1)] for at, name in enumerate(ranked)}


def _key(phase: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    shown = [row["name"] for row in phase["operators"] if colours[row["name"]] != _COLOURS[-1]]
    parts = [f'<span style="--c:{colours[name]}">{html.escape(name)}</span>' for name in shown]
    if len(shown) < len(phase["operators"]):
        parts.append(f'<span style="--c:{_COLOURS[-1]}">others</span>')
    return f'<div class="key">{"".join(parts)}</div>'


def _bars(phase: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    longest = max((row["ms"] for row in phase["layers"]), default=0.0) or 1.0
    parts = []
    for row in phase["layers"]:
        pieces = "".join(
            f'<i style="width:{100 * ms / longest:.3f}%;--c:{colours[op]}" title="{html.escape(op)}: {ms:.3f} ms"></i>'
            for op, ms in sorted(row["operators"].items(), key=lambda item: list(colours).index(item[0]))
            if ms > 0
        )
        parts.append(
            f'<span>{html.escape(row["name"])}</span><span class="bar">{pieces}</span>'
            f'<span class="num">{row["ms"]:.3f} ms</span>'
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def _table(phase: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    rows = "".join(
        f'<tr><td class="op" style="--c:{colours[row["name"]]}">{_breakable(row["name"])}<td>{row["ms"]:.3f}'
        f"<td>{row['share']:.1%}<td>{known(row['gb_per_s'], '.1f')}<td>{known(row['roof_share'], '.0%')}"
        f"<td>{row['bound'] or ''}<td>{row['count']:.4g}<td>{_kinds(row)}<td>{known(row['gflop_per_s'], '.1f')}"
        for row in phase["operators"]
    )
    return (
        '<div class="wide"><table><tr><th>operator<th>ms<th>share<th>GB/s<th>of the roof<th>bound by<th>runs'
        f"<th>weights MB<th>state MB<th>other MB<th>GFLOP/s{rows}</table></div>"
    )


def _kernels(phase: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Each kernel by itself, folded away."""
    rows = "".join(
        f'<tr><td class="op" style="--c:{colours[row["operator"]]}">{html.escape(row["name"])}<td>'
        f"{html.escape(row['layer'])}<td>{row['ms']:.3f}<td>{megabytes(row)}<td>{known(row['gb_per_s'], '.1f')}"
        f"<td>{known(row['roof_share'], '.0%')}"
        for row in phase["kernels"]
    )
    return (
        f'<details><summary>{_count(len(phase["kernels"]), "kernel")} by themselves</summary><div class="wide"><table>'
        f"<tr><th>kernel<th>layer<th>ms<th>MB moved<th>GB/s<th>of the roof{rows}</table></div></details>"
    )


def _breakable(name: str) -> str:
    """A name that may go on in a new line where a word of it begins."""
    return _HUMP.sub("<wbr>", html.escape(name))


def _kinds(row: Mapping[str, Any]) -> str:
    if row["bytes"] is None:
        return "not known<td><td>"
    return "<td>".join(f"{row['bytes'][kind] / 1e6:.2f}" for kind in ("weights", "state", "activations"))


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 480, 300, 52, 44, 14, 14


def _roofline(phase: Mapping[str, Any], roof: Mapping[str, Any] | None, colours: Mapping[str, str]) -> str:
    """Operations a byte from the left, operations a second from below, both in decades; a dot for each operator."""
    if roof is None:
        return '<p class="dim">Not known: the memory of this device is not measured.</p>'
    dots = [
        (row["name"], row["flops"] / sum(row["bytes"].values()), row["gflop_per_s"], row["share"])
        for row in phase["operators"]
        if row["flops"] and row["bytes"] and not row["bytes_not_known_ms"] and sum(row["bytes"].values())
    ]
    if not dots:
        return '<p class="dim">No operator whose operations are counted.</p>'
    ridge = roof["gflop_per_s"] / roof["gb_per_s"]
    plot = _Plot([x for _, x, _, _ in dots] + [ridge], [y for _, _, y, _ in dots] + [roof["gflop_per_s"]])
    (left, right), (low, _) = plot.across, plot.up
    start = max(left, low - math.log10(roof["gb_per_s"]))
    points = [
        plot.at(10**start, roof["gb_per_s"] * 10**start), plot.at(ridge, roof["gflop_per_s"]),
        plot.at(10**right, roof["gflop_per_s"]),
    ]  # fmt: skip
    line = " ".join(f"{x},{y}" for x, y in points)
    marks = "".join(_dot(plot, *dot, colours[dot[0]]) for dot in dots)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="roofline">{plot.grid()}'
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>{marks}</svg>'
        '<p class="dim">The line is the roof: memory on the slope, float32 products on the level part.</p>'
    )


def _dot(plot: _Plot, name: str, x: float, y: float, share: float, colour: str) -> str:
    at, down = plot.at(x, y)
    radius = 3 + 7 * math.sqrt(share)
    side, shift = ("end", -radius - 3) if at > 0.7 * _WIDTH else ("start", radius + 3)
    return (
        f'<circle cx="{at}" cy="{down}" r="{radius:.1f}" fill="{colour}"/>'
        f'<text x="{at + shift:.1f}" y="{down + 4:.1f}" text-anchor="{side}">{html.escape(name)}</text>'
    )


class _Plot:
    """A plane of decades.

    Args:
        xs: what must be in it.
        ys: likewise.
    """

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.across, self.up = _decades(xs), _decades(ys)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is, from the left and from above."""
        (left, right), (low, high) = self.across, self.up
        across = _LEFT + (math.log10(x) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - math.log10(y)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    def grid(self) -> str:
        """Lines at the decades, their numbers, and what the axes are."""
        (left, right), (low, high) = self.across, self.up
        parts = []
        for decade in range(left, right + 1):
            x, _ = self.at(10**decade, 10**low)
            parts.append(f'<path d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="var(--line)"/>')
            parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{10.0**decade:g}</text>')
        for decade in range(low, high + 1):
            _, y = self.at(10**left, 10**decade)
            parts.append(f'<path d="M{_LEFT} {y}H{_WIDTH - _RIGHT}" stroke="var(--line)"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{10.0**decade:g}</text>')
        parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 6}">operations a byte</text>')
        parts.append(
            f'<text x="14" y="{_HEIGHT - _BOTTOM}" transform="rotate(-90 14 {_HEIGHT - _BOTTOM})">GFLOP/s</text>'
        )
        return "".join(parts)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(1.5 * max(values)))
    return low, max(high, low + 1)


def _notes(result: Mapping[str, Any]) -> str:
    roof = result["roof"]
    measured = "" if roof is None else (
        f" The roof was measured between the rounds: {roof['array_mb']} MiB read with "
        f"{_count(roof['threads'], 'thread')}, and a product of float32 matrices. Caches and kernels of whole numbers "
        "can be faster than it."
    )  # fmt: skip
    return (
        "<h2>How to read this</h2><p>Bytes are those that must be moved at least: each weight, each slot of the state "
        "in use and each activation once. Operations are those of products; what is done once an element is not "
        f"counted.{measured} The profiler makes small kernels look larger than they are.</p>"
    )
