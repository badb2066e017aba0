"""One answer's chunks as they come: to a loop, or to an asyncio loop, whose thread no step holds up."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Protocol, Self, TypeVar

from edgellm_runtime.generation.answer import Chunk, Generation
from edgellm_runtime.generation.generate import Run

__all__ = ["AsyncStream", "Stream", "in_worker"]

_T = TypeVar("_T")


class Stream(Iterator[Chunk]):
    """One answer's chunks as they come; it may be left at any time, or with ``with``, which closes it.

    Args:
        run: of one prompt.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._chunks = run.chunks()
        self.generation: Generation | None = None  # the whole answer, or what there is of one that was ended early

    def __repr__(self) -> str:
        return f"<Stream, {'open' if self.generation is None else self.generation.finish_reason}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Chunk:
        _, chunk = next(self._chunks)
        if chunk.finish_reason:
            self.generation = self._run.result()
        return chunk

    def cancel(self) -> None:
        """End the answer before its next token, or within a long prompt; any thread may call it.

        The reader gets one more chunk, whose ``finish_reason`` is ``cancelled``.
        """
        self._run.cancel()

    def close(self) -> None:
        """Stop here, as the reader; what there is of the answer is ``generation``."""
        self._chunks.close()
        if self.generation is None:
            self._run.leave()
            self.generation = self._run.result()


class _Source(Protocol):
    """What an :class:`AsyncStream` takes its chunks from."""

    @property
    def generation(self) -> Generation | None: ...

    def __next__(self) -> Chunk: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class AsyncStream(AsyncIterator[Chunk]):
    """One answer's chunks as they come, for ``async for``; each step runs in a worker thread of the event loop's.

    Where the task that waits for a chunk is cancelled, the answer ends at its next token, or between two pieces of a
    long prompt; only then is the cancellation let through, so that the stream is closed and its state whole.

    Args:
        source: of the chunks.
    """

    def __init__(self, source: _Source) -> None:
        self._source = source

    def __repr__(self) -> str:
        found = self.generation
        return f"<AsyncStream, {'open' if found is None else found.finish_reason}>"

    @property
    def generation(self) -> Generation | None:
        """The whole answer, or what there is of one that was ended early; None while it is open."""
        return self._source.generation

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> Chunk:
        import asyncio

        following: Callable[[], Chunk | None] = functools.partial(next, self._source, None)
        try:
            chunk = await in_worker(following, self.cancel)
        except asyncio.CancelledError:
            self._source.close()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def cancel(self) -> None:
        """End the answer before its next token, or within a long prompt; any thread may call it."""
        self._source.cancel()

    async def aclose(self) -> None:
        """Stop here, as the reader; what there is of the answer is :attr:`generation`."""
        self._source.close()


async def in_worker(work: Callable[[], _T], cancel: Callable[[], None]) -> _T:
    """Run something in a worker thread of the event loop's.

    Args:
        work: what.
        cancel: asks it to end soon; called when the waiting task is cancelled. The cancellation comes through once the
            work has ended, for nothing may be left running on a state that its owner takes for free.
    """
    import asyncio  # here, not above: most programs have no such loop, and it brings TLS along

    run = functools.partial(contextvars.copy_context().run, work)
    future = asyncio.get_running_loop().run_in_executor(None, run)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        cancel()
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):  # the first is on its way already
                await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # looked at, so that nobody is told that it was lost
        raise
