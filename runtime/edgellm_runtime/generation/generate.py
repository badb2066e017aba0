"""The decode loop: prompts in, tokens and text out, until an end token, a stop string or a limit.

It knows tokens, a session and a sampler. Prompts in words and chat templates are ``model.py``'s business.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.generation.answer import Chunk, FinishReason, Generation, Timings
from edgellm_runtime.generation.drafting import CombinedDrafter, Drafter, Drafting, PromptLookup, RecurrentDrafter
from edgellm_runtime.generation.fits import check_fits
from edgellm_runtime.generation.logprobs import logprobs_of
from edgellm_runtime.generation.options import GenerationOptions, OptionKeywords
from edgellm_runtime.generation.prefix_cache import Prefixes
from edgellm_runtime.generation.row import Row
from edgellm_runtime.generation.row_options import Choosing, RowOptions
from edgellm_runtime.generation.speculation import Choice, Speculator
from edgellm_runtime.generation.text_state import TextState
from edgellm_runtime.generation.trail import Trail, read_text
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = [
    "Chunk",
    "FinishReason",
    "Generation",
    "GenerationOptions",
    "OptionKeywords",
    "Run",
    "Timings",
    "next_tokens",
]  # fmt: skip


def next_tokens(
    session: Session, sampler: Choosing, tokens: NDArray[np.int64], state: State, rows: Sequence[int]
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


def _drafter(session: Session, draft: Drafting) -> Drafter:
    if draft in ("recurrent", "combined"):
        assert session.drafter is not None, "check_fits has seen to it"
        return (RecurrentDrafter if draft == "recurrent" else CombinedDrafter)(session.drafter)
    return PromptLookup() if isinstance(draft, str) else draft.drafter()


class _Ended(Exception):
    """Ends a prompt between two pieces of it."""


class Run:
    """Answers to a batch of prompts, token by token. A row that has ended leaves the batch.

    Args:
        session: steps the model.
        tokenizer: turns tokens into text; None gives answers without text.
        prompts: token ids of each row, at least one each.
        options: how to choose and when to end; of each row its own, where there are :class:`RowOptions`.
        state: goes on from what one row already holds, a proper prefix of the only prompt; None begins anew.
        trail: takes snapshots of that state on its way; None: nobody will rewind it.
        text_state: likewise, but as a value: it stays as it is, and the answers have states.
        answers: so many to each prompt, which is read once; each is a row, all prompts' first ones before their second.
        prefixes: what prompts began with before; looked up for one prompt alone that nothing was read of.

    Raises:
        ContextError: a prompt is longer than the context.
        OptionError: stop strings without a tokenizer.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer | None, prompts: Sequence[Sequence[int]],
        options: GenerationOptions | RowOptions, *, state: State | None = None, trail: Trail | None = None,
        text_state: TextState | None = None, answers: int = 1, prefixes: Prefixes | None = None,
    ) -> None:  # fmt: skip
        self._own = options if isinstance(options, RowOptions) else RowOptions(options)
        options = self._own.call
        for row, prompt in enumerate(prompts):
            check_fits(session, tokenizer, [prompt], self._own.of(row))
        context, encoder = session.max_context, session.encoder
        self._sources = None if encoder is None else list(prompts)
        if encoder is not None:  # which reads them before the first step; answers all begin alike
            prompts = [encoder.start] * len(prompts)
        self._session, self._given, self._resumed, self._answers = session, state, text_state, answers
        self._options, self._cancelled = options, threading.Event()
        self._deadline = None if options.deadline is None else time.monotonic() + options.deadline
        self._prompts = len(prompts)
        rows = enumerate((*prompts,) * answers)
        self._rows = [Row(prompt, tokenizer, self._own.of(i), context - len(prompt)) for i, prompt in rows]
        self._batch = [i for i, row in enumerate(self._rows) if row.finish_reason is None]  # the state's rows
        self._trail = trail if text_state is None else text_state.trail()
        self._reused = text_state.read_tokens if text_state is not None else 0
        if state is not None:
            self._reused = int(state.lengths[0])
        self._sampler = self._own.sampler(len(self._rows), session.vocab_size, lambda row: self._rows[row].ends)
        self._prefixes, self._cached = prefixes if encoder is None else None, 0  # a source is no part of a prompt
        self._drafting = options.draft if len(self._rows) == 1 else None
        self._speculator: Speculator | None = None  # made with the second token
        self._ahead: deque[Choice] = deque()  # chosen already, and still to be handed out
        self._ttft_s = self._prefill_s = self._decode_s = 0.0
        self._state: State | None = None
        self._stepping = False  # stays True where an error left a step: nobody knows then what the state has read

    def chunks(self) -> Generator[tuple[int, Chunk], None, None]:
        """Each row's chunks as (row, chunk), the rows in turn; may be left at any time, and runs once."""
        for i, row in enumerate(self._rows):
            if self._own.of(i).echo:
                yield i, row.echo()
            if row.finish_reason:
                yield i, Chunk("", (), row.finish_reason)
        if not self._batch:
            return
        start = time.perf_counter()
        try:
            chosen = self._begin()
            self._ttft_s = time.perf_counter() - start
            while chosen is not None:
                yield from self._hand_out(chosen)
                yield from self._let_go()
                chosen = self._next(chosen)
        finally:
            self._settle()
            self._keep()
        for i in self._batch:
            if self._rows[i].finish_reason is None:
                yield i, self._rows[i].end(self._ended() or "cancelled")

    def _let_go(self) -> Iterator[tuple[int, Chunk]]:
        """End the rows whose own options say so."""
        for i in self._batch:
            if self._rows[i].finish_reason is None and (reason := self._own.ended(i)) is not None:
                yield i, self._rows[i].end(reason)

    def cancel(self) -> None:
        """End every answer before the next step, or the next piece of a long prompt; any thread may call it."""
        self._cancelled.set()

    def _ended(self) -> Literal["cancelled", "deadline"] | None:
        """Whether every answer is to end here, from outside."""
        if self._cancelled.is_set() or (self._options.cancel is not None and self._options.cancel.is_set()):
            return "cancelled"
        return "deadline" if self._deadline is not None and time.monotonic() >= self._deadline else None

    def leave(self) -> None:
        """Note that nobody will ask for further chunks: what there is of each answer is its result."""
        for row in self._rows:
            if row.finish_reason is None:
                row.end("cancelled")

    def result(self, row: int = 0) -> Generation:
        """A row's answer, once :meth:`chunks` has come to its end, or was left."""
        r = self._rows[row]
        assert r.finish_reason is not None
        given = len(r.prompt) if self._sources is None else len(self._sources[row % len(self._sources)])
        read, later = given - self._reused if self._ttft_s else 0, max(len(r.tokens) - 1, 0)
        timings = Timings(
            prefill_s=self._prefill_s,
            decode_s=r.decode_s,
            ttft_ms=1e3 * self._ttft_s,
            prefill_tokens_per_s=read / self._prefill_s if self._prefill_s else 0.0,
            decode_tokens_per_s=later / r.decode_s if r.decode_s else 0.0,
        )
        return Generation(
            text="".join(r.texts), tokens=tuple(r.tokens), prompt_tokens=given,
            finish_reason=r.finish_reason, timings=timings,
            logprobs=None if self._own.of(row).logprobs is None else tuple(r.logprobs), state=self._text_state(row),
            cached_tokens=self._cached, speculation=None if self._speculator is None else self._speculator.found,
        )  # fmt: skip

    def _text_state(self, row: int) -> TextState | None:
        if self._resumed is None or self._stepping:
            return None
        r = self._rows[row]
        state = r.state
        if state is None and self._state is not None and row in self._batch:
            at = self._batch.index(row) if self._state.batch > 1 else 0  # one row is shared until the prompt is read
            state = self._state if len(self._batch) == 1 else self._state.take([at])
        trail = None if self._trail is None else self._trail.copy()
        return self._resumed.extended([*r.prompt, *r.tokens], state, self._answer_from(row), trail)

    def _answer_from(self, row: int) -> int:
        """How many tokens come before a row's answer; one that goes on from a state with no prompt was begun there."""
        prompt = len(self._rows[row].prompt)
        going_on = self._resumed is not None and prompt == len(self._resumed)
        return self._resumed.answer_from if going_on and self._resumed is not None else prompt

    def _begin(self) -> NDArray[np.int64] | None:
        """Read the prompts; the first tokens, or None when that was ended."""
        for i in self._batch:
            self._sampler.observe(i, self._rows[i].prompt, self._answer_from(i))
        if (logits := self._read()) is None or self._state is None:
            return None
        read = self._read_rows()
        rows = [read.index(i % self._prompts) for i in self._batch]
        if rows != list(range(len(read))):
            self._keep()
            self._state, logits = self._state.take(rows), logits[rows]
        return self._chosen(logits)

    def _read_rows(self) -> list[int]:
        """Which prompts are read; of several answers to one it is once."""
        return sorted({i % self._prompts for i in self._batch})

    def _read(self) -> NDArray[np.float32] | None:
        """The logits (prompts, vocab) of the prompts' last tokens, or None when that was ended."""
        capacity, read = max(self._rows[i].room for i in self._batch), self._read_rows()
        if self._given is not None:
            self._state = self._given
        elif self._resumed is not None:
            self._state = self._resumed.resumed(self._session, capacity)
        elif self._sources is None:
            self._state = self._session.new_state(len(read), capacity)
        else:
            start = time.perf_counter()
            self._state = self._session.new_state(capacity=capacity, sources=[self._sources[i] for i in read])
            self._prefill_s = time.perf_counter() - start
        stops: Sequence[int] = ()
        if self._prefixes is not None and self._state.batch == 1 and not self._state.lengths[0]:
            self._trail = self._trail or Trail(self._session.signature.state)
            beginning = self._rows[self._batch[0]].prompt[:-1]  # the last token must be read, for its logits
            self._reused, stops = self._prefixes.resume(beginning, self._state, self._trail)
            self._cached = self._reused
        try:
            return self._prefill(self._state, [self._rows[i].prompt for i in read], stops)
        except _Ended:
            self._stepping = False
            return None

    def _prefill(self, state: State, prompts: Sequence[Sequence[int]], stops: Sequence[int]) -> NDArray[np.float32]:
        start, self._stepping = time.perf_counter(), True
        if state.batch == 1:
            prompt = prompts[0][self._reused :]
            logits = read_text(self._session, prompt, state, self._trail, stops=stops, progress=self._told)[:, 0]
        else:
            logits = self._read_batch(prompts, state)
        self._stepping = False
        self._prefill_s += time.perf_counter() - start
        return logits

    def _keep(self) -> None:
        """Leave what was read of the only row to other calls that begin alike."""
        state = self._state
        if self._prefixes is None or self._trail is None or self._stepping or state is None or state.batch > 1:
            return
        row = self._rows[self._batch[0]]
        self._prefixes.keep([*row.prompt, *row.tokens][: int(state.lengths[0])], state, self._trail)

    def _read_batch(self, prompts: Sequence[Sequence[int]], state: State) -> NDArray[np.float32]:
        lengths = np.array([len(p) for p in prompts], dtype=np.int32)
        tokens = np.zeros((len(prompts), int(lengths.max())), dtype=np.int64)  # padding is any valid token
        for at, prompt in enumerate(prompts):
            tokens[at, : len(prompt)] = prompt
        ragged = None if (lengths == lengths[0]).all() else lengths
        return self._session.step(tokens, state, lengths=ragged, progress=self._told)[:, 0]

    def _chosen(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Choose from logits (batch, vocab), and note how probable that was if anyone will ask."""
        chosen = self._sampler(logits, self._batch)
        for i, x, token in zip(self._batch, logits, chosen.tolist(), strict=True):
            if (count := self._own.of(i).logprobs) is not None:
                self._rows[i].logprobs.append(logprobs_of(x, token, count))
        return chosen

    def _told(self, read: int, total: int) -> None:
        """Between two pieces of a prompt."""
        if self._ended():
            raise _Ended
        if self._options.progress is not None:
            self._options.progress(read, total)

    def _hand_out(self, chosen: NDArray[np.int64]) -> Iterator[tuple[int, Chunk]]:
        for i, token in zip(self._batch, chosen.tolist(), strict=True):
            row = self._rows[i]
            row.decode_s, chunk = self._decode_s, row.push(token)
            if chunk.finish_reason:
                self._settle()
            yield i, chunk

    def _next(self, chosen: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Read the tokens chosen, and choose the next; None when all rows have ended, or the run was ended."""
        state, keep = self._state, [at for at, i in enumerate(self._batch) if self._rows[i].finish_reason is None]
        assert state is not None
        if not keep or self._ended():
            return None
        start = time.perf_counter()
        if len(keep) < len(self._batch):
            if self._resumed is not None:
                for at in set(range(len(self._batch))).difference(keep):
                    self._rows[self._batch[at]].state = state.take([at])
            self._state = state = state.take(keep)
            chosen, self._batch = chosen[keep], [self._batch[at] for at in keep]
        self._stepping, told = True, not self._ahead
        if self._drafting is not None:
            chosen = self._drafted(self._drafting, int(chosen[0]), state)
        elif all(self._own.of(i).logprobs is None for i in self._batch):
            chosen = next_tokens(self._session, self._sampler, chosen[:, None], state, self._batch)
        else:  # which are of all tokens, wherever they are chosen
            chosen = self._chosen(self._session.step(chosen[:, None], state)[:, 0])
        if self._trail is not None and self._answers == 1 and told:
            self._trail.note(state)
        self._stepping = False
        self._decode_s += time.perf_counter() - start
        return chosen

    def _drafted(self, draft: Drafting, token: int, state: State) -> NDArray[np.int64]:
        """The only row's next token, of a step that may give several."""
        row = self._rows[0]
        if self._speculator is None:
            drafter = _drafter(self._session, draft)
            self._speculator = Speculator(self._session, drafter, self._choice, self._plain_choice, row.ends)
            self._speculator.begin([*row.prompt, *row.tokens[:-1]], token)
        if not self._ahead:
            self._ahead.extend(self._speculator.step(state, row.left))
        found = self._ahead.popleft()
        if found.logprobs is not None:
            row.logprobs.append(found.logprobs)
        return np.array([found.token])

    def _choice(self, logits: NDArray[np.float32]) -> Choice:
        """The only row's next token, chosen from logits (vocab,)."""
        token, count = int(self._sampler(logits[None], [0])[0]), self._own.of(0).logprobs
        return Choice(token, None if count is None else logprobs_of(logits, token, count))

    def _plain_choice(self, token: int) -> Choice:
        """The same, of a step over the one token before it."""
        assert self._state is not None
        if self._own.of(0).logprobs is not None:
            return self._choice(self._session.step(np.array([[token]]), self._state)[0, 0])
        return Choice(int(next_tokens(self._session, self._sampler, np.array([[token]]), self._state, [0])[0]), None)

    def _settle(self) -> None:
        """Take back what a step over drafts has read ahead of what was handed out: it is no part of the text."""
        state = self._state
        if self._speculator is None or self._stepping or state is None:
            return
        most = len(self._rows[0].prompt) + len(self._rows[0].tokens) - 1  # a text's last token is not read
        if int(state.lengths[0]) > most:
            trail = self._trail or Trail(self._session.signature.state)
            trail.adopt([] if self._speculator.snapshot is None else [self._speculator.snapshot])
            trail.rewind(state, most)
