"""How probable the model held a token, and which it held for the most probable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.generation.sampling import top_ids

__all__ = ["TokenLogprobs", "logprobs_of"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities for one place of an answer.

    They are the model's own: of its logits before any processor, penalty, temperature or filter.

    Args:
        token: the chosen one.
        logprob: its.
        top: the most probable tokens with theirs, the best first; of equals the lower id first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
    """The chosen token's and the most probable ones'.

    Args:
        logits: (vocab,).
        token: the chosen one.
        count: how many of the most probable; 0 for none.
    """
    best = logits.max()
    total = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    ids = top_ids(logits, min(count, len(logits))) if count else np.empty(0, dtype=np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    top = tuple((i, float(logits[i]) - total) for i in ids.tolist())
    return TokenLogprobs(token, float(logits[token]) - total, top)
