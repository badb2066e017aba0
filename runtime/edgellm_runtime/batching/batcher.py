"""Continuous batching, one round after another: no thread, no clock of its own, so that each round can be looked at.

A round is one token for every answer that runs, together, and then one piece of one prompt. Prompts take turns, so that
neither a long prompt holds up the answers, nor one prompt another. Who joins has been read alone, just as alone.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.batching.job import Answer, Job
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.batching.reading import Reading
from edgellm_runtime.batching.rows import rows_for
from edgellm_runtime.batching.widths import Widths
from edgellm_runtime.errors import StateError
from edgellm_runtime.generation.answer import Chunk, FinishReason
from edgellm_runtime.generation.logprobs import logprobs_of
from edgellm_runtime.generation.prefix_cache import Prefixes
from edgellm_runtime.generation.trail import Trail
from edgellm_runtime.session import Session
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import GROWTH

__all__ = ["Batcher", "context_within", "state_bytes"]

_Running = tuple[Job, Answer]


def state_bytes(session: Session, rows: int, tokens: int, source: int | None = None) -> int:
    """What the states of so many rows of so many tokens take.

    Args:
        session: whose.
        rows: how many.
        tokens: of each.
        source: tokens of each row's source; None: the model answers none.
    """
    slots = -(-max(tokens, 1) // GROWTH) * GROWTH
    specs = (spec.of_source(Widths(session).rounded(source)) for spec in session.signature.state)
    return sum(spec.nbytes(rows, slots) * (1 if spec.in_place else 2) for spec in specs)


def context_within(session: Session, limit: int | None, source: int | None = None) -> int:
    """The most tokens that a row may hold if one row's states, twice for a moment, are to fit into so many bytes.

    Args:
        session: whose.
        limit: in bytes; None: no limit.
        source: tokens of the row's source; None: the model answers none, or one of a single token.

    Returns:
        Tokens, at most the session's context; 0 where not even one fits.
    """
    if limit is None:
        return session.max_context
    low, high = 0, session.max_context
    while low < high:  # the greatest that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if 2 * state_bytes(session, 1, middle, source) <= limit else (low, middle - 1)
    return low


class Batcher:
    """Runs jobs, of which each is a request, in rounds. One thread at a time.

    Args:
        session: steps the model.
        options: how many at once.
        clock: tells seconds.
        prefixes: what prompts began with before; None, and always where bits must be those of being alone: nothing.
    """

    def __init__(
        self, session: Session, options: BatchOptions, clock: Callable[[], float] = time.perf_counter,
        prefixes: Prefixes | None = None,
    ) -> None:  # fmt: skip
        self._session, self._options, self.clock = session, options, clock
        self._piece = min(options.piece or session.chunk, session.chunk)
        self._prefixes = None if options.exact or session.encoder is not None else prefixes  # a source is no beginning
        self._rows = rows_for(session, options.rows, exact=options.exact)
        self._running: list[_Running] = []  # in the order of the rows
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self.counts: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that run, and those whose prompt is being read."""
        return len(self._running) + sum(len(job.answers) for job in self._reading)

    @property
    def busy(self) -> bool:
        """Whether another round has something to do."""
        return bool(self._running or self._reading or self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes that states take."""
        return self._rows.nbytes + sum(job.reading.state.nbytes for job in self._reading if job.reading is not None)

    def add(self, job: Job) -> None:
        """Let a job wait for its place; those before it come first."""
        self.counts["requests"] += 1
        for answer in job.answers:
            if job.options.echo:
                job.tell(answer, answer.row.echo(), self.clock())
            if answer.row.finish_reason is not None:  # nothing is asked of the model
                self._tell_end(job, answer, answer.row.finish_reason)
        if not job.ended:
            self._waiting.append(job)

    def round(self) -> None:
        """A token for every answer that runs, and a piece of a prompt."""
        self._end_from_outside()
        self._admit()
        if self._running:
            self._decode()
        if self._reading:
            self._read()

    def cancel_all(self) -> None:
        """End everything with the next round."""
        for job in [*self._waiting, *self._reading, *(job for job, _ in self._running)]:
            job.cancelled.set()

    def fail_all(self, error: BaseException) -> None:
        """End everything with an error."""
        for job in [*self._waiting, *self._reading, *(job for job, _ in self._running)]:
            self._fail(job, error)
        self._waiting.clear()
        self._reading.clear()
        self._running.clear()
        self._rows.clear()

    # who comes and goes

    def _admit(self) -> None:
        """In order: one that has to wait holds back those behind it, so that it is not overtaken for ever."""
        while self._waiting and self._fits(self._waiting[0]):
            self._reading.append(self._waiting.popleft())

    def _fits(self, job: Job) -> bool:
        rows = self.running + len(job.answers)
        if rows > self._options.rows:
            return False
        if self._options.state_bytes is None or rows == len(job.answers):  # alone it fits, or was refused
            return True
        inside = [*self._reading, job]
        everyone = [*inside, *(r for r, _ in self._running)]
        room, widest = max(r.room for r in everyone), max(len(r.source or ()) for r in everyone) or None
        prompts = sum(state_bytes(self._session, 1, r.room, len(r.source or ()) or None) for r in inside)
        return state_bytes(self._session, rows, room, widest) + prompts <= self._options.state_bytes

    def _end_from_outside(self) -> None:
        """Let go who was cancelled, or whose time is over."""
        for queue in (self._waiting, self._reading):
            for job in [r for r in queue if self._reason(r) is not None]:
                queue.remove(job)
                job.reading = None
                for answer in job.answers:
                    self._end(job, answer, self._reason(job) or "cancelled")
        for at in range(len(self._running) - 1, -1, -1):
            job, answer = self._running[at]
            if (reason := self._reason(job)) is not None:
                self._leave(at)
                self._end(job, answer, reason)

    def _reason(self, job: Job) -> FinishReason | None:
        if job.cancelled.is_set():
            return "cancelled"
        return "deadline" if job.deadline is not None and self.clock() >= job.deadline else None

    def _end(self, job: Job, answer: Answer, reason: FinishReason) -> None:
        if answer.row.finish_reason is None:
            job.tell(answer, answer.row.end(reason), self.clock())
            self.counts[f"ended_{reason}"] += 1

    def _tell_end(self, job: Job, answer: Answer, reason: FinishReason) -> None:
        job.tell(answer, Chunk("", (), reason), self.clock())
        self.counts[f"ended_{reason}"] += 1

    def _leave(self, at: int) -> None:
        job, answer = self._running[at]
        prefixes = self._of(job.options.adapter)[1]
        if prefixes is not None and answer.trail is not None and not job.failed:
            self._keep(at, [*job.prompt, *answer.row.tokens], answer.trail, prefixes)
        self._rows.remove(at)
        self._running[at] = self._running[-1]
        self._running.pop()

    def _of(self, adapter: str | None) -> tuple[Session, Prefixes | None]:
        """Steps and beginnings of rows with an adapter; None: the session's own."""
        if adapter is None:
            return self._session, self._prefixes
        session = self._session.with_adapter(adapter)
        return session, None if self._prefixes is None else self._prefixes.of(session)

    def _keep(self, at: int, tokens: list[int], trail: Trail, prefixes: Prefixes) -> None:
        """Leave an answer to the prompt that will have it in it, such as the next one of a chat."""
        with suppress(MemoryError, StateError, OSError):  # then the next one reads it again
            state = self._rows.take(at)
            prefixes.keep(tokens[: int(state.lengths[0])], state, trail)

    # tokens

    def _decode(self) -> None:
        """One token for each answer that runs."""
        failures: dict[Job, Exception] = {}
        at = 0
        for state in self._rows.parts():
            part = self._running[at : at + state.batch]
            at += state.batch
            failures |= self._decode_part(part, state)
        for job, error in failures.items():
            self._fail(job, error)
        for place in range(len(self._running) - 1, -1, -1):
            job, answer = self._running[place]
            if job.failed or answer.row.finish_reason is not None:
                self._leave(place)

    def _decode_part(self, part: Sequence[_Running], state: State) -> dict[Job, Exception]:
        """One step; the jobs that it failed, all of them where the step itself did."""
        failures: dict[Job, Exception] = {}
        tokens = np.array([[answer.token] for _, answer in part], dtype=np.int64)
        try:
            choose = self._choices(tokens, state, [answer for _, answer in part])
        except Exception as error:  # the library failed, or memory ran out: nobody knows what the rows hold now
            return {job: error for job, _ in part}
        self.counts["steps"] += 1
        for row, (job, answer) in enumerate(part):
            if job in failures:
                continue
            try:
                if answer.trail is not None:
                    answer.trail.note(state, row)
                self._push(job, answer, choose(row))
            except Exception as error:  # a processor of its own, or logits that are no numbers
                failures[job] = error
        return failures

    def _choices(self, tokens: NDArray[np.int64], state: State, answers: Sequence[Answer]) -> Callable[[int], int]:
        """Read a token a row; what then chooses a row's next one, where the logits are if the session can do that."""
        deciding = [None if a.logprobs is not None else a.sampler.deciding for a in answers]
        counts = [count for count in deciding if count is not None]
        if len(counts) < len(deciding) or max(counts) > self._session.candidates:
            logits = self._session.step(tokens, state)[:, 0]
            return lambda row: _chosen(answers[row], logits[row])
        found = self._session.best(tokens, state, max(counts))

        def choose(row: int) -> int:
            ids, best = found.ids[row : row + 1, : counts[row]], found.logits[row : row + 1, : counts[row]]
            return int(answers[row].sampler.among(ids, best, [0], lambda: found.everything()[row : row + 1])[0])

        return choose

    def _push(self, job: Job, answer: Answer, token: int) -> None:
        answer.token = token
        chunk = answer.row.push(token)
        self.counts["tokens"] += 1
        if chunk.finish_reason:
            self.counts[f"ended_{chunk.finish_reason}"] += 1
        job.tell(answer, chunk, self.clock())

    def _read(self) -> None:
        """A piece of the prompt whose turn it is; with its last one, its answers begin to run."""
        job = self._reading.popleft()
        try:
            logits = self._read_piece(job)
            if logits is None:
                self._reading.append(job)
                return
            self._start(job, logits)
        except Exception as error:
            self._fail(job, error)

    def _read_piece(self, job: Job) -> NDArray[np.float32] | None:
        """The logits (1, vocab) of the prompt's last token, once that has been read."""
        start = self.clock()
        if job.reading is None:
            session, prefixes = self._of(job.options.adapter)
            job.reading = Reading(session, job.begins, job.room, self._piece, prefixes, job.prompt_logprobs, job.source)
            job.cached = job.reading.cached
            self.counts["prompt_tokens"] += len(job.source or ())
            self.counts["cached_tokens"] += job.cached
        reading, before = job.reading, job.reading.read
        logits = reading.go_on()
        self.counts["prompt_tokens"] += 0 if job.source else reading.read - before
        job.prefill_s += self.clock() - start
        if (progress := job.options.progress) is not None:
            progress(reading.read, len(job.begins))
        return logits

    def _start(self, job: Job, logits: NDArray[np.float32]) -> None:
        """Choose the first token of each answer; those that go on join the rows."""
        assert job.reading is not None
        state, job.read_logprobs, trail = job.reading.state, job.reading.logprobs, job.reading.trail
        job.reading = None
        for answer in job.answers:
            if answer.row.left <= 0:  # only the prompt was asked about
                self._end(job, answer, "length")
        if job.ended:
            return
        tokens = [_chosen(answer, logits[0]) for answer in job.answers]
        now = self.clock()
        job.ttft_s = now - job.submitted
        for answer, token in zip(job.answers, tokens, strict=True):
            answer.began = now
            self._push(job, answer, token)
        going_on = [answer for answer in job.answers if answer.row.finish_reason is None]
        for answer in going_on:
            answer.trail = None if trail is None else trail.followed()
            self._rows.add(state if len(going_on) == 1 else state.fork(), job.room)
            self._running.append((job, answer))

    def _fail(self, job: Job, error: BaseException) -> None:
        """End a job with an error; its rows leave after the step."""
        if not job.failed:
            self.counts["failed"] += 1
        job.fail(error)


def _chosen(answer: Answer, logits: NDArray[np.float32]) -> int:
    """A row's next token from its logits (vocab,), and how probable it was if anyone will ask."""
    token = int(answer.sampler(logits[None])[0])
    if (count := answer.logprobs) is not None:
        answer.row.logprobs.append(logprobs_of(logits, token, count))
    return token
