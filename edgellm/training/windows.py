"""Which tokens a step sees: a pure function of (seed, step), so that resuming needs no position in the data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgellm.training.tokens import Tokens

__all__ = ["even_offsets", "random_offsets", "step_seed", "windows"]

Offsets = npt.NDArray[np.int64]


def random_offsets(count: int, tokens: int, context: int, *, seed: int, step: int) -> Offsets:
    """Where the windows of a step begin: independent and uniform over the text, (count,).

    Args:
        count: windows, over all processes and accumulated batches.
        tokens: how many there are in the text.
        context: tokens in a window, not counting the one after it.
        seed: the run's.
        step: updates done before this one.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64)))
    return generator.integers(0, tokens - context, size=count, dtype=np.int64)


def even_offsets(count: int, tokens: int, context: int) -> Offsets:
    """At most ``count`` windows that do not overlap, spread evenly over the text."""
    available = (tokens - 1) // context
    count = min(count, available)
    return (np.arange(count, dtype=np.int64) * available // count) * context


def windows(tokens: Tokens, offsets: Offsets, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and the tokens that follow them, both (len(offsets), context) int64."""
    rows = np.stack([tokens[start : start + context + 1] for start in offsets]).astype(np.int64)
    both = torch.from_numpy(rows).to(device, non_blocking=True)  # (windows, context + 1)
    return both[:, :-1], both[:, 1:]


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout in one process: unrelated from step to step, and nothing to save."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
