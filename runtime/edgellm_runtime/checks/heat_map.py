"""A divergence as one HTML file that needs nothing else: a table, and a map of layers by steps."""

from __future__ import annotations

import html
import itertools

import numpy as np

from edgellm_runtime.checks.divergence import Divergence

__all__ = ["heat_map", "shade"]

_LOW, _HIGH = -7.0, 0.0  # decades of the relative difference
_CELL = 8  # pixels
_COLUMNS = 512  # steps; neighbours share one where there are more, the worse of them
_COLOURS = {"exact": "#2e7d32", "rounding": "#2e7d32", "quantization": "#b26a00", "wrong": "#c62828"}
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em;color:#1f2933}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #e4e7eb}td:first-child,th:first-child"
    "{text-align:left}"
)


def shade(difference: float) -> str:
    """A colour for a relative difference: white for none, then blue, to dark red for as large as what is expected."""
    decade = np.log10(max(difference, 1e-30)) if np.isfinite(difference) else _HIGH
    share = float(np.clip((decade - _LOW) / (_HIGH - _LOW), 0, 1))
    stops = [(255, 255, 255), (144, 190, 220), (250, 200, 90), (165, 20, 30)]
    place = share * (len(stops) - 1)
    low = min(int(place), len(stops) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def heat_map(found: Divergence, title: str) -> str:
    """The page."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(_sentence(found))}</p>"
        f"{_table(found)}{_map(found)}</html>\n"
    )


def _sentence(found: Divergence) -> str:
    figures = f"KL {found.kl:.3g} nats a token, top-1 {found.top1:.1%} over {found.tokens} tokens."
    if found.wrong is not None:
        return f"{figures} The first layer that is wrong: {found.wrong.name}."
    if found.first is None:
        return f"{figures} No layer is further off than rounding."
    return f"{figures} The two part at {found.first.name}, step {found.first.first_step}; no layer is wrong."


def _table(found: Divergence) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(r.name)}<td>{r.cosine:.6f}<td>{r.norm_ratio:.4f}<td>{r.max_error:.2e}<td>{r.typical:.2e}"
        f'<td>{r.worst:.2e}<td>{"" if r.first_step is None else r.first_step}<td style="color:{_COLOURS[r.verdict]}">'
        f"{r.verdict}"
        for r in found.layers
    )
    state = "".join(f"<tr><td>{html.escape(s.name)}<td>{s.difference:.2e}" for s in found.state)
    return (
        "<table><tr><th>layer<th>cosine<th>norm ratio<th>max error<th>typical<th>worst<th>first step<th>verdict"
        f"{rows}</table><table><tr><th>state<th>relative difference{state}</table>"
    )


def _map(found: Divergence) -> str:
    """Layers from the top, steps from the left."""
    width = found.steps.shape[1]
    edges = np.linspace(0, width, min(width, _COLUMNS) + 1).astype(int)
    columns = [found.steps[:, a:b].max(axis=1) for a, b in itertools.pairwise(edges)]
    cells = "".join(
        f'<rect x="{x * _CELL}" y="{y * _CELL}" width="{_CELL}" height="{_CELL}" fill="{shade(float(value))}"/>'
        for x, column in enumerate(columns)
        for y, value in enumerate(column)
    )
    size = (len(columns) * _CELL, len(found.layers) * _CELL)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" role="img" '
        'aria-label="relative difference, layers by steps">'
        f'<rect width="100%" height="100%" fill="#e4e7eb"/>{cells}</svg>'
        "<p>Rows are layers from the first to the logits, columns are steps; white is 1e-7 and below, red is 1.</p>"
    )
