"""Where the time of a prompt and of a token goes: each kernel's part, as ONNX Runtime counts it on CPU."""

from __future__ import annotations

import collections
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_runtime.arguments import check_integer
from edgellm_runtime.checks.bench import random_prompts
from edgellm_runtime.errors import BackendError, ContextError

__all__ = ["KernelTime", "check_target", "profile"]

_ON_CPU = ("cpu", "onnx")  # targets


@dataclass(frozen=True)
class KernelTime:
    """One kind of kernel.

    Args:
        kernel: the operator's name, after ONNX Runtime's own fusions.
        count: how often it runs.
        ms: all of these together.
        share: of the time of all kernels.
    """

    kernel: str
    count: int
    ms: float
    share: float


def profile(
    path: str | Path, *, prompt_tokens: int = 128, new_tokens: int = 32, threads: int | None = None, seed: int = 0
) -> dict[str, list[KernelTime]]:
    """Run one prompt and some tokens with ONNX Runtime's profiler, after an unmeasured round.

    Counting costs a few microseconds a kernel, so small kernels look larger than they are, and all of them together
    take longer than a step does.

    Args:
        path: a bundle for target cpu or onnx.
        prompt_tokens: length of the prompt.
        new_tokens: steps after it.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
        seed: of the random prompts.

    Returns:
        ``prompt``, and ``token`` (the mean of the steps), each from the longest to the shortest.

    Raises:
        OptionError: a count below 1.
        BackendError: the bundle is for another target.
        ContextError: prompt and new tokens do not fit into the context.
    """
    from edgellm_runtime.backends.ort import OrtBackend
    from edgellm_runtime.bundle import GRAPH, Bundle
    from edgellm_runtime.loading import session_of

    check_integer("prompt_tokens", prompt_tokens, 1)
    check_integer("new_tokens", new_tokens, 1)
    check_target(path)
    bundle = Bundle(path)
    manifest = bundle.manifest
    if prompt_tokens + new_tokens > manifest.max_context:
        raise ContextError(
            f"a prompt of {prompt_tokens} and {new_tokens} new tokens do not fit into the model's context of "
            f"{manifest.max_context}; profile fewer"
        )
    with tempfile.TemporaryDirectory() as scratch:
        backend = OrtBackend(bundle.file(GRAPH), manifest.signature, threads=threads, profile=Path(scratch) / "run")
        session = session_of(bundle, backend)
        draw = random_prompts(session.vocab_size, prompt_tokens, seed)
        for _ in range(2):
            state = session.new_state(1, prompt_tokens + new_tokens)
            token = session.step(draw(), state)[:, 0].argmax(-1)[:, None]
            for _ in range(new_tokens):
                token = session.step(token % session.vocab_size, state)[:, 0].argmax(-1)[:, None]
        runs = _runs(json.loads(backend.end_profile().read_bytes()))
    measured = runs[len(runs) // 2 :]
    steps = len(measured) - new_tokens  # of the prompt, which may take several
    return {"prompt": _summary(measured[:steps], 1), "token": _summary(measured[steps:], new_tokens)}


def check_target(path: str | Path) -> None:
    """Make sure that a bundle can be profiled, before any work.

    Raises:
        BackendError: it is for a target that does not run on ONNX Runtime's CPU kernels.
    """
    from edgellm_runtime.bundle import Bundle

    target = Bundle(path, checksums=False).manifest.target["name"]
    if Bundle(path, checksums=False).manifest.encoder is not None:
        raise BackendError(f"{path}: answers sources, and profiles are of models that go on with texts; use bench")
    if target not in _ON_CPU:
        raise BackendError(
            f"{path}: was exported for target {target}, and only ONNX Runtime on CPU tells what each kernel takes; "
            "profile a bundle for target cpu, or use NVIDIA's Nsight Systems on this one"
        )


def _runs(events: Sequence[Any]) -> list[list[tuple[str, float]]]:
    """Kernels and their microseconds, for each run of the graph."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    starts = np.array([start for start, _ in spans])
    found: list[list[tuple[str, float]]] = [[] for _ in spans]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            run = int(np.searchsorted(starts, event["ts"], side="right")) - 1
            if run >= 0 and event["ts"] <= spans[run][1]:
                found[run].append((str(event["args"]["op_name"]), float(event["dur"])))
    return found


def _summary(runs: Sequence[Sequence[tuple[str, float]]], times: int) -> list[KernelTime]:
    spent: dict[str, list[float]] = collections.defaultdict(list)
    for name, microseconds in (kernel for run in runs for kernel in run):
        spent[name].append(microseconds)
    everything = sum(map(sum, spent.values())) or 1.0
    found = [
        KernelTime(name, round(len(each) / times), round(sum(each) / times / 1e3, 3), round(sum(each) / everything, 4))
        for name, each in spent.items()
    ]
    return sorted(found, key=lambda kernel: kernel.ms, reverse=True)
