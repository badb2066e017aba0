"""The decode loop: prompts in, tokens and text out, until an end token, a stop string or a limit.

It knows tokens, a session and a sampler. Prompts in words and chat templates are ``model.py``'s business.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.arguments import check_flag, check_integer, check_list, shown
from edgellm_runtime.errors import ContextError, OptionError
from edgellm_runtime.generation.processors import LogitsProcessor
from edgellm_runtime.generation.sampling import Sampler, SamplingOptions
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = [
    "Chunk", "FinishReason", "Generation", "GenerationOptions", "OptionKeywords", "Run",
    "StopMatcher", "Stream", "Timings", "next_tokens",
]  # fmt: skip

FinishReason = Literal["eos", "stop", "length"]


class OptionKeywords(TypedDict, total=False):
    """The keywords that every generating method takes: :class:`GenerationOptions`' fields, none required."""

    max_new_tokens: int
    stop: str | Sequence[str]
    ignore_eos: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    logits_processors: Sequence[LogitsProcessor]


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(SamplingOptions):
    """How an answer is chosen and when it ends.

    Args:
        max_new_tokens: at most so many tokens; fewer when the context is full. 0 asks the model nothing.
        stop: texts that end the answer and are no part of it; a single string is one of them.
        ignore_eos: go on past end tokens, for measuring.

    Raises:
        OptionError: a value is outside its range.
    """

    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        checked = {
            "max_new_tokens": check_integer("max_new_tokens", self.max_new_tokens, 0),
            "stop": tuple(check_list("stop", stops, "texts", _check_stop)),
            "ignore_eos": check_flag("ignore_eos", self.ignore_eos),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def _check_stop(_: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise OptionError(f"stop holds {shown(value)}; each stop must be a text of at least one character")
    return value


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of one answer went; in a batch, shared work counts in full for every row.

    Args:
        prefill_s: reading the prompt; in a conversation only the part that was not read before.
        decode_s: every token after the first; what a stream's reader does in between is not counted.
        ttft_ms: time to first token: making the state, reading the prompt, choosing the token.
        prefill_tokens_per_s: prompt tokens read, over ``prefill_s``.
        decode_tokens_per_s: tokens after the first, over ``decode_s``; 0 when there were none.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A whole answer.

    Args:
        text: what the answer adds to the prompt's text; without the end token and without the stop string.
        tokens: every token the model chose, the end token and a stop string's included.
        prompt_tokens: how many tokens the prompt has.
        finish_reason: ``eos``, ``stop`` or ``length``; ``length`` too when the context is full.
        timings: where the time went.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        """The same as JSON's types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of an answer.

    Args:
        text: what the token completed; empty while a character is incomplete or a stop string may be under way.
        token_ids: the token; none only for an answer of no tokens.
        finish_reason: set on the last chunk.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class StopMatcher:
    """Passes text on, except what may still become a stop string.

    Args:
        stops: texts to stop at.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is free to go, and whether a stop string has come; after that, nothing more may be pushed."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = next((n for n in range(min(len(text), self._longest - 1), 0, -1) if self._opens(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back; the answer ends, so it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _opens(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)


class _Row:
    """One answer in the making."""

    def __init__(
        self, prompt: Sequence[int], tokenizer: Tokenizer | None, options: GenerationOptions, room: int
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.decode_s = 0.0
        self._limit = min(options.max_new_tokens, room)
        self.room = len(prompt) + self._limit  # tokens the state will hold at most
        self._decoder = tokenizer.stream(after=prompt) if tokenizer else None
        self._eos = frozenset[int]() if options.ignore_eos or not tokenizer else tokenizer.eos_token_ids
        self._stops = StopMatcher(options.stop)
        if self._limit == 0:
            self.finish_reason = "length"

    def push(self, token: int) -> Chunk:
        """Take the next token."""
        self.tokens.append(token)
        text, stopped = "", False
        ended = token in self._eos
        if self._decoder and not ended:
            text, stopped = self._stops.push(self._decoder.push(token))
        if stopped:
            self.finish_reason = "stop"
        elif ended or len(self.tokens) >= self._limit:
            rest, stopped = self._rest()
            text += rest
            self.finish_reason = "stop" if stopped else "eos" if ended else "length"
        self.texts.append(text)
        return Chunk(text, (token,), self.finish_reason)

    def _rest(self) -> tuple[str, bool]:
        if not self._decoder:
            return "", False
        text, stopped = self._stops.push(self._decoder.finish())
        return text if stopped else text + self._stops.finish(), stopped


def next_tokens(
    session: Session, sampler: Sampler, tokens: NDArray[np.int64], state: State, rows: Sequence[int]
) -> NDArray[np.int64]:
    """Read one token a row and choose the next; where the logits are, if the session can do that.

    Args:
        session: steps the model.
        sampler: chooses.
        tokens: (batch, 1).
        state: stepped in place.
        rows: which of the sampler's rows these are.

    Returns:
        (batch,) token ids.
    """
    count = sampler.deciding
    if count is None or count > session.candidates:
        return sampler(session.step(tokens, state)[:, 0], rows)
    found = session.best(tokens, state, count)
    return sampler.among(found.ids, found.logits, rows, found.everything)


class Run:
    """Answers to a batch of prompts, token by token. A row that has ended leaves the batch.

    Args:
        session: steps the model.
        tokenizer: turns tokens into text; None gives answers without text.
        prompts: token ids of each row, at least one each.
        options: how to choose and when to end.
        state: goes on from what one row already holds, a proper prefix of the only prompt; None begins anew.

    Raises:
        ContextError: a prompt is longer than the context.
        OptionError: stop strings without a tokenizer.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]],
        options: GenerationOptions, *, state: State | None = None,
    ) -> None:  # fmt: skip
        context = session.max_context
        for prompt in prompts:
            if len(prompt) > context:
                raise ContextError(
                    f"the prompt has {len(prompt)} tokens, but the model's context holds {context}; shorten the prompt"
                )
        if options.stop and tokenizer is None:
            raise OptionError(f"stop is {options.stop!r}, but the bundle has no tokenizer; leave stop out")
        self._session, self._given = session, state
        self._rows = [_Row(prompt, tokenizer, options, context - len(prompt)) for prompt in prompts]
        self._batch = [i for i, row in enumerate(self._rows) if row.finish_reason is None]  # the state's rows
        self._reused = 0 if state is None else int(state.lengths[0])
        self._sampler = Sampler(options, rows=len(prompts), vocab_size=session.vocab_size)
        self._ttft_s = self._prefill_s = self._decode_s = 0.0

    def chunks(self) -> Generator[tuple[int, Chunk], None, None]:
        """Each row's chunks as (row, chunk), the rows in turn; may be left at any time, and runs once."""
        for i, row in enumerate(self._rows):
            if row.finish_reason:
                yield i, Chunk("", (), row.finish_reason)
        if not self._batch:
            return
        start = time.perf_counter()
        state = self._new_state() if self._given is None else self._given
        chosen = self._prefill(state)
        self._ttft_s = time.perf_counter() - start
        buffer = np.empty((len(chosen), 1), dtype=np.int64)
        while True:
            yield from self._hand_out(chosen)
            keep = [at for at, i in enumerate(self._batch) if self._rows[i].finish_reason is None]
            if not keep:
                return
            start = time.perf_counter()
            if len(keep) < len(self._batch):
                state, chosen, self._batch = state.take(keep), chosen[keep], [self._batch[at] for at in keep]
                buffer = np.empty((len(keep), 1), dtype=np.int64)
            buffer[:, 0] = chosen
            chosen = next_tokens(self._session, self._sampler, buffer, state, self._batch)
            self._decode_s += time.perf_counter() - start

    def result(self, row: int = 0) -> Generation:
        """A row's answer, once :meth:`chunks` has come to its end."""
        r = self._rows[row]
        assert r.finish_reason is not None
        read, later = len(r.prompt) - self._reused if self._ttft_s else 0, max(len(r.tokens) - 1, 0)
        timings = Timings(
            prefill_s=self._prefill_s,
            decode_s=r.decode_s,
            ttft_ms=1e3 * self._ttft_s,
            prefill_tokens_per_s=read / self._prefill_s if self._prefill_s else 0.0,
            decode_tokens_per_s=later / r.decode_s if r.decode_s else 0.0,
        )
        return Generation(
            text="".join(r.texts), tokens=tuple(r.tokens), prompt_tokens=len(r.prompt),
            finish_reason=r.finish_reason, timings=timings,
        )  # fmt: skip

    def _new_state(self) -> State:
        capacity = max(self._rows[i].room for i in self._batch)
        return self._session.new_state(len(self._batch), capacity)

    def _prefill(self, state: State) -> NDArray[np.int64]:
        prompts = [self._rows[i].prompt[self._reused :] for i in self._batch]
        lengths = np.array([len(p) for p in prompts], dtype=np.int32)
        tokens = np.zeros((len(prompts), int(lengths.max())), dtype=np.int64)  # padding is any valid token
        for at, prompt in enumerate(prompts):
            tokens[at, : len(prompt)] = prompt
            self._sampler.observe(self._batch[at], self._rows[self._batch[at]].prompt)
        start = time.perf_counter()
        logits = self._session.step(tokens, state, lengths=None if (lengths == lengths[0]).all() else lengths)
        self._prefill_s = time.perf_counter() - start
        return self._sampler(logits[:, 0], self._batch)

    def _hand_out(self, chosen: NDArray[np.int64]) -> Iterator[tuple[int, Chunk]]:
        for i, token in zip(self._batch, chosen.tolist(), strict=True):
            row = self._rows[i]
            row.decode_s = self._decode_s
            yield i, row.push(token)


class Stream(Iterator[Chunk]):
    """One answer's chunks as they come; it may be left at any time.

    Args:
        run: of one prompt.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._chunks = run.chunks()
        self.generation: Generation | None = None  # the whole answer, once the last chunk has come

    def __next__(self) -> Chunk:
        _, chunk = next(self._chunks)
        if chunk.finish_reason:
            self.generation = self._run.result()
        return chunk

    def close(self) -> None:
        """Stop here."""
        self._chunks.close()
