"""What a server tells of itself: a line for each request, and figures for Prometheus. No contents unless asked for."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from edgellm_runtime.json_text import json_text
from edgellm_runtime.server.call import Call
from edgellm_runtime.server.host import Host

__all__ = ["Histogram", "Journal"]

_LOG = logging.getLogger("edgellm.requests")
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


class Histogram:
    """Counts of seconds, by upper bounds."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(_BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """As Prometheus reads it."""
        total = 0
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self._sum:.6f}"
        yield f"{name}_count{{{labels}}} {total}"


class Journal:
    """Keeps count of requests.

    Args:
        host: the models.
        contents: whether lines have what was asked and answered.
    """

    def __init__(self, host: Host, *, contents: bool = False) -> None:
        self._host, self._contents = host, contents
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._seconds: dict[tuple[str, str], Histogram] = {}
        self._first: dict[tuple[str, str], Histogram] = {}

    def end(self, call: Call) -> None:
        """Count a request, and write its line."""
        seconds, key = time.perf_counter() - call.began, (call.route, call.model)
        self._requests[(*key, call.status)] += 1
        self._seconds.setdefault(key, Histogram()).add(seconds)
        if call.first_s is not None:
            self._first.setdefault(key, Histogram()).add(call.first_s)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "id": call.id, "route": call.route,
            "model": call.model, "status": call.status, "ms": round(1e3 * seconds, 1),
            "first_ms": None if call.first_s is None else round(1e3 * call.first_s, 1),
            "prompt_tokens": sum(a.prompt_tokens for a in call.asked),
            "tokens": sum(a.answer_tokens for a in call.asked),
            "reasons": [g.finish_reason for a in call.asked for g in a.found], "error": call.error,
        }  # fmt: skip
        if self._contents:
            line |= {"body": call.fields.all(), "answers": [g.text for a in call.asked for g in a.found]}
        _LOG.info("%s", json_text(line))

    def metrics(self) -> str:
        """Everything, in Prometheus' text format."""
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield from _head("edgellm_requests_total", "counter", "Requests answered, by route, model and status.")
        for (route, model, status), count in sorted(self._requests.items()):
            yield f"edgellm_requests_total{{{_labels(route=route, model=model, status=str(status))}}} {count}"
        for name, about, histograms in (
            ("edgellm_request_seconds", "From a request's first byte to its answer's last.", self._seconds),
            ("edgellm_first_token_seconds", "From a request's first byte to its first token.", self._first),
        ):
            yield from _head(name, "histogram", about)
            for (route, model), histogram in sorted(histograms.items()):
                yield from histogram.lines(name, _labels(route=route, model=model))
        yield from self._loads()

    def _loads(self) -> Iterator[str]:
        loads = {hosted.name: hosted.scheduler.load for hosted in self._host if hosted.model.adapter is None}
        for name, about, values in (
            ("edgellm_running", "Answers that run.", {m: load.running for m, load in loads.items()}),
            ("edgellm_waiting", "Requests without a place.", {m: load.waiting for m, load in loads.items()}),
            ("edgellm_state_bytes", "Bytes of states.", {m: load.state_bytes for m, load in loads.items()}),
        ):
            yield from _head(name, "gauge", about)
            for model, value in values.items():
                yield f"{name}{{{_labels(model=model)}}} {value}"
        for name, about in (
            ("prompt_tokens", "Tokens of prompts that were read."),
            ("cached_tokens", "Tokens of prompts that had been read before."), ("tokens", "Tokens that were made."),
            ("steps", "Steps that made them."), ("refused", "Requests refused by a full queue."),
            ("failed", "Requests that ended with an error."),
        ):  # fmt: skip
            yield from _head(f"edgellm_{name}_total", "counter", about)
            for model, load in loads.items():
                yield f"edgellm_{name}_total{{{_labels(model=model)}}} {load.counts.get(name, 0)}"


def _head(name: str, kind: str, about: str) -> Iterable[str]:
    return (f"# HELP {name} {about}", f"# TYPE {name} {kind}")


def _labels(**labels: str) -> str:
    escaped = {k: v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for k, v in labels.items()}
    return ",".join(f'{name}="{value}"' for name, value in escaped.items())
