"""From what was asked to a response: whole, or as events, with errors in either."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.responses import Response

from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.server.call import Call, EventStream, event, until_gone
from edgellm_runtime.server.faults import body_of, error_of, status_of
from edgellm_runtime.server.journal import Journal

__all__ = ["completed", "note", "streamed"]

_LOG = logging.getLogger("edgellm.server")


async def completed(call: Call) -> list[Generation]:
    """The whole answers to all that was asked; a client that goes away ends them.

    Raises:
        RuntimeFault: what ended them.
    """
    gone = asyncio.create_task(until_gone(call.request.receive))
    gone.add_done_callback(lambda _: call.leave())
    try:
        for asked in call.asked:
            async for _ in asked.chunks():
                call.token_came()
        return [answer for asked in call.asked for answer in asked.found]
    finally:
        gone.cancel()
        call.leave()


def streamed(call: Call, events: AsyncIterator[bytes]) -> Response:
    """The events, of which an error is the last."""
    journal: Journal = call.request.app.state.journal
    return EventStream(call, _told(call, events), lambda: journal.end(call))


async def _told(call: Call, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    try:
        async for each in events:
            yield each
    except Exception as error:
        note(call, error)
        found = error_of(error)
        call.status = status_of(found, call.dialect)
        yield event(body_of(found, call.dialect, call.id), "error" if call.dialect == "anthropic" else "")


def note(call: Call, error: BaseException) -> None:
    """Keep what went wrong for the log; what a client is not told of stands there."""
    found = error_of(error)
    call.error = found.code or type(error).__name__
    if found.status == 500:
        _LOG.error("%s %s: %s", call.id, call.route, error, exc_info=error)
