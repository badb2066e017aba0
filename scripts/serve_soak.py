"""Load a server for minutes with all that clients do, and see that it keeps its memory, and loses and mixes nothing.

    python scripts/serve_soak.py --minutes 20 --bundle runs/smollm2-int4
    python scripts/serve_soak.py --requests 2000

Several clients at once ask, stream, leave in the middle, send what is no request, and ask for too much. Each greedy
answer that comes to its end is compared with what the model says alone. The server runs in this process, so that its
memory is this process's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import httpx2 as httpx
from served import Served, serving

from edgellm_runtime.batching.options import BatchOptions
from edgellm_runtime.checks.memory import memory_now_and_at_most

_WORDS = ["the", "user", "said", "hello", "to", "the", "assistant", "and", "the", "world"]
_GROWTH = 0.02
_WARM_UP = 0.25  # of the goal, after which memory may not grow


class Goal:
    """How long it goes on: for so many seconds, or until so many requests have come to their end.

    Args:
        seconds: None: however long it takes.
        requests: None: however many there are.
    """

    def __init__(self, seconds: float | None, requests: int | None) -> None:
        self._seconds, self._requests = seconds, requests
        self._begin, self._lock, self._count = time.monotonic(), threading.Lock(), 0

    def count(self) -> None:
        """Note one that has come to its end; those that a full queue turned away come again, and are not counted."""
        with self._lock:
            self._count += 1

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        done = [0.0]
        if self._seconds is not None:
            done.append((time.monotonic() - self._begin) / self._seconds)
        if self._requests is not None:
            done.append(self._count / self._requests)
        return max(done)


class Client(threading.Thread):
    """One of those who ask.

    Args:
        served: whom.
        number: which.
        goal: says when to stop.
        expected: greedy answers, by prompt.
    """

    def __init__(self, served: Served, number: int, goal: Goal, expected: dict[str, str]) -> None:
        super().__init__(name=f"client {number}")
        self._served, self._goal, self._expected = served, goal, expected
        self._random, self._http = random.Random(number), httpx.Client(timeout=120)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self) -> None:
        """Do one thing after another."""
        kinds = [self._whole, self._whole, self._stream, self._leave, self._malformed, self._too_long, self._several]
        while self._goal.share < 1:
            kind = self._random.choice(kinds)
            try:
                kind()
                self.counts[kind.__name__[1:]] += 1
                self._goal.count()
            except Exception as error:
                self.faults.append(f"{kind.__name__}: {type(error).__name__}: {error}")
        self._http.close()

    def _body(self, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": self._served.model.name, "prompt": prompt, "temperature": 0, "max_tokens": 24, **more}

    def _prompt(self) -> str:
        return self._random.choice(list(self._expected))

    def _post(self, body: Any) -> httpx.Response:
        while True:
            found = self._http.post(f"{self._served.address}/v1/completions", json=body)
            if found.status_code != 503:
                return found
            self.counts["come again"] += 1
            time.sleep(0.1 * self._random.random())

    def _same(self, prompt: str, text: str) -> None:
        if text != self._expected[prompt]:
            raise AssertionError(f"{prompt!r} got {text!r}, alone {self._expected[prompt]!r}")

    def _whole(self) -> None:
        prompt = self._prompt()
        self._same(prompt, self._post(self._body(prompt)).raise_for_status().json()["choices"][0]["text"])

    def _several(self) -> None:
        prompts = [self._prompt() for _ in range(3)]
        found = self._post({**self._body(""), "prompt": prompts}).raise_for_status().json()["choices"]
        for prompt, choice in zip(prompts, found, strict=True):
            self._same(prompt, choice["text"])

    def _stream(self, leave_after: int | None = None) -> None:
        prompt, text = self._prompt(), ""
        body = self._body(prompt, stream=True)
        with self._http.stream("POST", f"{self._served.address}/v1/completions", json=body) as response:
            if response.status_code == 503:
                return
            for number, line in enumerate(line for line in response.iter_lines() if line):
                if leave_after is not None and number >= leave_after:
                    return
                if line != "data: [DONE]":
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        if leave_after is None:
            self._same(prompt, text)

    def _leave(self) -> None:
        self._stream(leave_after=self._random.randrange(6))

    def _malformed(self) -> None:
        wrong = [b"{", b"[]", b'{"model": 1}', b"\xff" * 20, json.dumps(self._body("x", n=0), allow_nan=False).encode()]
        content = self._random.choice(wrong)
        found = self._http.post(f"{self._served.address}/v1/completions", content=content,
                                headers={"content-type": "application/json"})  # fmt: skip
        if found.status_code not in (400, 404):
            raise AssertionError(f"{content!r} got {found.status_code}")

    def _too_long(self) -> None:
        context = self._served.model.scheduler.context
        found = self._post({**self._body(""), "prompt": [5] * (context + 1)})
        if found.status_code != 400 or found.json()["error"]["code"] != "context_length_exceeded":
            raise AssertionError(f"too long a prompt got {found.status_code}")


def soak(
    served: Served, *, seconds: float | None = None, requests: int | None = None, clients: int,
    growth_allowed: float = _GROWTH,
) -> list[str]:  # fmt: skip
    """Run the clients; what went wrong."""
    model = served.model.model
    prompts = [" ".join(_WORDS[i:] + _WORDS[:i]) + " and" * (i % 4) for i in range(len(_WORDS))]
    expected = {p: model.generate(p, max_new_tokens=24, temperature=0).text for p in prompts}
    begin = time.monotonic()
    goal = Goal(seconds, requests)
    threads = [Client(served, i, goal, expected) for i in range(clients)]
    for thread in threads:
        thread.start()
    most = dict.fromkeys(("warming up", "after"), memory_now_and_at_most()[0])
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        part = "warming up" if goal.share < _WARM_UP else "after"
        most[part] = max(most[part], memory_now_and_at_most()[0])
    faults = [fault for thread in threads for fault in thread.faults]
    load, counts = served.model.scheduler.load, sum((t.counts for t in threads), Counter())
    deadline = time.monotonic() + 60
    while (load.running or load.waiting) and time.monotonic() < deadline:
        time.sleep(0.05)
        load = served.model.scheduler.load
    if load.running or load.waiting:
        faults.append(f"{load.running} answers run and {load.waiting} requests wait though nobody asks")
    growth = most["after"] / most["warming up"] - 1
    if growth > growth_allowed:
        faults.append(f"memory has grown by {growth:.1%} after the warm-up, from {most['warming up'] / 1e6:.0f} MB")
    print(f"{sum(counts.values())} requests in {time.monotonic() - begin:.0f} s: {dict(sorted(counts.items()))}")
    print(f"scheduler: {dict(sorted(load.counts.items()))}")
    print(
        f"memory {most['warming up'] / 1e6:.1f} MB while warming up, {most['after'] / 1e6:.1f} MB after: {growth:+.2%}"
    )
    return faults


def main() -> int:
    """Serve a bundle and load it; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, help="with a tokenizer; none: a tiny one of random weights")
    parser.add_argument("--minutes", type=float, help="to go on for; 20 where no number of requests is given")
    parser.add_argument("--requests", type=int, help="to go on until so many have come to their end")
    parser.add_argument("--clients", type=int, default=12)
    options = parser.parse_args()
    if options.bundle is None:
        from tiny_bundles import attention_bundle

        options.bundle = attention_bundle()
    with serving({options.bundle.name: options.bundle}, batch=BatchOptions(rows=6, queue=4), threads=None) as served:
        minutes = 20.0 if options.minutes is None and options.requests is None else options.minutes
        seconds = None if minutes is None else 60 * minutes
        faults = soak(served, seconds=seconds, requests=options.requests, clients=options.clients)
    for fault in faults[:20]:
        print(f"wrong: {fault}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
