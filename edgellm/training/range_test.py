"""Which learning rate to train with: one short run in which it rises from far too low to far too high.

Smith 2017, arXiv:1506.01186.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.errors import TrainingError
from edgellm.training.metrics import read_metrics
from edgellm.training.run import train_from_text
from edgellm.training.run_config import RunConfig
from edgellm.training.trainer import METRICS

__all__ = ["PLOT", "LearningRates", "find_learning_rate", "smoothed", "suggestion"]

PLOT = "lr-range.png"
_STEPS, _LOWEST, _HIGHEST = 100, 1e-5, 1.0
_REACH = 4  # neighbours on each side that a loss is smoothed with
_DIVERGED = 2.0  # times the lowest loss
_FEWEST = 10  # steps that tell anything
_REST = 0.2  # of the fall: with no more of it left, it is as good as over
_NOISE = 4.0  # a fall is more than so many times what the loss wanders from one step to the next


@dataclass(frozen=True)
class LearningRates:
    """What a range test found.

    Args:
        rates: tried, rising.
        losses: smoothed, up to where they diverge.
        steepest: the rate at which the loss fell fastest.
        suggested: the rate at which four fifths of the fall are done.
        plot: the picture.
    """

    rates: Sequence[float]
    losses: Sequence[float]
    steepest: float
    suggested: float
    plot: Path

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "plot": str(self.plot)}


def find_learning_rate(config: RunConfig, out: Path, *, say: Callable[[str], None] | None = None) -> LearningRates:
    """Try rising rates on the run's own model and data; nothing but a picture is kept.

    Args:
        config: the run.
        out: the folder of the picture.
        say: told what is being done.

    Raises:
        TrainingError: as for :func:`edgellm.training.train_from_text`, or a loss that never falls.
    """
    options = dataclasses.replace(
        config.options, steps=_STEPS, warmup=_STEPS, min_lr_fraction=1.0, minutes=0.0, patience=0, lr=_HIGHEST,
        lr_from=_LOWEST, eval_every=_STEPS + 1, save_every=_STEPS + 1, keep_best=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        try:
            train_from_text(dataclasses.replace(config, options=options), folder, say=say)
        except TrainingError:
            if not (folder / METRICS).exists():
                raise  # before the first step; a loss that is not finite only ends the test
        lines = read_metrics(folder / METRICS)
    rates, losses = smoothed([(line["lr"], line["loss"]) for line in lines])
    steepest, suggested = suggestion(rates, losses)
    found = LearningRates(rates, losses, steepest, suggested, out / PLOT)
    out.mkdir(parents=True, exist_ok=True)
    _draw(found)
    return found


def suggestion(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """The rate at which the loss falls fastest, and the one to train with.

    Where rates are too high the loss need not diverge: it may wander on a plateau, whose lowest point is chance. So not
    the lowest point counts but where the fall is as good as over.

    Args:
        rates: tried, rising.
        losses: smoothed.

    Raises:
        TrainingError: too few points, or a loss that never falls.
    """
    if len(losses) < _FEWEST:
        raise TrainingError(f"only {len(losses)} steps were finite; check the data, or lower the range")
    start, lowest = statistics.median(losses[: _FEWEST // 2]), min(losses)
    wander = statistics.median(abs(b - a) for a, b in itertools.pairwise(losses))  # from step to step
    if start - lowest <= _NOISE * wander:
        raise TrainingError("the loss never falls, whatever the learning rate; check the data")
    over = next(i for i, loss in enumerate(losses) if loss <= lowest + _REST * (start - lowest))
    slopes = [losses[i] - losses[max(0, i - 3)] for i in range(over + 1)]
    steepest = rates[min(range(len(slopes)), key=slopes.__getitem__)]
    return steepest, rates[over]


def smoothed(points: Sequence[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """The rates, and the mean of each loss and its neighbours on both sides, up to where the loss has diverged."""
    finite = list(itertools.takewhile(lambda point: point[1] is not None and math.isfinite(point[1]), points))
    raw = [float(loss) for _, loss in finite if loss is not None]
    rates: list[float] = []
    losses: list[float] = []
    for i, (rate, _) in enumerate(finite):
        reach = min(_REACH, i, len(raw) - 1 - i)  # as far on one side as on the other: a mean that lags misleads
        value = statistics.fmean(raw[i - reach : i + reach + 1])
        if losses and value > _DIVERGED * min(losses):
            break
        rates.append(rate)
        losses.append(value)
    return rates, losses


def _draw(found: LearningRates) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="#d64545", linewidth=2)
    axes.axvline(found.suggested, color="#7b8794", linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"suggested {found.suggested:.1e}", (found.suggested, max(found.losses)), xytext=(6, -4),
        textcoords="offset points", color="#7b8794", fontsize=9, fontweight="bold",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color="#7b8794")
    axes.set_title(
        "Loss, nats per token, as the rate rises", loc="left", color="#1f2933", fontsize=12, fontweight="bold"
    )
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    pending = found.plot.with_name(found.plot.name + ".tmp")
    figure.savefig(pending, format="png", facecolor="white")
    pending.replace(found.plot)
