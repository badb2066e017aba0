"""The front as a picture: what KL divergence each size and each time costs, and what was measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_exporters.auto.formats import PROMPT, FormatChoices
from edgellm_exporters.auto.rates import Rates
from edgellm_exporters.auto.report import Attempt, Evidence, decode_ms, prefill_ms
from edgellm_exporters.auto.search import Choice, front, table_of
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.plan import Scheme

__all__ = ["check_library", "draw_front"]

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"
FRONT, CHOSEN, LIMIT = "#2f6f9f", "#d64545", "#d9a441"
_Time = Callable[[Sequence[FormatChoices], Mapping[str, Scheme], Rates | None], float]
_TIMES: Mapping[str, tuple[str, str, _Time]] = {
    "decode": ("decode", "one token", decode_ms),
    "prefill": ("prefill", f"a prompt of {PROMPT} tokens", lambda all_of, schemes, _: prefill_ms(all_of, schemes)),
}


def check_library() -> None:
    """Make sure that there is something to draw with, before minutes of work.

    Raises:
        QuantizeError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise QuantizeError("the report needs matplotlib, which is not installed; pip install matplotlib")


def draw_front(evidence: Evidence, path: Path) -> None:
    """Draw predicted KL against size and against the time of a token or a prompt, with the builds that were measured.

    Predictions are scaled by what the chosen build measured, so that line and points are one quantity.

    Args:
        evidence: what to draw.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    sizes = _Axis(lambda c: (c.nbytes + evidence.rest) / 1e6, lambda a: a.nbytes / 1e6)
    timed, of, ms = _TIMES["prefill" if evidence.budget.prefer == "prefill" else "decode"]
    candidates, rates = evidence.candidates, evidence.budget.rates
    times = _Axis(lambda c: ms(candidates, c.schemes, rates), lambda a: ms(candidates, a.choice.schemes, rates))
    _panel(left, evidence, "size", sizes)
    _panel(right, evidence, timed, times)
    left.set_xlabel("size of the bundle, MB", color=INK)
    how = "modelled for AVX-512 VNNI" if rates is None or timed == "prefill" else "by rates measured at the export"
    right.set_xlabel(f"products of {of}, ms ({how})", color=INK)
    left.set_ylabel("KL from the float model, nats a token", color=INK)
    if evidence.budget.max_size_mb is not None:
        left.axvline(evidence.budget.max_size_mb, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
        left.annotate(
            f" at most {evidence.budget.max_size_mb:g} MB", (evidence.budget.max_size_mb, 0.02),
            xycoords=("data", "axes fraction"), color=LIMIT, fontsize=8, rotation=90, va="bottom", ha="right",
        )  # fmt: skip
    right.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    figure.suptitle(
        "What quantization costs: the best predicted for each size and each time", x=0.01, ha="left",
        color=INK, fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, format="png", facecolor="white")


class _Axis:
    """Where assignments lie along an axis."""

    def __init__(self, of_choice: Callable[[Choice], float], of_attempt: Callable[[Attempt], float]) -> None:
        self.of_choice, self.of_attempt = of_choice, of_attempt


def _panel(axes: Any, evidence: Evidence, minimise: str, axis: _Axis) -> None:
    table = table_of(evidence.candidates, evidence.predictions, minimise, evidence.budget.rates)
    line = front(table)
    axes.plot(
        [axis.of_choice(c) for c in line], [c.kl * evidence.ratio for c in line], color=FRONT, linewidth=1.6,
        marker=".", markersize=3, label="predicted front, scaled to the measured build", zorder=2,
    )  # fmt: skip
    axes.axhline(evidence.budget.max_kl, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"at most {evidence.budget.max_kl:g} nats", (0.99, evidence.budget.max_kl),
        xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", color=LIMIT, fontsize=8,
        ha="right",
    )  # fmt: skip
    others = [a for a in evidence.attempts if a is not evidence.chosen]
    if others:
        axes.plot(
            [axis.of_attempt(a) for a in others], [a.report.kl for a in others], "o", color="white",
            markeredgecolor=CHOSEN, markersize=7, label="measured, not chosen", zorder=3,
        )  # fmt: skip
    axes.plot(
        [axis.of_attempt(evidence.chosen)], [evidence.chosen.report.kl], "o", color=CHOSEN, markersize=8,
        label="measured on held-out text: this bundle", zorder=4,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=QUIET, length=0, which="both")
