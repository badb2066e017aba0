"""The loss curve as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_losses"]

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN, VALIDATION, UNIGRAM = "#9fb3c8", "#d64545", "#7b8794"
SMOOTH = 0.05  # half-width of the smoothing, as a part of the run


def plot_losses(metrics: Sequence[dict[str, Any]], unigram_entropy: float, path: Path) -> None:
    """Draw training and validation loss over the steps, beside the unigram baseline.

    Args:
        metrics: lines of ``metrics.jsonl``.
        unigram_entropy: nats a token.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_lines(axes, metrics, unigram_entropy)
    axes.set_xlabel("step", color=QUIET)
    axes.set_title("Loss, nats per token", loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=QUIET, length=0)
    axes.margins(x=0)
    pending = path.with_name(path.name + ".tmp")
    figure.savefig(pending, format="png", facecolor="white")
    pending.replace(path)


def _draw_lines(axes: Any, metrics: Sequence[dict[str, Any]], unigram_entropy: float) -> None:
    steps, losses = _series(metrics, "loss")
    val_steps, val_losses = _series(metrics, "val_loss")
    last = max([*steps, *val_steps, 1])
    axes.plot(steps, losses, color=TRAIN, linewidth=0.8, alpha=0.45)
    axes.plot(steps, _smooth(losses), color=TRAIN, linewidth=2)
    marker = "o" if len(val_steps) <= 40 else ""
    axes.plot(
        val_steps, val_losses, color=VALIDATION, linewidth=2, marker=marker, markersize=4, clip_on=False, zorder=3
    )
    axes.axhline(unigram_entropy, color=UNIGRAM, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlim(0, last)
    labels = [(unigram_entropy, f"unigram {unigram_entropy:.3f}", UNIGRAM)]
    if val_losses:
        labels.append((val_losses[-1], f"validation {val_losses[-1]:.3f}", VALIDATION))
    if losses:
        smoothed = _smooth(losses)[-1]
        labels.append((smoothed, f"training {smoothed:.3f}", "#627d98"))
    _label_ends(axes, labels)


def _label_ends(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name each line at its right end, pushed apart where they would overlap; so there is no legend to look up."""
    low, high = axes.get_ylim()
    gap, below = (high - low) * 0.055, -math.inf
    for value, text, colour in sorted(labels):
        place = max(value, below + gap)
        axes.annotate(
            text, xy=(1, place), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
            va="center", color=colour, fontsize=9, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
        below = place


def _series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving mean over the steps around each one, narrower at the steep beginning so that it stays true."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    smoothed, widest = [], max(1, round(len(values) * SMOOTH))
    for i in range(len(values)):
        reach = min(widest, i)
        low, high = i - reach, min(len(values), i + reach + 1)
        smoothed.append((sums[high] - sums[low]) / (high - low))
    return smoothed
