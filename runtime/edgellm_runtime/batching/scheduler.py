"""A thread that runs requests on one model, and the queue before it. Any thread may submit, read and cancel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, Unpack

from edgellm_runtime.arguments import check_flag, check_integer, shown
from edgellm_runtime.batching.batcher import Batcher, context_within, state_bytes
from edgellm_runtime.batching.job import Event, Job, Sink
from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.errors import BusyError, ContextError, OptionError
from edgellm_runtime.generation.answer import Chunk, Generation
from edgellm_runtime.generation.fits import check_fits
from edgellm_runtime.generation.options import GenerationOptions, OptionKeywords, with_defaults
from edgellm_runtime.generation.prefix_cache import Prefixes
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["Load", "Scheduler", "Ticket"]


@dataclass(frozen=True)
class Load:
    """How busy a scheduler is.

    Args:
        running: answers that run, and those whose prompt is being read.
        waiting: requests without a place.
        state_bytes: what states take.
        counts: since the start: ``requests``, ``prompt_tokens`` that were read, ``cached_tokens`` that
            had been before, ``tokens``, ``steps``, ``refused``, ``failed``, and
            ``ended_`` with each reason.
    """

    running: int
    waiting: int
    state_bytes: int
    counts: dict[str, int]


class Ticket(Iterator[tuple[int, Chunk]]):
    """A request that was submitted: its answers' chunks as they come, as (answer, chunk).

    Args:
        prompt: its tokens.
        answers: how many.
        events: what the scheduler tells.
        cancelled: what it looks at.
    """

    def __init__(
        self, prompt: tuple[int, ...], answers: int, events: queue.SimpleQueue[Event], cancelled: threading.Event
    ) -> None:
        self.prompt = prompt
        self._answers, self._events, self._cancelled = answers, events, cancelled
        self._found: dict[int, Generation] = {}

    def __next__(self) -> tuple[int, Chunk]:
        if len(self._found) == self._answers:
            raise StopIteration
        event = self._events.get()
        if event.error is not None:
            self._answers = len(self._found)
            raise event.error
        if event.generation is not None:
            self._found[event.answer] = event.generation
        assert event.chunk is not None
        return event.answer, event.chunk

    def results(self) -> list[Generation]:
        """The whole answers, once they are there.

        Raises:
            RuntimeFault: what ended the job.
        """
        for _ in self:
            pass
        return [generation for _, generation in sorted(self._found.items())]

    def cancel(self) -> None:
        """End its answers before their next token; they are whole with what they have, as ``cancelled``."""
        self._cancelled.set()


class Scheduler:
    """Runs requests on a model together. ``Model.scheduler`` makes one; it has one thread until it is closed.

    Args:
        session: steps the model; others may use it too.
        tokenizer: gives answers a text.
        encode: gives the tokens of a prompt.
        options: how many at once.
        defaults: options of generation that the model itself sets.
        prefixes: what prompts began with before.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer | None, encode: Callable[[Any], list[int]], options: BatchOptions,
        *, defaults: Mapping[str, Any], prefixes: Prefixes | None = None,
    ) -> None:  # fmt: skip
        self._session, self._tokenizer, self._encode, self.options = session, tokenizer, encode, options
        self._defaults = defaults
        self._batcher = Batcher(session, options, prefixes=prefixes)
        self.context = context_within(session, options.state_bytes)
        if self.context < 2:
            raise OptionError(
                f"state_bytes is {options.state_bytes}, but a row of 64 tokens takes "
                f"{2 * state_bytes(session, 1, 64)}; give it more"
            )
        self._changed = threading.Condition()
        self._incoming: list[Job] = []
        self._refused = 0
        self._closing, self._drains = False, True
        self._after: tuple[Callable[[], None], ...] = ()
        self._thread = threading.Thread(target=self._run, name="edgellm-scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def submit(
        self, prompt: Any, *, answers: int = 1, wait: bool = False, sink: Sink | None = None,
        prompt_logprobs: int | None = None, **options: Unpack[OptionKeywords],
    ) -> Ticket:  # fmt: skip
        """Hand in a request.

        Args:
            prompt: a text or token ids.
            answers: how many; answer ``i`` draws with the seed ``seed + i``.
            wait: whether to wait for a place in the queue, and not to be refused.
            sink: is told of each piece instead of the ticket, which then has none, on the scheduler's thread, which it
                must not hold up.
            prompt_logprobs: answers have the log-probabilities of the prompt's tokens too, and of so many of the most
                probable ones beside each; the prompt is then read whole, whatever is cached.
            **options: those of :class:`~edgellm_runtime.generation.options.GenerationOptions`; a ``deadline`` counts
                from here.

        Raises:
            BusyError: the queue is full, or the scheduler is closed.
            ContextError: the prompt is longer than the context, or than memory allows.
            OptionError: an option outside its range.
        """
        checked = with_defaults(self._defaults, options)
        answers = check_integer("answers", answers, 1, self.options.rows)
        wait = check_flag("wait", wait)
        if sink is not None and not callable(sink):
            raise OptionError(f"sink is {shown(sink)}; it must be a function of an event, or None")
        if prompt_logprobs is not None:
            prompt_logprobs = check_integer("prompt_logprobs", prompt_logprobs, 0, 2**20)
        tokens = self._encode(prompt)
        self._check(tokens, checked, prompt_logprobs)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        job = Job(
            tokens, checked, answers, sink or events.put, self._batcher.clock(), session=self._session,
            tokenizer=self._tokenizer, context=self._context_for(tokens), prompt_logprobs=prompt_logprobs,
        )  # fmt: skip
        with self._changed:
            while wait and not self._closing and self._queued >= self.options.queue:
                self._changed.wait()
            if self._closing:
                raise BusyError("the scheduler is closed and takes no further requests; make another")
            if self._queued >= self.options.queue:
                self._refused += 1
                raise BusyError(f"{self._queued} requests wait already, as many as may; try again later")
            self._incoming.append(job)
            self._changed.notify_all()
        return Ticket(job.prompt, answers if sink is None else 0, events, job.cancelled)

    def call_after_rounds(self, told: Callable[[], None]) -> None:
        """Have a function called after each round, when all sinks have been told of it: once for all their events.

        Args:
            told: it is called on the scheduler's thread, which it must not hold up, and once however often it is given.
        """
        with self._changed:
            if told not in self._after:
                self._after += (told,)

    @property
    def load(self) -> Load:
        """How busy it is, about now."""
        batcher = self._batcher
        counts = {**dict(batcher.counts), "refused": self._refused}
        return Load(batcher.running, self._queued, batcher.nbytes, counts)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def close(self, *, drain: bool = True) -> None:
        """Take no further requests, and end the thread.

        Args:
            drain: whether what was taken is answered first; else it is cancelled.
        """
        with self._changed:
            self._closing, self._drains = True, self._drains and drain
            self._changed.notify_all()
        self._thread.join()

    @property
    def _queued(self) -> int:
        return len(self._incoming) + self._batcher.waiting

    def _run(self) -> None:
        try:
            while self._take():
                self._batcher.round()
                with self._changed:
                    self._changed.notify_all()  # who waits for a place
                self._call_after()
        except BaseException as error:  # a fault of ours: whoever waits must not wait for ever
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            for job in self._incoming:
                job.fail(error)
            self._batcher.fail_all(error)
            raise
        finally:
            self._call_after()

    def _call_after(self) -> None:
        for told in self._after:
            told()

    def _take(self) -> bool:
        """Hand over what has come; False once there is nothing left to do and nothing more will come."""
        with self._changed:
            while not (self._incoming or self._batcher.busy or self._closing):
                self._changed.wait()
            new, self._incoming = self._incoming, []
            for job in new:
                self._batcher.add(job)
            closing, cancels = self._closing, self._closing and not self._drains
        if cancels:
            self._batcher.cancel_all()
        return self._batcher.busy or not closing

    def _check(self, tokens: list[int], options: GenerationOptions, prompt_logprobs: int | None) -> None:
        """See that a prompt and its options fit the model, before they wait."""
        check_fits(self._session, self._tokenizer, [tokens], options)
        if options.beams > 1:
            raise OptionError(f"beams is {options.beams}, and a scheduler follows one; use model.generate for beams")
        if options.adapter is not None:
            self._session.with_adapter(options.adapter)
        if prompt_logprobs is not None and self._session.encoder is not None:
            raise OptionError("prompt_logprobs is given, but the model answers a source and does not predict it")

    def _context_for(self, tokens: list[int]) -> int:
        """The most tokens that a prompt and its answer may have; of a source, its answer with what that begins with.

        Raises:
            ContextError: not even the prompt, or a token of an answer to the source.
        """
        memory, encoder = f"memory for states ({self.options.state_bytes} bytes) allows", self._session.encoder
        if encoder is None:
            if len(tokens) > self.context:
                raise ContextError(
                    f"the prompt has {len(tokens)} tokens, but {memory} {self.context}; shorten the prompt, or give it "
                    "more"
                )
            return self.context
        context = context_within(self._session, self.options.state_bytes, len(tokens))
        if context <= len(encoder.start):
            raise ContextError(
                f"the source has {len(tokens)} tokens, but {memory} no answer to as many; shorten it, or give it more"
            )
        return context
