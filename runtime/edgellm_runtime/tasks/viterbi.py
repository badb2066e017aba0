"""The best labels of a sentence among those that make whole spans (Viterbi 1967)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.softmax import log_softmax

__all__ = ["may_follow", "viterbi"]


def may_follow(before: str | None, label: str) -> bool:
    """Whether a label may come after another (None: at the beginning): ``I-X`` goes on with ``B-X`` or ``I-X`` only."""
    return not label.startswith("I-") or (before is not None and before[:1] in ("B", "I") and before[2:] == label[2:])


def viterbi(logits: NDArray[Any], labels: Sequence[str]) -> tuple[list[str], float]:
    """The most probable sequence of labels in which every span has a beginning.

    Args:
        logits: (words, labels).
        labels: their names.

    Returns:
        A label for each word, and the geometric mean of their probabilities.
    """
    scores = log_softmax(logits)  # (words, labels)
    allowed = np.array([[may_follow(a, b) for b in labels] for a in labels])
    forbidden = np.where(allowed, 0.0, -np.inf)  # (before, after)
    best = np.where([may_follow(None, label) for label in labels], scores[0], -np.inf)
    came_from = np.zeros(scores.shape, dtype=np.int64)
    for t in range(1, len(scores)):
        paths = best[:, None] + forbidden
        came_from[t] = paths.argmax(axis=0)
        best = paths.max(axis=0) + scores[t]
    path = [int(best.argmax())]
    for t in range(len(scores) - 1, 0, -1):
        path.append(int(came_from[t, path[-1]]))
    return [labels[i] for i in reversed(path)], float(np.exp(best.max() / len(scores)))
