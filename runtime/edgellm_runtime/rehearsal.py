"""What :mod:`edgellm_runtime.isolation` starts: load a bundle under limits, use each part of it once, and report.

It writes one line of JSON: ``{"kind": "loaded"}``, ``{"kind": "memory"}``, or a fault's kind and sentence.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from typing import Any

from edgellm_runtime.errors import BackendError, OptionError, RuntimeFault

__all__ = ["main"]


def main(*, bundle: str, device: str, checksums: bool, limits: dict[str, int], kernels: str | None) -> None:
    """Load and report; arguments as :func:`edgellm_runtime.isolation.rehearse`."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)  # it has nothing to write
    _limit(resource.RLIMIT_AS, limits["memory"])
    _limit(resource.RLIMIT_CPU, limits["seconds"])
    sys.stdout.write(json.dumps(_report(bundle, device, checksums, kernels), allow_nan=False) + "\n")
    sys.stdout.flush()


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard), min(most, hard)))


def _report(bundle: str, device: str, checksums: bool, kernels: str | None) -> dict[str, str]:
    from edgellm_runtime.backends.faults import is_out_of_memory

    try:
        _use(bundle, device, checksums, kernels)
    except (MemoryError, RuntimeFault) as error:
        if is_out_of_memory(error) or (error.__cause__ is not None and is_out_of_memory(error.__cause__)):
            return {"kind": "memory"}
        return {"kind": type(error).__name__, "said": str(error)}
    return {"kind": "loaded"}


def _use(path: str, device: str, checksums: bool, kernels: str | None) -> None:
    """Everything of a bundle that a program uses, once."""
    import numpy as np

    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.loading import device_of, load

    if (found := device_of(Bundle(path, checksums=False), device)) != "cpu":
        raise BackendError(f"{path}: runs on {found}, and isolate=True is for the CPU; run the program in a container")
    model: Any = load(path, device=device, threads=1, checksums=checksums, kernels=kernels)
    if model.tokenizer is not None:
        model.tokenizer.decode(model.tokenizer.encode("Hello, world! 1 2 3"))
        model.tokenizer.decode(range(min(64, model.session.vocab_size)))
    if model.has_chat_template:
        with suppress(OptionError):  # a template may want other messages
            model.chat_template.encode([{"role": "user", "content": "Hello"}])
    sources = None if model.session.encoder is None else [[0, 1 % model.session.vocab_size]]
    state = model.session.new_state(1, 3, sources=sources)
    for tokens in ([[0, 1]],) if model.session.one_pass else ([[0, 1]], [[0]]):
        if state.lengths[0] + len(tokens[0]) <= model.session.max_context:
            model.session.step(np.array(tokens) % model.session.vocab_size, state)
