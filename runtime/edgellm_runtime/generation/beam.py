"""Beam search: the likeliest whole answers, several prompts at once, over forked states.

Hypotheses are compared by their log-probability over their length to the power of a penalty (Wu et al. 2016,
arXiv:1609.08144, without its constants); one beam is greedy decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_integer, check_number
from edgellm_runtime.errors import BackendError, ContextError
from edgellm_runtime.generation.logprobs import TokenLogprobs, logprobs_of
from edgellm_runtime.session import Session
from edgellm_runtime.softmax import log_softmax
from edgellm_runtime.state import State

__all__ = ["Hypothesis", "Rules", "beam_search", "follow_beams", "read_prompts"]

Array = NDArray[Any]


class Hypothesis(NamedTuple):
    """An answer.

    Args:
        tokens: without the end token.
        log_probability: of all of it, the end token included where there is one.
        ended: whether it has an end token; if not, it ran into the limit or was stopped.
        end: the end token.
        logprobs: of each token, the end token's last, where they were asked for.
    """

    tokens: tuple[int, ...]
    log_probability: float
    ended: bool
    end: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()

    def score(self, length_penalty: float) -> float:
        """What hypotheses are compared by."""
        return self.log_probability / float(max(1, len(self.tokens) + self.ended) ** length_penalty)

    @property
    def confidence(self) -> float:
        """The geometric mean of its tokens' probabilities."""
        return float(np.exp(self.score(1.0)))


@dataclass(frozen=True)
class Rules:
    """How the answer to one prompt is looked for.

    Args:
        beams: hypotheses that are followed.
        limit: the most tokens of an answer, the end token included.
        eos: tokens that end it.
        length_penalty: 0 compares log-probabilities, 1 their means over the tokens.
        changed: the logits (vocab,) to go by instead, of an answer's tokens and the model's own; None: those.
        stopped: whether an answer's tokens end it; None: none do.
        logprobs: so many of the most probable tokens are noted beside each; None: nothing is.
    """

    beams: int
    limit: int
    eos: frozenset[int]
    length_penalty: float = 1.0
    changed: Callable[[tuple[int, ...], Array], Array] | None = None
    stopped: Callable[[tuple[int, ...]], bool] | None = None
    logprobs: int | None = None


@dataclass
class _Row:
    """What is known about one prompt's answer."""

    number: int  # the prompt's
    rules: Rules
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
    state, logits = _read(session, prompts, room)
    return state, log_softmax(logits)


