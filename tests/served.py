"""A server in this process, on a port of its own, with tiny bundles; and a step that waits until it may go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn

from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.server.host import Host, Hosted, open_host
from edgellm_runtime.server.options import ServerOptions
from edgellm_runtime.server.run import listen, server_of


@dataclass
class Served:
    """A server that runs."""

    address: str
    host: Host
    server: uvicorn.Server
    thread: threading.Thread

    @property
    def model(self) -> Hosted:
        return next(iter(self.host))

    def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return httpx.post(f"{self.address}{path}", json=body, timeout=60, **kwargs)


@contextmanager
def serving(
    bundles: Mapping[str, Path], *, batch: BatchOptions | None = None, threads: int | None = 1, **options: Any
) -> Iterator[Served]:
    checked = ServerOptions(port=0, batch=batch or BatchOptions(), **options)
    host = open_host(bundles, checked.batch, threads=threads)
    with listen(checked) as sock:
        server = server_of(host, checked)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{sock.getsockname()[1]}", host, server, thread)
        finally:
            server.should_exit = True
            thread.join(60)
            host.close()
    assert not thread.is_alive()


class Gate:
    """Lets steps of single tokens through only once it is open.

    Args:
        hosted: whose steps wait.
        free: how many go through before.
    """

    def __init__(self, hosted: Hosted, free: int = 0) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        session = hosted.model.session
        step = session.step
        left = [free]

        def waiting(tokens: Any, *args: Any, **kwargs: Any) -> Any:
            if tokens.shape[1] == 1 and left[0] == 0:
                self.reached.set()
                assert self.open.wait(60)
            elif tokens.shape[1] == 1:
                left[0] -= 1
            return step(tokens, *args, **kwargs)

        session.step = waiting  # type: ignore[method-assign]


def until(true: Callable[[], bool]) -> None:
    """Look again and again until it is so."""
    pause = threading.Event()
    for _ in range(6000):
        if true():
            return
        pause.wait(0.01)
    raise AssertionError("it never was so")
