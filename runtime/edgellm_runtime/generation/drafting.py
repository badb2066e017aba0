"""What proposes the next tokens of a text, cheaply, for a model to check: the text itself, or a smaller model.

Whoever drafts may be wrong at any time: a draft costs time, never a token. It is told what was chosen, and asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.draft_graph import DraftGraph
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.errors import OptionError
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.state.snapshot import Snapshot, overwritten

__all__ = [
    "BundleDrafter", "CombinedDrafter", "Draft", "DraftSource", "Drafter", "Drafting", "PromptLookup",
    "RecurrentDrafter", "check_vocabulary",
]  # fmt: skip

_TOKENIZER = "tokenizer.json"


class Draft(NamedTuple):
    """Proposed tokens.

    Args:
        tokens: that may come next, none where there is no idea.
        kind: how it came about; each kind is held to what came of it before.
    """

    tokens: Sequence[int]
    kind: str


class Drafter(Protocol):
    """Drafts for one text."""

    def observe(self, tokens: Sequence[int], /) -> None:
        """Take note of the text's next tokens: at first its prompt, later what was chosen."""
        ...

    def propose(self, wanted: Callable[[str], int], /) -> Draft:
        """Tokens that may come next.

        Args:
            wanted: says at most how many, for the kind of draft that can be had.
        """
        ...


class DraftSource(Protocol):
    """Makes a drafter for each text; a ``Model`` is one."""

    def drafter(self) -> Drafter:
        """A new one, which has seen nothing."""
        ...


Drafting = Literal["lookup", "recurrent", "combined"] | DraftSource


class PromptLookup:
    """Proposes what followed the last time that the text had its last tokens (Saxena 2023, prompt lookup decoding)."""

    _SIZES = (5, 3, 2)  # tokens that must agree; the longest agreement counts

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run of tokens to where the text went on after it

    def observe(self, tokens: Sequence[int], /) -> None:
        """See :class:`Drafter`."""
        text = self._text
        for token in tokens:
            at = len(text)
            for size in self._SIZES:
                if at >= size:
                    self._after[tuple(text[at - size :])] = at
            text.append(token)

    def propose(self, wanted: Callable[[str], int], /) -> Draft:
        """See :class:`Drafter`."""
        text = self._text
        for size in self._SIZES:
            start = self._after.get(tuple(text[-size:])) if len(text) >= size else None
            if start is not None:
                kind, period = f"{size} tokens", len(text) - start  # beyond its end a text is taken to go round
                return Draft([text[start + i % period] for i in range(wanted(kind))], kind)
        return Draft((), "")


