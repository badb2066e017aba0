"""How far what a bundle computes for a row is from its golden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.checks.evaluate import logsumexp
from edgellm_runtime.checks.goldens import Golden
from edgellm_runtime.checks.layers import layer_difference

__all__ = ["distance"]

Array = NDArray[Any]


def distance(
    golden: Golden, logits: Array, state: Mapping[str, Array], hidden: Array | None = None
) -> dict[str, float]:
    """How far a row's logits and the state after it are from a golden: ``logits``, ``kl`` and ``state``, and ``hidden``
    where the golden has samples of it.

    Args:
        golden: of the row.
        logits: (time, vocab).
        state: by name, the slots in use; empty where none can be compared.
        hidden: (time, features).
    """
    last = {}
    if golden.hidden is not None:
        last["hidden"] = math.nan if hidden is None else layer_difference(golden.hidden, hidden)
    found = np.take_along_axis(logits, golden.top_ids, axis=1).astype(np.float64)
    return {
        "logits": float(np.abs(found - golden.top_logits).max()) / float(np.abs(golden.top_logits).max()),
        "kl": _coarse_kl(golden, found - logsumexp(logits)[:, None]),
        "state": _state_difference(golden, state),
        **last,
    }


def _coarse_kl(golden: Golden, found: Array) -> float:
    """KL over the sampled tokens, whose log-probabilities are found, and one bucket for all others.

    It is never more than the true one.
    """
    p, q = np.exp(golden.top_logits - golden.logsumexp[:, None]), np.exp(found)
    p, q = (np.concatenate([x, np.maximum(1 - x.sum(1, keepdims=True), 1e-12)], axis=1) for x in (p, q))
    return float((p * (np.log(p) - np.log(np.maximum(q, 1e-300)))).sum(axis=1).mean())


def _state_difference(golden: Golden, state: Mapping[str, Array]) -> float:
    if golden.state and not state:
        return float("nan")
    worst = 0.0
    for name, used in state.items():
        if name not in golden.state:
            return float("nan")
        index, expected = golden.state[name]
        if not len(index) or index.min() < 0 or index.max() >= used.size:
            return float("nan")
        difference = np.linalg.norm(used.reshape(-1)[index] - expected)
        worst = float(np.maximum(worst, difference / (np.linalg.norm(expected) + 1e-12)))
    return worst
