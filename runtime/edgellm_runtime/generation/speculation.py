"""Several tokens of one text in one step: drafted, checked, and kept as far as they are what would have been chosen.

Each token is chosen from the model's own logits by the run's own sampler, in order, with one draw each, until one is
not the drafted one. So the text is the one without drafts: greedy or drawn, whatever the drafts are, as far as kernels
round a token in a step of several as in a step of its own. What the state has read too much is taken back: slots are
forgotten, recurrences and rings go back to a snapshot from before the step and read the right tokens again in the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.generation.drafting import Drafter, RecurrentDrafter
from edgellm_runtime.generation.logprobs import TokenLogprobs
from edgellm_runtime.generation.pace import Pace
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.state.snapshot import Snapshot, overwritten

__all__ = ["Choice", "Speculation", "Speculator"]

_MOST_PENDING = 8  # tokens that are read a second time with a draft behind them; more are read alone first


class Choice(NamedTuple):
    """A chosen token, and how probable it was where that was asked for."""

    token: int
    logprobs: TokenLogprobs | None


Chooser = Callable[[NDArray[np.float32]], Choice]


@dataclass(frozen=True)
class Speculation:
    """What drafts were worth to an answer.

    Args:
        steps: of the model, after the prompt.
        drafted: tokens that were proposed and checked.
        accepted: of those, the ones that were right.
    """

    steps: int
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """The share that was right."""
        return self.accepted / self.drafted if self.drafted else 0.0


class Speculator:
    """Goes on with one text.

    Args:
        session: steps the model.
        drafter: proposes.
        choose: gives the next token for logits (vocab,); called once for each token, in order.
        plain: reads one token and chooses the next, wherever that is quickest.
        ends: tokens that may end the text, behind which nothing is chosen.
        clock: tells seconds.
    """

    def __init__(
        self, session: Session, drafter: Drafter, choose: Chooser, plain: Callable[[int], Choice],
        ends: Collection[int], clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._session, self._drafter, self._choose, self._plain = session, drafter, choose, plain
        self._ends, self._clock, self._pace = ends, clock, Pace()
        self._overwrites = bool(overwritten(session.signature.state))
        self._reader = drafter if isinstance(drafter, RecurrentDrafter) else None  # reads hidden states
        if self._reader is not None:
            self._reader.worth = self._pace.worth
        self._hidden: NDArray[np.float32] | None = None  # what the tokens of the last step were chosen from
        self._pending: list[int] = []  # chosen, and not read yet, or no longer
        self._steps = self._drafted = self._accepted = 0
        self.snapshot: Snapshot | None = None  # from before the last step that may have to be taken back

    @property
    def found(self) -> Speculation:
        """What the drafts were worth so far."""
        return Speculation(self._steps, self._drafted, self._accepted)

    def begin(self, text: Sequence[int], first: int) -> None:
        """Take note of a text that has been read, and of the token that was chosen after it."""
        self._drafter.observe([*text, first])
        self._pending = [first]

    def step(self, state: State, left: int) -> list[Choice]:
        """The text's next tokens, at least one.

        Args:
            state: of one row, that has read all but the pending tokens; stepped in place.
            left: how many tokens may still come.
        """
        started = self._clock()
        drafted, kind = self._draft(left - 1)
        checking = self._clock()
        self._steps += 1
        if not drafted and len(self._pending) == 1:
            found = [self._single(state, self._pending[0])]
            self._pace.took_plain(self._clock() - checking)
            self._pending = []
        else:
            found = self._check(state, drafted)
            self._pace.took(
                len(self._pending) + len(drafted), self._clock() - checking, len(drafted), checking - started
            )
            accepted = len(found) - 1
            self._drafted, self._accepted = self._drafted + len(drafted), self._accepted + accepted
            if drafted:
                self._pace.saw(kind, len(drafted), accepted)
            self._take_back(state, len(drafted) - accepted, found)
        tokens = [choice.token for choice in found]
        self._pending += tokens[-1:]
        self._drafter.observe(tokens)
        if self._reader is not None and self._hidden is not None:
            self._reader.saw(self._hidden)
        return found

    def _single(self, state: State, token: int) -> Choice:
        """Read one token and choose the next."""
        if self._reader is None:
            return self._plain(token)
        logits, hidden = self._session.step_hidden(np.array([[token]]), state)
        self._hidden = hidden[0, -1:]
        return self._choose(logits[0, 0])

    def _draft(self, most: int) -> tuple[list[int], str]:
        """What is worth checking, at most so many tokens."""
        if most < 1 or len(self._pending) > _MOST_PENDING:
            return [], ""
        draft = self._drafter.propose(lambda kind: min(self._pace.length(kind), most))
        known = (token < self._session.vocab_size for token in draft.tokens)
        count = next((at for at, there in enumerate(known) if not there), len(draft.tokens))  # of any drafter
        return list(draft.tokens[: min(count, most)]), draft.kind

    def _check(self, state: State, drafted: Sequence[int]) -> list[Choice]:
        """Read pending and drafted tokens in one step, and choose until one is not as drafted."""
        self.snapshot = state.snapshot() if self._overwrites and drafted else None
        before, tokens = len(self._pending) - 1, [*self._pending, *drafted]
        wanted: Literal["all", "last"] = "all" if drafted else "last"
        if self._reader is None:
            logits = self._session.step(np.array([tokens]), state, logits=wanted)[0]
        else:
            logits, hidden = (x[0] for x in self._session.step_hidden(np.array([tokens]), state, logits=wanted))
        found: list[Choice] = []
        for at, draft in enumerate([*drafted, None]):
            found.append(self._choose(logits[before + at if drafted else 0]))
            if found[-1].token != draft or draft in self._ends:
                break
        if self._reader is not None:
            self._hidden = hidden[before : before + len(found)]
        return found

    def _take_back(self, state: State, wrong: int, found: Sequence[Choice]) -> None:
        """Let the state hold no token that was not chosen, and note which chosen ones it does not hold."""
        if not wrong:
            self._pending = []
            return
        right = int(state.lengths[0]) - wrong
        if right >= state.earliest[0]:
            state.rewind(right)
            self._pending = []
            return
        assert self.snapshot is not None
        state.restore(self.snapshot)
        self._pending += [choice.token for choice in found[:-1]]
