"""A bundle's drafter held to what PyTorch's proposes, from the same hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.draft_graph import DraftGraph
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.goldens import goldens_file
from edgellm_runtime.errors import BundleError, first_line

__all__ = ["DRAFTED", "DraftGolden", "draft_difference", "draft_goldens"]

DRAFTED = "drafter"  # in the goldens, and the name of the check
_MOST = 64  # of each
Array = NDArray[Any]


@dataclass(frozen=True)
class DraftGolden:
    """What PyTorch drafts from one place.

    Args:
        past: (width,), the state that the draft begins with.
        hidden: (tokens, features), what each of them was chosen from.
        tokens: (tokens,) that are read, the draft begins after the last.
        following: (drafted,) tokens.
        chances: (drafted,) of each to be right, by the drafter.
    """

    past: Array
    hidden: Array
    tokens: Array
    following: Array
    chances: Array


def draft_goldens(bundle: Bundle) -> list[DraftGolden]:
    """Those of a bundle with a drafter.

    Raises:
        BundleError: there are none, or none of this drafter.
    """
    hidden, size, info = bundle.manifest.signature.hidden, bundle.manifest.vocab_size, bundle.manifest.drafter
    assert hidden is not None and info is not None
    try:
        found = [
            DraftGolden(
                np.asarray(entry.get("past", [0.0] * info.width), np.float32), np.asarray(entry["hidden"], np.float32),
                np.asarray(entry["token"], np.int64), np.asarray(entry["next"], np.int64),
                np.asarray(entry["chance"], np.float64),
            )
            for entry in goldens_file(bundle)[DRAFTED]
        ]  # fmt: skip
        if not 0 < len(found) <= _MOST:
            raise ValueError(f"{len(found)} drafts")
        for golden in found:
            finite = all(np.isfinite(x).all() for x in (golden.past, golden.hidden, golden.chances))
            known = all(
                0 <= token < size for x in (golden.tokens, golden.following) for token in x.reshape(-1).tolist()
            )
            same = golden.following.shape == golden.chances.shape and golden.following.ndim == 1
            fits = golden.hidden.shape == (golden.tokens.size, hidden.shape[-1]) and golden.past.shape == (info.width,)
            if not fits or not finite or not known or not same:
                raise ValueError("a draft of another model")
            if golden.tokens.ndim != 1 or not 0 < len(golden.tokens) <= _MOST or not 0 < len(golden.following) <= _MOST:
                raise ValueError(f"a draft of {golden.following.size} tokens after {golden.tokens.size}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{bundle.path}: no drafts to verify by ({first_line(error)}); export it again") from error
    return found


def draft_difference(graph: DraftGraph, goldens: list[DraftGolden]) -> float:
    """How far a drafter is from its goldens: the largest difference of a chance, or the share of tokens that differ."""
    steps, chances, tokens = graph.steps(), list[float](), list[bool]()
    for golden in goldens:
        steps.begin(golden.past)
        found, probable = steps.read(golden.tokens.tolist(), golden.hidden)
        for at, (following, chance) in enumerate(zip(golden.following.tolist(), golden.chances.tolist(), strict=True)):
            if at:
                found, probable = steps.guess(int(golden.following[at - 1]))
            chances.append(abs(probable - chance))
            tokens.append(found != following)
    return float(np.maximum(np.max(chances), np.mean(tokens)))
