"""What a bundle gives the rows of a ragged batch against what it gives each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.checks.goldens import Golden
from edgellm_runtime.session import Session

__all__ = ["batch_difference", "relative"]

Array = NDArray[Any]


def batch_difference(session: Session, goldens: Sequence[Golden]) -> float:
    """The goldens cut to unequal lengths as one batch, then one more token each."""
    all_of = [*goldens, goldens[0]]
    rows = [g.tokens[: max(2, len(g.tokens) - 3 * i)] for i, g in enumerate(all_of)]
    if session.one_pass:
        return _of_whole_rows(session, rows)
    lengths = np.array([len(r) - 1 for r in rows], dtype=np.int32)
    padded = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : lengths[i]] = row[:-1]
    sources = [g.source[: max(1, len(g.source) - i)] for i, g in enumerate(all_of) if g.source is not None] or None
    together = session.new_state(len(rows), int(lengths.max()) + 1, sources=sources)
    first = session.step(padded, together, lengths=lengths).copy()
    second = session.step(np.array([[row[-1]] for row in rows]), together).copy()
    worst = 0.0
    for i, row in enumerate(rows):
        alone = session.new_state(1, len(row), sources=None if sources is None else [sources[i]])
        for tokens, found in ((row[:-1], first[i]), (row[-1:], second[i])):
            expected = session.step(tokens[None], alone)[0]
            worst = float(np.maximum(worst, relative(np.abs(found - expected).max(), expected)))
    return worst


def _of_whole_rows(session: Session, rows: Sequence[Array]) -> float:
    """Rows of unequal lengths as one batch: what each token gets, against the row alone."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    padded = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    together = session.new_state(len(rows), int(lengths.max()))
    found = session.step(padded, together, lengths=lengths, logits="all").copy()
    worst = 0.0
    for row, logits in zip(rows, found, strict=True):
        alone = session.step(row[None], session.new_state(1, len(row)), logits="all")[0]
        worst = float(np.maximum(worst, relative(np.abs(logits[: len(row)] - alone).max(), alone)))
    return worst


def relative(difference: Any, logits: Array) -> float:
    """A difference over the largest logit; NaN, which no bound holds, where all are 0."""
    largest = float(np.abs(logits).max())
    return float(difference) / largest if largest else float("nan")
