"""Beam search: the likeliest whole answers, several prompts at once, over forked states.

Hypotheses are compared by their log-probability over their length to the power of a penalty (Wu et al. 2016,
arXiv:1609.08144, without its constants); one beam is greedy decoding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_integer, check_number
from edgellm_runtime.errors import ContextError
from edgellm_runtime.session import Session
from edgellm_runtime.softmax import log_softmax
from edgellm_runtime.state import State

__all__ = ["Hypothesis", "beam_search", "read_prompts"]

Array = NDArray[Any]


class Hypothesis(NamedTuple):
    """An answer.

    Args:
        tokens: without the end token.
        log_probability: of all of it, the end token included where there is one.
        ended: whether it has an end token; if not, it ran into the limit.
    """

    tokens: tuple[int, ...]
    log_probability: float
    ended: bool

    def score(self, length_penalty: float) -> float:
        """What hypotheses are compared by."""
        return self.log_probability / float(max(1, len(self.tokens) + self.ended) ** length_penalty)

    @property
    def confidence(self) -> float:
        """The geometric mean of its tokens' probabilities."""
        return float(np.exp(self.score(1.0)))


@dataclass
class _Row:
    """What is known about one prompt's answer."""

    number: int  # the prompt's
    live: list[Hypothesis]
    finished: list[Hypothesis] = field(default_factory=list)


def read_prompts(session: Session, prompts: Sequence[Sequence[int]], room: int) -> tuple[State, Array]:
    """Read prompts into one state.

    Args:
        session: of the model.
        prompts: token ids, at least one each; sources, where the model has an encoder.
        room: tokens that are to follow.

    Returns:
        The state, and log-probabilities of the next token (prompts, vocab).

    Raises:
        ContextError: no room for one more token after a prompt.
    """
    if session.encoder is not None:
        start = np.array([session.encoder.start] * len(prompts))
        state = session.new_state(capacity=min(start.shape[1] + room, session.max_context), sources=prompts)
        return state, log_softmax(session.step(start, state)[:, -1])
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    if lengths.max() >= session.max_context:
        raise ContextError(
            f"a prompt of {lengths.max()} tokens leaves no room in the model's context of {session.max_context}; "
            "shorten it"
        )
    padded = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    state = session.new_state(len(prompts), min(int(lengths.max()) + room, session.max_context))
    return state, log_softmax(session.step(padded, state, lengths=lengths)[:, -1])


def beam_search(
    session: Session, prompts: Sequence[Sequence[int]], *, beams: int, max_new_tokens: int, eos: Collection[int],
    length_penalty: float = 1.0,
) -> list[Hypothesis]:  # fmt: skip
    """The best answer found for each prompt.

    An ending counts where it is among the ``beams`` likeliest continuations of a step, or as close behind as there are
    end tokens: to weigh every ending would favour answers that break off.

    Args:
        session: of the model.
        prompts: token ids, at least one each.
        beams: hypotheses that are followed for each prompt.
        max_new_tokens: the most tokens of an answer, the end token included; fewer when the context is full.
        eos: tokens that end an answer.
        length_penalty: 0 compares log-probabilities, 1 their means over the tokens.

    Raises:
        OptionError: a number outside its range.
        ContextError: a prompt is too long.
    """
    beams = check_integer("beams", beams, 1, session.width)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, 1)
    length_penalty = check_number("length_penalty", length_penalty, -10, 10)
    taken = max(map(len, prompts)) if session.encoder is None else len(session.encoder.start)
    limit = min(max_new_tokens, session.max_context - taken)
    state, next_ones = read_prompts(session, prompts, limit)
    rows = [_Row(i, [Hypothesis((), 0.0, False)]) for i in range(len(prompts))]
    done: list[_Row] = []
    for step in range(limit):
        origins = _advance(rows, next_ones, beams, frozenset(eos), length_penalty)
        finished = [_is_done(row, beams, length_penalty) for row in rows]
        done += [row for row, over in zip(rows, finished, strict=True) if over]
        kept = [i for i, over in enumerate(finished) if not over]
        parents = [parent for i in kept for parent in origins[i]]
        rows = [rows[i] for i in kept]
        if not rows or step + 1 == limit:
            break
        if parents != list(range(state.batch)):
            state = state.take(parents)
        last = np.array([[h.tokens[-1]] for row in rows for h in row.live])
        next_ones = log_softmax(session.step(last, state)[:, -1])
    best = {row.number: _best(row, length_penalty) for row in (*done, *rows)}
    return [best[i] for i in range(len(prompts))]


def _advance(
    rows: Sequence[_Row], next_ones: Array, beams: int, eos: frozenset[int], length_penalty: float
) -> list[list[int]]:
    """Let every hypothesis grow by a token; gives the rows of the state that each prompt's new ones come from."""
    parents, first = [], 0
    for row in rows:
        grown = np.array([h.log_probability for h in row.live])[:, None] + next_ones[first : first + len(row.live)]
        width, most = grown.shape[1], min(beams + len(eos), grown.size)
        flat = grown.reshape(-1)
        order = np.argpartition(-flat, most - 1)[:most]
        live: list[Hypothesis] = []
        origins: list[int] = []
        for index in order[np.lexsort((order, -flat[order]))]:  # best first; of equals, the earlier
            origin, token = divmod(int(index), width)
            before = row.live[origin]
            if token in eos:
                row.finished.append(Hypothesis(before.tokens, float(flat[index]), True))
            elif len(live) < beams:
                live.append(Hypothesis((*before.tokens, token), float(flat[index]), False))
                origins.append(first + origin)
        first += len(row.live)
        row.finished = sorted(row.finished, key=lambda h: -h.score(length_penalty))[:beams]
        row.live = live
        parents.append(origins)
    return parents


def _is_done(row: _Row, beams: int, length_penalty: float) -> bool:
    """Whether as many answers are finished as were asked for, and none that is not would now come before the worst."""
    if not row.live:
        return True
    if len(row.finished) < beams:
        return False
    return max(h.score(length_penalty) for h in row.live) <= row.finished[-1].score(length_penalty)


def _best(row: _Row, length_penalty: float) -> Hypothesis:
    """A finished answer where there is one."""
    return max(row.finished or row.live, key=lambda h: h.score(length_penalty))
