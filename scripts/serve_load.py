"""Tokens a second of a server with one client and with several at once, how long those wait, and what a token takes.

    python scripts/serve_load.py --bundle runs/smollm2-int8 --clients 1 8

The server is `edgellm serve` in a process of its own. The clients are sockets of this one, which looks at no more of an
answer than where its events begin, so that the processor is left to the server; what it takes itself is told too. Each
number of clients takes its turn in each round, so that a machine that changes its speed changes it for all; the best
round of each counts for tokens a second, all rounds for waiting. Every request reads a prompt of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgellm_runtime.bundle import Bundle

_EVENT = b"data: {"
_TICKS = os.sysconf("SC_CLK_TCK")
_LONGEST_S = 600.0


@dataclass
class Figures:
    """Of one number of clients.

    Args:
        rates: tokens a second, of each round.
        first: seconds to the first token, of each request.
        between: seconds between two tokens.
        processor: seconds of processor time a token, of the server and of the clients, of each round.
    """

    rates: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    processor: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Served:
    """A server that runs.

    Args:
        port: where, on this machine.
        process: its number.
        model: what it serves.
    """

    port: int
    process: int
    model: str

    @property
    def processor_s(self) -> float:
        """Seconds that all its threads have run."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def serving(bundle: Path, rows: int, threads: int | None) -> Iterator[Served]:
    """``edgellm serve``, until the end of the block."""
    command = [sys.executable, "-m", "edgellm", "serve", f"load={bundle}", "--port", "0", "--rows", str(rows),
               "--prefix-cache", "0", *(["--threads", str(threads)] if threads else [])]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = [""]
        while "Serving at" not in said[-1]:
            if not (line := process.stderr.readline()):
                raise RuntimeError(f"the server did not come up: {''.join(said)}")
            said.append(line)
        port = int(said[-1].strip().rpartition(":")[2])
        threading.Thread(target=process.stderr.read, daemon=True).start()  # its log must not fill the pipe
        yield Served(port, process.pid, "load")
    finally:
        process.terminate()
        process.wait(60)


class Client:
    """One request, whose events are counted as they come.

    Args:
        served: who is asked.
        prompt: token ids.
        tokens: how many are wanted.
    """

    def __init__(self, served: Served, prompt: Sequence[int], tokens: int) -> None:
        asked = {
            "model": served.model, "prompt": [*prompt], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        body = json.dumps(asked, allow_nan=False).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.socket = socket.create_connection(("127.0.0.1", served.port), _LONGEST_S)
        self.times = [time.perf_counter()]
        self._tail, self._tokens = b"", tokens
        self.socket.sendall(head.encode() + body)

    def read(self) -> bool:
        """Take what has come; whether that was all."""
        data = self.socket.recv(65536)
        if not data:
            self.socket.close()
            self._check()
            return True
        whole = self._tail[1 - len(_EVENT) :] + data  # an event's beginning may lie in two pieces
        self.times += [time.perf_counter()] * whole.count(_EVENT)
        self._tail = (self._tail + data)[-1024:]
        return False

    def _check(self) -> None:
        if f'"completion_tokens": {self._tokens},'.encode() not in self._tail or b"[DONE]" not in self._tail:
            raise RuntimeError(f"the answer has not {self._tokens} tokens; it ends with {self._tail[-300:]!r}")
        self.times.pop()  # of the usage


def measure(served: Served, prompts: Sequence[Sequence[int]], tokens: int, figures: Figures) -> None:
    """One round: all prompts at once."""
    before, own = served.processor_s, time.process_time()
    begin = time.perf_counter()
    clients = [Client(served, prompt, tokens) for prompt in prompts]
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        left = len(clients)
        while left:
            for key, _ in selector.select(_LONGEST_S):
                if key.data.read():
                    selector.unregister(key.fileobj)
                    left -= 1
    count = len(clients) * tokens
    figures.rates.append(count / (time.perf_counter() - begin))
    figures.processor.append(((served.processor_s - before) / count, (time.process_time() - own) / count))
    for client in clients:
        figures.first.append(client.times[1] - client.times[0])
        figures.between.extend(np.diff(client.times[1:]).tolist())


def told(found: dict[int, Figures]) -> None:
    """Print a table."""
    base = max(found[min(found)].rates)
    print("| clients | tokens/s | against one | first token p50 / p95 / p99, ms | between tokens p50 / p95 / p99, ms "
          "| processor time a token, ms: server + clients |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    for clients, figures in found.items():
        waits = [" / ".join(f"{1e3 * q:.0f}" for q in np.percentile(s, [50, 95, 99])) for s in
                 (figures.first, figures.between)]  # fmt: skip
        best, (server, own) = max(figures.rates), np.median(figures.processor, axis=0)
        print(f"| {clients} | {best:.1f} | {best / base:.2f} | {waits[0]} | {waits[1]} | {1e3 * server:.2f} + "
              f"{1e3 * own:.2f} |")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a bundle and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args(arguments)
    found = {clients: Figures() for clients in options.clients}
    vocab = Bundle(options.bundle, checksums=False).manifest.signature.logits.shape[-1]
    with serving(options.bundle, max(options.clients), options.threads) as served:
        measure(served, [[5] * 8], 4, Figures())
        for number in range(options.rounds):
            for clients, figures in found.items():
                rng = np.random.default_rng(1000 * number + clients)
                measure(
                    served, rng.integers(5, int(vocab), (clients, options.prompt)).tolist(), options.tokens, figures
                )
    told(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
