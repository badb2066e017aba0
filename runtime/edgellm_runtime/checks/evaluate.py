"""How well a bundle predicts a text: perplexity, window by window; and how far its logits are from a reference's.

Logits are large, 150,000 of them for each position of some models: they are taken in pieces and reduced a few rows at a
time, so that neither memory nor the processor's caches see more of them than they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import OptionError
from edgellm_runtime.session import Session

__all__ = [
    "Distances",
    "Evaluation",
    "distances",
    "evaluate",
    "logsumexp",
    "mean_interval",
    "negative_log_likelihood",
    "piece_length",
    "windows_of",
]

Array = NDArray[Any]
_PIECE_LOGITS = 1 << 23  # float32 logits of one step: 32 MB
_BLOCK_LOGITS = 1 << 17  # float64 numbers of one block of rows: 1 MB, which stays in a core's cache


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: nats a token, its exponential, and how many tokens were predicted."""

    nll: float
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class Distances:
    """What :func:`distances` found at each position.

    Args:
        kl: KL divergence from the reference's distribution, nats.
        same: whether both have the same most likely token.
        nll: nats of the target under the found logits; fewer than positions where the last have no target.
        reference_nll: the same under the reference's.
    """

    kl: Array
    same: Array
    nll: Array
    reference_nll: Array


def windows_of(tokens: Sequence[int], length: int, limit: int = 0) -> list[list[int]]:
    """Cut tokens into windows of equal length; a rest of under half a window is left away, unless it is all there is.

    Args:
        tokens: the whole text.
        length: of a window.
        limit: the most tokens to take; 0 for all.

    Raises:
        OptionError: fewer than two tokens, or a window of fewer.
    """
    tokens = tokens[:limit] if limit else tokens
    if length < 2 or len(tokens) < 2:
        raise OptionError(f"{len(tokens)} tokens in windows of {length}; a prediction needs at least two of each")
    windows = [list(tokens[i : i + length]) for i in range(0, len(tokens), length)]
    if len(windows) > 1 and len(windows[-1]) < max(2, length // 2):
        windows.pop()
    return windows


def evaluate(
    session: Session, windows: Sequence[Sequence[int]], progress: Callable[[float], None] = lambda _: None
) -> Evaluation:
    """Predict each token of each window from those before it.

    Args:
        session: of the bundle.
        windows: rows of token ids, at least two each; each is read from an empty state.
        progress: told the share that is done.

    Raises:
        OptionError: the model labels tokens and predicts none, or answers sources.
    """
    if not session.predicts_tokens:
        raise OptionError("the model labels tokens and predicts no text; evaluate it at its task")
    if session.encoder is not None:
        raise OptionError("the model answers sources and goes on with no text; evaluate it at its task")
    total, done = sum(len(window) - 1 for window in windows), 0
    nlls = []
    for window in windows:
        for nll in _window(session, np.asarray(window, dtype=np.int64)):
            nlls.append(nll)
            done += len(nll)
            progress(done / total)
    nll = np.concatenate(nlls)
    return Evaluation(float(nll.mean()), float(np.exp(nll.mean())), len(nll))


def piece_length(session: Session) -> int:
    """How many positions' logits to ask of one step."""
    if session.one_pass:
        return session.max_context
    return max(1, min(session.chunk, _PIECE_LOGITS // session.width))


def _window(session: Session, row: Array) -> Iterator[Array]:
    state, length = session.new_state(1, len(row)), piece_length(session)
    for start in range(0, len(row) - 1, length):
        inputs = row[start : min(start + length, len(row) - 1)]
        logits = session.step(inputs[None], state, logits="all")[0]
        yield negative_log_likelihood(logits, row[start + 1 : start + 1 + len(inputs)])


def negative_log_likelihood(logits: Array, targets: Array) -> Array:
    """Nats of each row's target, in float64.

    Args:
        logits: (rows, vocab).
        targets: (rows,) token ids.
    """
    result = np.empty(len(targets))
    for rows in _blocks(logits):
        _, total, highest = _exponentials(logits[rows])
        chosen = np.take_along_axis(logits[rows], targets[rows, None], axis=1)[:, 0]
        result[rows] = np.log(total) - (chosen - highest)
    return result


def logsumexp(logits: Array) -> Array:
    """The logarithm of each row's summed exponentials, (rows,), in float64.

    Args:
        logits: (rows, vocab).
    """
    result = np.empty(len(logits))
    for rows in _blocks(logits):
        _, total, highest = _exponentials(logits[rows])
        result[rows] = np.log(total) + highest
    return result


def distances(reference: Array, found: Array, targets: Array) -> Distances:
    """Compare two models' logits for the same tokens.

    Args:
        reference: (rows, vocab), the logits to be met.
        found: (rows, vocab), those to be judged.
        targets: the token that comes next at each row; those of the last rows may be left away.
    """
    kl, same = np.empty(len(found)), np.empty(len(found), dtype=bool)
    for rows in _blocks(found):
        p, p_total, p_highest = _exponentials(reference[rows])
        _, q_total, q_highest = _exponentials(found[rows])
        # sum p (log p - log q): the logits' differences under p, and the difference of the two normalizers
        differences = np.subtract(reference[rows], found[rows], dtype=np.float64)
        shift = np.log(p_total) + p_highest - np.log(q_total) - q_highest
        kl[rows] = np.einsum("ij,ij->i", p, differences) / p_total - shift
        same[rows] = reference[rows].argmax(axis=1) == found[rows].argmax(axis=1)
    told = len(targets)
    return Distances(
        kl, same, negative_log_likelihood(found[:told], targets), negative_log_likelihood(reference[:told], targets)
    )


def mean_interval(values: Array, *, block: int = 32, draws: int = 2000) -> tuple[float, float]:
    """A 95% interval of a mean over neighbouring tokens, which are alike: by a bootstrap of blocks (Künsch 1989).

    Args:
        values: one for each token, in order.
        block: neighbours that are drawn together.
        draws: of the bootstrap, which always gives the same.
    """
    block = max(1, min(block, len(values) // 8))
    sums = np.convolve(values, np.ones(block), "valid")
    generator = np.random.default_rng(0)
    starts = generator.integers(0, len(sums), (draws, max(1, len(values) // block)))
    low, high = np.quantile(sums[starts].mean(axis=1) / block, [0.025, 0.975])
    return float(low), float(high)


def _blocks(logits: Array) -> Iterator[slice]:
    """Slices of a few rows each."""
    rows = max(1, _BLOCK_LOGITS // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _exponentials(logits: Array) -> tuple[Array, Array, Array]:
    """Exponentials of (rows, vocab) logits less each row's highest, their sums, and the highest; in float64."""
    highest = logits.max(axis=1).astype(np.float64)
    powers = np.subtract(logits, highest[:, None], dtype=np.float64)
    np.exp(powers, out=powers)
    return powers, powers.sum(axis=1), highest