class BundleDrafter:
    """Proposes what a smaller model of the same vocabulary finds most probable.

    Args:
        session: steps the smaller model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._text: list[int] = []
        self._read: list[int] = []  # by the state: of the text, and then what was drafted last
        self._state: State | None = None
        self._fork: Snapshot | None = None  # of the state before it read what it drafted itself
        self._overwrites = bool(overwritten(session.signature.state))

    def observe(self, tokens: Sequence[int], /) -> None:
        """See :class:`Drafter`."""
        self._text += tokens

    def propose(self, wanted: Callable[[str], int], /) -> Draft:
        """See :class:`Drafter`."""
        count = wanted("bundle")
        if not count or len(self._text) + count > self._session.max_context:
            return Draft((), "bundle")
        if self._state is None:
            self._state = self._session.new_state(1, len(self._text) + count)
        self._go_back(self._state)
        drafted = [self._best(self._text[len(self._read) :])]
        self._fork = self._state.snapshot() if self._overwrites and count > 1 else None
        while len(drafted) < count:
            drafted.append(self._best(drafted[-1:]))
        return Draft(drafted, "bundle")

    def _go_back(self, state: State) -> None:
        """Let the state hold a proper beginning of the text."""
        agreed = min(len(self._read), len(self._text) - 1)
        if self._read[:agreed] != self._text[:agreed]:
            pairs = zip(self._read, self._text[:agreed], strict=False)
            agreed = next(i for i, (read, token) in enumerate(pairs) if read != token)
        if agreed == len(self._read):
            return
        if agreed == 0 or agreed >= state.earliest[0]:
            state.rewind(agreed)
        elif self._fork is not None and self._fork.length <= agreed:
            state.restore(self._fork)
        else:
            state.rewind(0)
        del self._read[int(state.lengths[0]) :]

    def _best(self, tokens: Sequence[int]) -> int:
        assert self._state is not None
        logits = self._session.step(np.array([tokens]), self._state)[0, 0]
        self._read += tokens
        return int(logits.argmax())


class RecurrentDrafter:
    """Proposes what the bundle's own drafter foretells from the model's last hidden states, as in ReDrafter.

    Args:
        graph: of the bundle.
        worth: says whether a token of such a probability to be right is worth checking.
    """

    KIND, MOST = "recurrent", 6  # of tokens ahead: its own errors add up
    _PATIENCE, _LONGEST = 4, 32  # drafts in a row that came to nothing before some are left out; and how many at most
    _BACKLOG = 32  # chosen tokens that are read late, where drafts were left out; after more it begins anew

    def __init__(self, graph: DraftGraph, worth: Callable[[float], bool] = lambda chance: chance > 0.3) -> None:
        self._steps, self.worth = graph.steps(), worth
        self._told: Sequence[int] = ()  # by observe, and not by saw yet
        self._tokens: list[int] = []  # chosen, and not read yet
        self._hidden: list[NDArray[np.float32]] = []  # what each was chosen from
        self._idle = self._left_out = 0

    def observe(self, tokens: Sequence[int], /) -> None:
        """See :class:`Drafter`; hidden states are told apart."""
        if self._told:  # tokens before these were chosen from what nobody tells
            self._begin()
        self._told = tokens

    def saw(self, hidden: NDArray[np.float32]) -> None:
        """Take note of what the last tokens told were chosen from, (tokens, features)."""
        if len(hidden) < len(self._told) or len(self._tokens) + len(hidden) > self._BACKLOG:
            self._begin()
        self._tokens += self._told[-len(hidden) :]
        self._hidden += list(hidden)
        self._told = ()

    def _begin(self) -> None:
        """Read what comes as if it were a text's beginning."""
        self._steps.begin()
        self._tokens, self._hidden = [], []

    def propose(self, wanted: Callable[[str], int], /) -> Draft:
        """See :class:`Drafter`; how long a draft is, its own chances say, once drafts are wanted at all."""
        if self._told or not self._tokens:
            return Draft((), self.KIND)
        if self._left_out > 0:
            self._left_out -= 1
            return Draft((), self.KIND)
        if not wanted(self.KIND):  # who wants none will want to try again some time, and counts for that
            return Draft((), self.KIND)
        drafted = self._steps.draft(self._tokens, np.stack(self._hidden), self.MOST, self.worth)
        self._tokens, self._hidden = [], []
        self._idle = 0 if drafted else self._idle + 1
        if self._idle >= self._PATIENCE:
            self._left_out = min(2 ** (self._idle - self._PATIENCE), self._LONGEST)
        return Draft(drafted, self.KIND)


class CombinedDrafter(RecurrentDrafter):
    """Looks drafts up where the text has had its last tokens before, and asks the bundle's drafter elsewhere."""

    def __init__(self, graph: DraftGraph) -> None:
        super().__init__(graph)
        self._lookup = PromptLookup()

    def observe(self, tokens: Sequence[int], /) -> None:
        """See :class:`Drafter`."""
        super().observe(tokens)
        self._lookup.observe(tokens)

    def propose(self, wanted: Callable[[str], int], /) -> Draft:
        """See :class:`Drafter`."""
        found = self._lookup.propose(wanted)
        return found if found.tokens else super().propose(wanted)


def check_vocabulary(draft: Bundle, target: Bundle) -> None:
    """See that one model's tokens are another's.

    Args:
        draft: of the model that proposes.
        target: of the model that checks.

    Raises:
        OptionError: their vocabularies differ in size, or their tokenizers' files do.
    """
    ours, theirs = draft.manifest, target.manifest
    files = [m.files[_TOKENIZER].sha256 for m in (ours, theirs) if _TOKENIZER in m.files]
    if ours.vocab_size != theirs.vocab_size or (len(files) == 2 and files[0] != files[1]):
        raise OptionError(
            f"draft is {ours.name}, whose vocabulary is not {theirs.name}'s; give a model with the same tokenizer"
        )
