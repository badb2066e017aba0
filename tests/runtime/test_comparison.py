"""The comparison of times: what it calls a difference, over many simulated runs of a noisy machine."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm_runtime.checks.comparison import APART, compare, interval

RUNS = 300


def rounds(draw: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of two programs that are equally fast, taken in turn: drift, noise of 1.2%, and a hiccup now and then."""
    drift = np.cumsum(draw.normal(0, 0.004, 2 * count))
    noise = draw.normal(0, 0.012, 2 * count) + (draw.random(2 * count) < 0.05) * draw.exponential(0.1, 2 * count)
    times = np.exp(drift + noise)
    return times[::2], times[1::2]


@pytest.mark.parametrize("count", [5, 10, 20])
def test_equal_programs_are_told_apart_in_at_most_one_run_of_twenty(count: int) -> None:
    draw = np.random.default_rng(count)
    found = [compare(*rounds(draw, count), paired=True).verdict for _ in range(RUNS)]
    assert sum(verdict != "no difference" for verdict in found) <= 0.05 * RUNS


def test_a_slowdown_of_three_percent_is_found_in_nine_runs_of_ten() -> None:
    draw = np.random.default_rng(3)
    pairs = [rounds(draw, 20) for _ in range(RUNS)]
    assert sum(compare(a, 1.03 * b, paired=True).verdict == "slower" for a, b in pairs) >= 0.9 * RUNS
    assert sum(compare(1.03 * a, b, paired=True).verdict == "faster" for a, b in pairs) >= 0.9 * RUNS


def test_runs_at_other_times_differ_only_beyond_what_machines_do() -> None:
    draw = np.random.default_rng(4)
    found = []
    for _ in range(RUNS):
        (a, _), (b, _) = rounds(draw, 20), rounds(draw, 20)
        found.append(compare(a, b * np.exp(draw.normal(0, 0.01)), paired=False).verdict)
    assert sum(verdict != "no difference" for verdict in found) <= 0.05 * RUNS
    assert compare([1.0] * 9, [1 + 2 * APART] * 9, paired=False).verdict == "slower"
    assert compare([1.0] * 9, [1 + APART / 2] * 9, paired=False).verdict == "no difference"


def test_one_round_says_nothing() -> None:
    found = compare([1.0], [5.0], paired=True)
    assert (found.verdict, found.low, found.high) == ("no difference", 0.0, float("inf"))
    assert found.speed == pytest.approx(0.2)


def test_the_interval_holds_the_median_and_narrows_with_rounds() -> None:
    draw = np.random.default_rng(5)
    few, many = draw.normal(1, 0.1, 8), draw.normal(1, 0.1, 200)
    for values in (few, many):
        low, high = interval(values)
        assert low <= np.median(values) <= high
    assert np.subtract(*interval(many)) > np.subtract(*interval(few))
    assert interval([2.0]) == (2.0, 2.0)
    assert interval(few) == interval(few)
