"""How probable a model holds texts, as lm-evaluation-harness asks for it.

Its conventions, so that the numbers are its own: what a continuation's tokens are is seen in the whole text;
spaces at a context's end belong to the continuation; a text without a context is read after the begin token, or after
the end token where there is none; a text longer than the context is scored in windows that do not overlap, each token
once, with as much before it as fits; and what is too long of a pair is cut at its beginning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm_runtime.arguments import check_flag, check_list, is_sequence, shown
from edgellm_runtime.errors import OptionError
from edgellm_runtime.session import Session
from edgellm_runtime.softmax import log_softmax
from edgellm_runtime.state import State
from edgellm_runtime.text.tokenizer import Tokenizer, check_tokens

__all__ = ["Score", "ScoringMethods"]

_PIECE = 64  # tokens whose logits are there at once: of a vocabulary of 150,000 they take 38 MB
_Pair = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Score:
    """How probable a text is to a model.

    Args:
        logprob: natural logarithm of the probability of all its tokens, each after those before it.
        greedy: whether each is the most probable one at its place, so that greedy decoding would write the text.
        tokens: the text's, without its context's.
        logprobs: of each.
    """

    logprob: float
    greedy: bool
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


class ScoringMethods(ABC):
    """What ``Model`` has of it."""

    session: Session

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's."""

    @abstractmethod
    def _check_goes_on(self) -> None: ...

    def score(self, texts: Sequence[Any], *, bos: bool = False) -> list[Score]:
        """Log-likelihoods of texts, or of continuations of contexts.

        Args:
            texts: each a text or token ids, of which every token is scored (but for a first one that has no begin or
                end token to be read after), or a tuple of two of those: a context and
                its continuation, of which the continuation's tokens are. Continuations of one context that come one
                after another share its reading.
            bos: whether texts are encoded with a begin token.

        Raises:
            OptionError: texts without a tokenizer, an empty continuation, or what is neither.
        """
        self._check_goes_on()
        bos = check_flag("bos", bos)
        if isinstance(texts, tuple):  # a single pair is easily given
            raise OptionError(f"texts is {shown(texts)}; it must be a list of texts or of pairs")
        items = check_list("texts", texts, "texts or pairs", lambda name, value: self._windows(name, value, bos))
        reader = _Reader(self.session)
        return [_joined([reader.score(context, tokens) for context, tokens in windows]) for windows in items]

    def _windows(self, name: str, value: Any, bos: bool) -> list[_Pair]:
        """What is read and scored for one text: contexts with the tokens that follow."""
        most = self.session.max_context
        if isinstance(value, tuple):
            if len(value) != 2:
                raise OptionError(f"{name} is {shown(value)}; it must be a context and its continuation")
            context, tokens = self._pair(name, *value, bos)
            if not tokens:
                raise OptionError(f"{name} has a continuation of no token; give it some text")
            return [_cut(context, tokens, most)]
        return list(_rolling(self._prefix, self._encoded(name, value, bos), most))

    def _pair(self, name: str, context: Any, continuation: Any, bos: bool) -> _Pair:
        if not (isinstance(context, str) and isinstance(continuation, str)):
            before = self._encoded(f"the context of {name}", context, bos)
            return before or self._prefix, self._encoded(f"the continuation of {name}", continuation, False)
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        if not kept:
            tokens = self._encoded(name, continuation, False)
            begun = bool(tokens) and tokens[:1] == self._prefix  # it has its begin token
            return (tokens[:1], tokens[1:]) if begun else (self._prefix, tokens)
        before = self._encoded(name, kept, bos)
        return before, self._encoded(name, kept + continuation, bos)[len(before) :]

    def _encoded(self, name: str, value: Any, bos: bool) -> tuple[int, ...]:
        if isinstance(value, str):
            if self.tokenizer is None:
                raise OptionError(f"{name} is a text, but the bundle has no tokenizer; pass token ids")
            return tuple(self.tokenizer.encode(value, bos=bos))
        if not is_sequence(value):
            raise OptionError(f"{name} is {shown(value)}; it must be a text or a list of token ids")
        try:
            return tuple(check_tokens(value, self.session.vocab_size))
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from error

    @property
    def _prefix(self) -> tuple[int, ...]:
        """What stands before a text that has nothing before it; none without a tokenizer."""
        if self.tokenizer is None:
            return ()
        found = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        return () if found is None else (found,)


class _Reader:
    """Scores, and keeps the state of the last context for the next continuation."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._context: tuple[int, ...] = ()
        self._read: tuple[State, Any] | None = None

    def score(self, context: tuple[int, ...], tokens: tuple[int, ...]) -> Score:
        """The score of tokens after a context of at least one."""
        if self._read is None or context != self._context:
            state = self._session.new_state(1, len(context) + len(tokens))
            logits = self._session.step(np.array([context]), state)[0].copy()
            self._context, self._read = context, (state, logits)
        state, logits = self._read
        logprobs, greedy = _looked_up(logits, tokens[:1])
        if len(tokens) > 1:
            state = state.fork()
        for at in range(0, len(tokens) - 1, _PIECE):
            piece = tokens[at : min(at + _PIECE, len(tokens) - 1)]
            logits = self._session.step(np.array([piece]), state, logits="all")[0]
            more, best = _looked_up(logits, tokens[at + 1 : at + 1 + len(piece)])
            logprobs, greedy = logprobs + more, greedy and best
        return Score(sum(logprobs), greedy, tokens, tuple(logprobs))


def _looked_up(logits: Any, tokens: Sequence[int]) -> tuple[list[float], bool]:
    """Log-probabilities of tokens from logits (count, vocab), and whether each is the best."""
    found = log_softmax(logits)[np.arange(len(tokens)), tokens]
    return [float(value) for value in found], bool((logits.argmax(axis=-1) == np.array(tokens)).all())


def _cut(context: tuple[int, ...], tokens: tuple[int, ...], most: int) -> _Pair:
    """A pair that fits: of both together the last tokens, all but the very last of which are read."""
    whole = (context + tokens)[-(most + 1) :]
    scored = min(len(tokens), len(whole) - 1)
    return whole[: len(whole) - scored], whole[len(whole) - scored :]


def _rolling(prefix: tuple[int, ...], tokens: tuple[int, ...], most: int) -> Iterator[_Pair]:
    """Windows over a text in which each token is scored once; a text without a prefix begins with its first token."""
    text, done = prefix + tokens, len(prefix) or 1
    while done < len(text):
        first = done == (len(prefix) or 1)
        end = min(len(text), done + most)
        start = 0 if first else max(0, end - 1 - most)
        yield text[start:done], text[done:end]
        done = end


def _joined(parts: Sequence[Score]) -> Score:
    """The score of a text whose windows these are; a text of no token is certain."""
    return Score(
        sum(part.logprob for part in parts), all(part.greedy for part in parts),
        tuple(token for part in parts for token in part.tokens), tuple(p for part in parts for p in part.logprobs),
    )  # fmt: skip
