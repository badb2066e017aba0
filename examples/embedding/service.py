"""An asyncio service: a line of JSON with a prompt comes in, lines of JSON with its answer go out as they are made.

    python examples/embedding/service.py BUNDLE --port 7000
    echo '{"prompt": "Once upon a time", "max_new_tokens": 20}' | nc 127.0.0.1 7000

All clients' answers are rows of one batch. The event loop never waits for the model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from edgellm_runtime import Model, OptionError, RuntimeFault, load

__all__ = ["Service", "main"]

_ALLOWED = {"prompt", "max_new_tokens", "temperature", "top_p", "stop", "seed"}
_LONGEST = 1 << 20  # bytes of a request


class Service:
    """Answers clients until it is stopped.

    Args:
        model: answers them.
        rows: answers that are made at once.
        queue: requests that may wait; further ones are told to come back.
    """

    def __init__(self, model: Model, *, rows: int = 8, queue: int = 64) -> None:
        self._scheduler = model.scheduler(rows=rows, queue=queue)
        self._clients = set[asyncio.Task[None]]()
        self._answers = set[asyncio.Task[None]]()
        self._server: asyncio.Server | None = None
        self._stops = False

    async def start(self, host: str, port: int) -> int:
        """Listen; gives the port, for one of 0 is any that is free."""
        self._server = await asyncio.start_server(self._client, host, port, limit=_LONGEST)
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    async def stop(self) -> None:
        """Take no further request, answer those that run, and end."""
        assert self._server is not None
        self._stops = True
        self._server.close()
        while self._answers:
            await asyncio.wait(self._answers)
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await asyncio.to_thread(self._scheduler.close)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client's requests, one after the other; who goes away is answered no further."""
        client = asyncio.current_task()
        assert client is not None
        self._clients.add(client)
        try:
            while (line := await self._next(reader, writer)) and not self._stops:
                await self._tracked(self._answer(line, writer))
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the service ends
        finally:
            self._clients.discard(client)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _next(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        try:
            return await reader.readline()
        except ValueError:  # so asyncio calls a line that is too long
            writer.write(_line({"error": f"a request has at most {_LONGEST} bytes"}))
            return b""

    async def _tracked(self, answer: Coroutine[Any, Any, None]) -> None:
        """Run an answer so that :meth:`stop` waits for it."""
        task = asyncio.create_task(answer)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        await task

    async def _answer(self, line: bytes, writer: asyncio.StreamWriter) -> None:
        try:
            async with contextlib.aclosing(self._chunks(_request(line))) as chunks:
                async for chunk in chunks:
                    writer.write(_line(chunk))
                    await writer.drain()  # a client that reads slowly holds nobody else up
        except RuntimeFault as error:  # its text is one sentence for whoever asked
            writer.write(_line({"error": str(error)}))
            await writer.drain()

    async def _chunks(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What there is of an answer as it comes; closed early, the model makes no more of it."""
        loop, events, cancel = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def sink(event: Any) -> None:  # on the scheduler's thread
            loop.call_soon_threadsafe(events.put_nowait, event)

        submit: Callable[..., Any] = self._scheduler.submit
        try:
            await asyncio.to_thread(submit, request.pop("prompt"), sink=sink, cancel=cancel, **request)
            while True:
                event = await events.get()
                if event.error is not None:
                    raise event.error
                ending = {"finish_reason": event.chunk.finish_reason} if event.chunk.finish_reason else {}
                yield {"text": event.chunk.text, **ending}
                if ending:
                    return
        finally:
            cancel.set()


def _request(line: bytes) -> dict[str, Any]:
    """A client's line, of which nothing is believed.

    Raises:
        OptionError: it is no object of JSON with a prompt and known options.
    """
    try:
        request = json.loads(line)
    except ValueError as error:
        raise OptionError(f"the line is no JSON ({error}); send an object with a prompt") from None
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise OptionError('the line has no prompt; send an object such as {"prompt": "Hello"}')
    if unknown := sorted(request.keys() - _ALLOWED):
        raise OptionError(f"unknown options {unknown}; known are {sorted(_ALLOWED)}")
    return request


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


async def _serve(model: Model, host: str, port: int) -> None:
    service, ended = Service(model), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    print(f"listening at {host}:{await service.start(host, port)}", flush=True)
    await ended.wait()
    await service.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Answer lines of JSON over TCP.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=7000)
    given = parser.parse_args(arguments)
    asyncio.run(_serve(load(given.bundle), given.host, given.port))


if __name__ == "__main__":
    main()
