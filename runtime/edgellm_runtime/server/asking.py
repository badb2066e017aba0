"""Asking a scheduler from asyncio: nothing here holds the loop up, and who has gone is asked no further."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from edgellm_runtime.batching.job import Event
from edgellm_runtime.generation.answer import Chunk, Generation
from edgellm_runtime.generation.options import OptionKeywords
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.host import Hosted

__all__ = ["Asked", "ask"]


class Asked:
    """A request that runs.

    Args:
        answers: how many come.
        events: what the scheduler tells.
        cancelled: ends it.
    """

    def __init__(self, answers: int, events: asyncio.Queue[Event], cancelled: threading.Event) -> None:
        self._answers, self._events, self._cancelled = answers, events, cancelled
        self._found: dict[int, Generation] = {}
        self.prompt: tuple[int, ...] = ()

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
            event = await self._events.get()
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
    loop, events, cancelled = asyncio.get_running_loop(), asyncio.Queue[Event](), threading.Event()
    asked = Asked(answers, events, cancelled)
    own: OptionKeywords = {**options, "cancel": cancelled, "deadline": timeout}
    if (adapter := hosted.model.adapter) is not None:
        own["adapter"] = adapter

    def submit() -> None:
        ticket = hosted.scheduler.submit(
            prompt(),
            answers=answers,
            sink=lambda event: _tell(loop, events, event),
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


def _tell(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)