def _read(session: Session, prompts: Sequence[Sequence[int]], room: int) -> tuple[State, Array]:
    if session.encoder is not None:
        start = np.array([session.encoder.start] * len(prompts))
        state = session.new_state(capacity=min(start.shape[1] + room, session.max_context), sources=prompts)
        return state, session.step(start, state)[:, -1]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int32)
    if lengths.max() >= session.max_context:
        raise ContextError(
            f"a prompt of {lengths.max()} tokens leaves no room in the model's context of {session.context_words}; "
            "shorten it"
        )
    padded = np.zeros((len(prompts), lengths.max()), dtype=np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    state = session.new_state(len(prompts), min(int(lengths.max()) + room, session.max_context))
    return state, session.step(padded, state, lengths=lengths)[:, -1]


def beam_search(
    session: Session, prompts: Sequence[Sequence[int]], *, beams: int, max_new_tokens: int, eos: Collection[int],
    length_penalty: float = 1.0,
) -> list[Hypothesis]:  # fmt: skip
    """The best answer found for each prompt.

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
    state, logits = _read(session, prompts, limit)
    rules = Rules(beams, limit, frozenset(eos), length_penalty)
    return [found[0] for found in follow_beams(session, state, logits, [rules] * len(prompts))]


def follow_beams(
    session: Session, state: State, logits: Array, rules: Sequence[Rules], ended: Callable[[], bool] = lambda: False
) -> list[list[Hypothesis]]:
    """Answers to prompts that have been read, the best first: the finished ones, then those that are not.

    An ending counts where it is among the ``beams`` likeliest continuations of a step, or as close behind as there are
    end tokens: to weigh every ending would favour answers that break off.

    Args:
        session: of the model.
        state: a row for each prompt; stays as it is.
        logits: (prompts, vocab), after each.
        rules: of each.
        ended: whether to stop where it is, from outside; asked before each step.

    Raises:
        BackendError: a best logit that is no number.
    """
    rows = [_Row(i, r, [Hypothesis((), 0.0, False)]) for i, r in enumerate(rules)]
    done: list[_Row] = []
    first, step = True, 0
    while True:
        origins = _advance(rows, logits)
        step += 1
        finished = [_is_done(row, step) for row in rows]
        done += [row for row, over in zip(rows, finished, strict=True) if over]
        kept = [i for i, over in enumerate(finished) if not over]
        parents = [parent for i in kept for parent in origins[i]]
        rows = [rows[i] for i in kept]
        if not rows or ended():
            break
        if first or parents != list(range(state.batch)):
            state, first = state.take(parents), False
        last = np.array([[h.tokens[-1]] for row in rows for h in row.live])
        logits = session.step(last, state)[:, -1]
    best = {row.number: _best(row) for row in (*done, *rows)}
    return [best[i] for i in range(len(rules))]


def _advance(rows: Sequence[_Row], logits: Array) -> list[list[int]]:
    """Let every hypothesis grow by a token; gives the rows of the state that each prompt's new ones come from."""
    parents, first = [], 0
    for row in rows:
        rules, own = row.rules, logits[first : first + len(row.live)]
        grown = np.array([h.log_probability for h in row.live])[:, None] + _next_ones(row, own)
        width, most = grown.shape[1], min(rules.beams + len(rules.eos), grown.size)
        flat = grown.reshape(-1)
        order = np.argpartition(-flat, most - 1)[:most]
        live: list[Hypothesis] = []
        origins: list[int] = []
        for index in order[np.lexsort((order, -flat[order]))]:  # best first; of equals, the earlier
            if not np.isfinite(flat[index]):  # what is forbidden
                break
            origin, token = divmod(int(index), width)
            made = _grown(row.live[origin], token, float(flat[index]), own[origin], rules)
            if made.ended or (rules.stopped is not None and rules.stopped(made.tokens)):
                row.finished.append(made)
            elif len(live) < rules.beams:
                live.append(made)
                origins.append(first + origin)
        first += len(row.live)
        row.finished = sorted(row.finished, key=lambda h: -h.score(rules.length_penalty))[: rules.beams]
        row.live = live
        parents.append(origins)
    return parents


def _next_ones(row: _Row, logits: Array) -> Array:
    """Log-probabilities (hypotheses, vocab) of a row's next tokens."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise BackendError(
            f"the model's best logit is {logits.max()}; verify the bundle on this device, then export it again"
        )
    if row.rules.changed is not None:
        logits = np.stack([row.rules.changed(h.tokens, x) for h, x in zip(row.live, logits, strict=True)])
    return log_softmax(logits)


def _grown(before: Hypothesis, token: int, log_probability: float, logits: Array, rules: Rules) -> Hypothesis:
    noted = before.logprobs
    if rules.logprobs is not None:
        noted = (*noted, logprobs_of(logits, token, rules.logprobs))
    if token in rules.eos:
        return Hypothesis(before.tokens, log_probability, True, token, noted)
    return Hypothesis((*before.tokens, token), log_probability, False, None, noted)


def _is_done(row: _Row, step: int) -> bool:
    """Whether as many answers are finished as were asked for, and none that is not would now come before the worst."""
    penalty = row.rules.length_penalty
    if not row.live or step >= row.rules.limit:
        return True
    if len(row.finished) < row.rules.beams:
        return False
    return max(h.score(penalty) for h in row.live) <= row.finished[-1].score(penalty)


def _best(row: _Row) -> list[Hypothesis]:
    """Finished answers before those that are not."""
    live = sorted(row.live, key=lambda h: -h.score(row.rules.length_penalty))
    return [*row.finished, *live]
