"""Whether one set of times differs from another, and by how much, with an interval that can be trusted.

Times are compared by their logarithms, so that a ratio is what comes out. Rounds that were taken in turn are compared
in pairs: what slows the machine for a while slows both, and drops out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "compare", "interval"]

Verdict = Literal["faster", "slower", "no difference"]
_RESAMPLES = 2000
_TENTH = 10
# Student's t, two-sided 95%, by degrees of freedom; beyond, it is that of the normal distribution to a hundredth.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_T99 = (63.657, 9.925, 5.841, 4.604, 4.032, 3.707)  # 99%: of so few rounds nobody knows how they are distributed
APART = 0.03  # runs that were not taken in turn differ by so much for no reason of the program's


@dataclass(frozen=True)
class Comparison:
    """How one set of times stands to another.

    Args:
        speed: times as fast as the first: above 1 is faster.
        low: of the 95% interval of that.
        high: likewise.
        paired: whether rounds were taken in turn.
    """

    speed: float
    low: float
    high: float
    paired: bool

    @property
    def verdict(self) -> Verdict:
        """What can be said of it."""
        least = 1.0 if self.paired else 1.0 + APART
        if self.low > least:
            return "faster"
        return "slower" if self.high < 1 / least else "no difference"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.speed:.3f}x ({self.low:.3f} to {self.high:.3f})"


def interval(times: Sequence[float]) -> tuple[float, float]:
    """A 95% interval of the median, by the bootstrap; of a single time, itself."""
    values = np.asarray(times, dtype=float)
    medians = _resampled([values], lambda parts: np.median(parts[0], axis=1))
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def compare(first: Sequence[float], second: Sequence[float], *, paired: bool) -> Comparison:
    """How much faster the second is.

    The interval is the wider of a bootstrap's and of Student's t, each of the mean logarithm without its outermost
    tenths: with few rounds the one alone is too narrow, with odd ones the other.

    Args:
        first: seconds of each round.
        second: likewise; of the same rounds, if ``paired``.
        paired: whether they were taken in turn.
    """
    a, b = np.log(np.asarray(first, dtype=float)), np.log(np.asarray(second, dtype=float))
    if paired:
        count = min(len(a), len(b))
        samples = [a[:count] - b[:count]]
    else:
        samples = [a, -b]
    middle = sum(float(_means(x[None])[0]) for x in samples)
    reach = math.hypot(*map(_reach, samples))
    found = _resampled(samples, lambda parts: np.add.reduce([_means(x) for x in parts]))
    low = min(middle - reach, float(np.quantile(found, 0.025)))
    high = max(middle + reach, float(np.quantile(found, 0.975)))
    return Comparison(math.exp(middle), math.exp(low), _exp(high), paired)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _cut(count: int) -> int:
    return count // _TENTH


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means (rows,) of values (rows, count) without the outermost tenths: a hiccup of the machine is left out."""
    count = values.shape[1]
    means: NDArray[np.float64] = np.sort(values, axis=1)[:, _cut(count) : count - _cut(count)].mean(axis=1)
    return means


def _reach(values: NDArray[np.float64]) -> float:
    """Half the 95% interval of such a mean, by Yuen's formula (1974): tenths count as the next value inwards."""
    count, cut = len(values), _cut(len(values))
    degrees = count - 2 * cut - 1
    if degrees < 1:
        return math.inf
    order = np.sort(values)
    drawn = np.clip(values, order[cut], order[count - cut - 1])
    error = float(drawn.std(ddof=1)) / ((1 - 2 * cut / count) * math.sqrt(count))
    return error * ((*_T99, *_T[len(_T99) :])[degrees - 1] if degrees <= len(_T) else 1.96)


def _resampled(
    samples: Sequence[NDArray[np.float64]], figure: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """A figure of each of many resamples; the same for the same values, each time."""
    draw = np.random.default_rng(0)
    return figure([x[draw.integers(0, len(x), (_RESAMPLES, len(x)))] for x in samples])
