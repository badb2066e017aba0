"""Whether what was counted may have been drawn from a distribution."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np


def softmax(logits: Any, temperature: float) -> Any:
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return weights / weights.sum()


def check_drawn(counted: Counter[int], expected: Any) -> None:
    """Chi-square, rare ones together, within five deviations of its mean.

    Args:
        counted: how often each was drawn.
        expected: (outcomes,) probabilities.
    """
    total = sum(counted.values())
    assert total > 20
    common = [t for t in range(len(expected)) if expected[t] * total >= 5]
    rest = total * (1 - sum(expected[t] for t in common))
    seen = [counted[t] for t in common] + [total - sum(counted[t] for t in common)]
    due = [expected[t] * total for t in common] + [rest]
    square = sum((a - b) ** 2 / b for a, b in zip(seen, due, strict=True) if b > 1e-9)
    assert square < len(common) + 5 * (2 * len(common)) ** 0.5
