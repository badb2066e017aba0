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
        hidden: (features,), what ``token`` was chosen from.
        token: that the draft begins after.
        following: (drafted,) tokens.
        chances: (drafted,) of each to be right, by the drafter.
    """

    past: Array
    hidden: Array
    token: int
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
                int(entry["token"]), np.asarray(entry["next"], np.int64), np.asarray(entry["chance"], np.float64),
            )
            for entry in goldens_file(bundle)[DRAFTED]
        ]  # fmt: skip
        if not 0 < len(found) <= _MOST:
            raise ValueError(f"{len(found)} drafts")
        for golden in found:
            finite = all(np.isfinite(x).all() for x in (golden.past, golden.hidden, golden.chances))
            known = all(0 <= token < size for token in (golden.token, *golden.following.tolist()))
            same = golden.following.shape == golden.chances.shape and golden.following.ndim == 1
            fits = golden.hidden.shape == hidden.shape[-1:] and golden.past.shape == (info.width,)
            if not fits or not finite or not known or not same:
                raise ValueError("a draft of another model")
            if not 0 < len(golden.following) <= _MOST:
                raise ValueError(f"a draft of {len(golden.following)} tokens")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BundleError(f"{bundle.path}: no drafts to verify by ({first_line(error)}); export it again") from error
    return found


def draft_difference(graph: DraftGraph, goldens: list[DraftGolden]) -> float:
    """How far a drafter is from its goldens: the largest difference of a chance, or the share of tokens that differ."""
    steps, chances, tokens = graph.steps(), list[float](), list[bool]()
    for golden in goldens:
        token = golden.token
        steps.begin(golden.past)
        start: Array | None = golden.hidden
        for following, chance in zip(golden.following.tolist(), golden.chances.tolist(), strict=True):
            found, probable = steps.step(token, start)
            chances.append(abs(probable - chance))
            tokens.append(found != following)
            token, start = following, None
    return float(np.maximum(np.max(chances), np.mean(tokens)))
