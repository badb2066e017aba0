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

__all__ = ["distance", "favourites", "tie_width"]

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


def tie_width(measured: Mapping[str, float], bounds: Mapping[str, float]) -> float:
    """How far apart two logits of the float model must be for their order to say anything of a bundle.

    A KL divergence of d nats is what errors of the logits make whose standard deviation, weighted by probability, is
    sqrt(2 d), as long as they are small. What the export measured is taken, so that a format is allowed no more than
    its own error was: 0 of float weights, in all that matters.

    Args:
        measured: at the export, against the float model.
        bounds: of the bundle; more than its bound on ``kl`` is not believed.
    """
    return math.sqrt(2 * max(0.0, min(measured.get("kl", 0.0), bounds.get("kl", 0.0))))


def favourites(golden: Golden, logits: Array, width: float) -> tuple[float, float]:
    """The share of tokens whose most likely successor is the golden's, or tied with it there; and without the ties.

    Args:
        golden: of the row.
        logits: (time, vocab).
        width: a logit of the golden that is less than so much below its largest is tied with it.
    """
    chosen = golden.top_ids == logits.argmax(axis=1)[:, None]  # (time, k); none where it is not among the largest
    tied = chosen & (golden.top_logits > golden.top_logits[:, :1] - width)
    return float((tied | chosen & (np.arange(chosen.shape[1]) == 0)).any(1).mean()), float(chosen[:, 0].mean())


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
