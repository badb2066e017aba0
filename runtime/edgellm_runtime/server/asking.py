"""Asking a scheduler from asyncio: nothing here holds the loop up, and who has gone is asked no further."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

from edgellm_runtime.batching.job import Event
from edgellm_runtime.generation.answer import Chunk, Generation
from edgellm_runtime.generation.options import OptionKeywords
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.host import Hosted

__all__ = ["Asked", "Mail", "ask"]


class Mail:
    """Takes events from threads to a loop, which is woken once for all that a step of the model has.

    To wake the loop for each row would cost the thread that steps as much as choosing their tokens, and have the loop
    compete with it between them.

    Args:
        loop: whose tasks read them.
    """

    _all: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Mail]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._letters = ref(loop), deque[tuple[Asked, Event]]()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Mail:
        """A loop's own."""
        return cls._all.setdefault(loop, cls(loop))

    def post(self, asked: Asked, event: Event) -> None:
        """Put down an event, from any thread; it is read once the loop has been woken."""
        self._letters.append((asked, event))

    def wake(self) -> None:
        """Have the loop read what was put down. Where it has ended, those who asked there are asked no further."""
        if not self._letters:
            return
        try:
            if (loop := self._loop()) is None:
                raise RuntimeError("the loop is gone")
            loop.call_soon_threadsafe(self._read)
        except RuntimeError:
            while self._letters:
                self._letters.popleft()[0].cancel()

    def _read(self) -> None:
        while self._letters:
            asked, event = self._letters.popleft()
            asked.arrive(event)


class Asked:
    """A request that runs.

    Args:
        answers: how many come.
        cancelled: ends it.
    """

    def __init__(self, answers: int, cancelled: threading.Event) -> None:
        self._answers, self._cancelled = answers, cancelled
        self._events, self._waiting = deque[Event](), asyncio.get_running_loop().create_future()
        self._found: dict[int, Generation] = {}
        self.prompt: tuple[int, ...] = ()

    def arrive(self, event: Event) -> None:
        """Take what the scheduler tells; on the loop's thread."""
        self._events.append(event)
        if not self._waiting.done():
            self._waiting.set_result(None)

    def cancel(self) -> None:
        """Ask no further, as its reader has gone."""
        self._cancelled.set()

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Its answers' chunks as (answer, chunk).

        Raises:
            ApiError: its time was over, or the server ends.
            RuntimeFault: what else ended it.
        """
        while len(self._found) < self._answers:
            if not self._events:
                self._waiting = asyncio.get_running_loop().create_future()
                await self._waiting
            event = self._events.popleft()
            if event.error is not None:
                raise event.error
            assert event.chunk is not None
            if event.generation is not None:
                self._found[event.answer] = event.generation
            if event.chunk.finish_reason == "deadline":
                self.cancel()
                raise ApiError("The answer took longer than this server's limit.", 504, code="timeout")
            if event.chunk.finish_reason == "cancelled":
                raise ApiError("The request was ended.", 503, code="cancelled")
            yield event.answer, event.chunk

    def answer(self, index: int) -> Generation:
        """One that is whole."""
        return self._found[index]

    @property
    def found(self) -> list[Generation]:
        """The answers that are whole."""
        return [generation for _, generation in sorted(self._found.items())]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that had been read before, as far as an answer is whole."""
        return max((generation.cached_tokens for generation in self._found.values()), default=0)

    @property
    def answer_tokens(self) -> int:
        """Tokens of all whole answers."""
        return sum(len(generation.tokens) for generation in self._found.values())


async def ask(
    hosted: Hosted, prompt: Callable[[], Any], *, answers: int = 1, timeout: float | None = None,
    options: OptionKeywords, prompt_logprobs: int | None = None,
) -> Asked:  # fmt: skip
    """Hand in a request.

    Args:
        hosted: whom to ask.
        prompt: makes a text or token ids; called in a thread of its own, since templates and tokenizers take time.
        answers: how many.
        timeout: seconds after which it is ended.
        options: how to choose, and when to end.
        prompt_logprobs: as for :meth:`~edgellm_runtime.batching.scheduler.Scheduler.submit`.

    Raises:
        RuntimeFault: the request cannot be taken.
    """
    cancelled = threading.Event()
    asked, mail = Asked(answers, cancelled), Mail.of(asyncio.get_running_loop())
    own: OptionKeywords = {**options, "cancel": cancelled, "deadline": timeout}
    if (adapter := hosted.model.adapter) is not None:
        own["adapter"] = adapter

    def submit() -> None:
        hosted.scheduler.call_after_rounds(mail.wake)
        ticket = hosted.scheduler.submit(
            prompt(),
            answers=answers,
            sink=lambda event: mail.post(asked, event),
            prompt_logprobs=prompt_logprobs,
            **own,
        )
        asked.prompt = ticket.prompt

    try:
        await asyncio.to_thread(submit)
    except asyncio.CancelledError:
        cancelled.set()
        raise
    return asked
