"""How well a bundle predicts a text: perplexity, window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm_runtime.errors import OptionError
from edgellm_runtime.session import Session
from edgellm_runtime.verify import log_softmax

__all__ = ["Evaluation", "evaluate", "windows_of"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: nats a token, its exponential, and how many tokens were predicted."""

    nll: float
    perplexity: float
    tokens: int


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
    """
    nlls = []
    for number, window in enumerate(windows):
        row = np.asarray(window, dtype=np.int64)
        state = session.new_state(1, len(row))
        for start in range(0, len(row) - 1, session.chunk):
            inputs = row[start : min(start + session.chunk, len(row) - 1)]
            targets = row[start + 1 : start + 1 + len(inputs)]
            found = log_softmax(session.step(inputs[None], state, logits="all")[0])
            nlls.append(-found[np.arange(len(targets)), targets])
        progress((number + 1) / len(windows))
    nll = np.concatenate(nlls)
    return Evaluation(float(nll.mean()), float(np.exp(nll.mean())), len(nll))
