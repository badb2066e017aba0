"""A profile's last round as a timeline: the JSON of Chrome's trace events, which ui.perfetto.dev opens.

One process with three tracks: steps, layers, kernels. Times are ONNX Runtime's own, from the first run on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from edgellm_runtime.checks.kernel_events import Kernel
from edgellm_runtime.checks.profile import Profile, TimedRun

__all__ = ["profile_trace"]

_PROCESS = 1
_STEPS, _LAYERS, _KERNELS = 1, 2, 3  # tracks


def profile_trace(found: Profile, title: str) -> dict[str, Any]:
    """The timeline as an object to be written as JSON.

    Args:
        found: from :func:`~edgellm_runtime.checks.profile.profile`.
        title: what the process is called.
    """
    zero = found.timeline[0].run.start_us if found.timeline else 0.0
    events = [_named("process_name", 0, f"edgellm profile {title}")]
    events += [_named("thread_name", t, n) for t, n in ((_STEPS, "steps"), (_LAYERS, "layers"), (_KERNELS, "kernels"))]
    events += [{**_meta("thread_sort_index", t), "args": {"sort_index": t}} for t in (_STEPS, _LAYERS, _KERNELS)]
    for timed in found.timeline:
        events += _events(timed, found, zero)
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _events(timed: TimedRun, found: Profile, zero: float) -> Iterator[dict[str, Any]]:
    run, step = timed.run, timed.step
    said: dict[str, Any] = {"tokens": step.time, "tokens before": step.past}
    yield _span(_STEPS, timed.phase, timed.phase, run.start_us - zero, run.us, said)
    for layer, group in itertools.groupby(run.kernels, lambda kernel: found.layer_of[kernel.key]):
        inside = list(group)
        start = inside[0].start_us
        yield _span(_LAYERS, layer, timed.phase, start - zero, inside[-1].end_us - start, {"kernels": len(inside)})
    for kernel in run.kernels:
        said = {"node": kernel.name, "layer": found.layer_of[kernel.key], **_shapes(kernel)}
        yield _span(_KERNELS, kernel.op, timed.phase, kernel.start_us - zero, kernel.us, said)


def _shapes(kernel: Kernel) -> dict[str, str]:
    """Sizes of what a kernel took and gave, without the weights that it holds packed."""
    texts = {"inputs": kernel.given, "outputs": kernel.made}
    return {name: " ".join("x".join(map(str, shape)) or "scalar" for shape in each) for name, each in texts.items()}


def _span(track: int, name: str, category: str, start: float, us: float, said: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X", "pid": _PROCESS, "tid": track, "name": name, "cat": category, "ts": start, "dur": us, "args": said
    }  # fmt: skip


def _named(what: str, track: int, name: str) -> dict[str, Any]:
    return {**_meta(what, track), "args": {"name": name}}


def _meta(what: str, track: int) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": track, "name": what}
