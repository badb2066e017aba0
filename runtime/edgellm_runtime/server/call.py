"""One HTTP request from its first byte to its log line."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgellm_runtime.json_text import json_text
from edgellm_runtime.server.asking import Asked
from edgellm_runtime.server.faults import Dialect
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Host
from edgellm_runtime.server.options import ServerOptions

__all__ = ["Call", "EventStream", "Frames", "JsonText", "event", "until_gone"]

_SILENCE_S = 15.0
Handler = Callable[["Call"], Awaitable[Response]]


@dataclass
class Call:
    """A request that is answered.

    Args:
        request: HTTP's.
        dialect: whose interface it speaks.
        host: the models.
        options: the server's.
        route: what is asked for, without what varies.
        fields: of the body.
        model: the name of the model that answers; empty: none yet.
        asked: what was asked of it.
        status: HTTP's, of the answer.
        first_s: seconds until the first token; None: there was none.
        error: what went wrong, for the log.
    """

    request: Request
    dialect: Dialect
    host: Host
    options: ServerOptions
    route: str
    fields: Fields = field(default_factory=lambda: Fields({}))
    model: str = ""
    asked: list[Asked] = field(default_factory=list)
    status: int = 200
    first_s: float | None = None
    error: str = ""
    id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    began: float = field(default_factory=time.perf_counter)

    def leave(self) -> None:
        """Ask nothing further, as the client has gone or has all."""
        for asked in self.asked:
            asked.cancel()

    def token_came(self) -> None:
        """Note the time of the first."""
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.began


class JsonText(Response):
    """A JSON body; what is no number is no JSON either, and a fault of ours."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes."""
        return json_text(content).encode()


def event(data: Any, name: str = "") -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json_text(data)
    return f"{f'event: {name}' + chr(10) if name else ''}data: {text}\n\n".encode()


class Frames:
    """Events that differ in their last field only; what comes before it is written once.

    Args:
        head: the fields before.
        name: of the last.
    """

    def __init__(self, head: Mapping[str, Any], name: str) -> None:
        self._before = f"data: {json_text(head)[:-1]}{', ' if head else ''}{json_text(name)}: "

    def event(self, value: Any) -> bytes:
        """The event with a value of that field."""
        return f"{self._before}{json_text(value)}}}\n\n".encode()


async def until_gone(receive: Receive) -> None:
    """Return when the client has gone; its body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as they come.

    Args:
        call: left when the client goes.
        events: each whole.
        done: is called at the end, whatever it is.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, events: AsyncIterator[bytes], done: Callable[[], None]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers.update({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._call, self._events, self._done = call, events, done
        self._sent = time.monotonic()  # when something was

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        gone = asyncio.create_task(until_gone(receive))
        gone.add_done_callback(lambda _: self._call.leave())
        comments: asyncio.Task[None] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            comments = asyncio.create_task(self._comments(send))
            async for event in self._events:
                self._sent = time.monotonic()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            comments.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client has gone
            pass
        finally:
            gone.cancel()
            if comments is not None:
                comments.cancel()
            self._call.leave()
            self._done()

    async def _comments(self, send: Send) -> None:
        """A comment whenever there has been silence: what lies between might take it for the end."""
        with suppress(OSError):  # the client has gone, as whoever sends events will see
            while True:
                await asyncio.sleep(max(self._sent + _SILENCE_S - time.monotonic(), 0.0))
                if time.monotonic() >= self._sent + _SILENCE_S:
                    self._sent = time.monotonic()
                    await send({"type": "http.response.body", "body": b": still here\n\n", "more_body": True})
