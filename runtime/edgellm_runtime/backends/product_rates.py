"""How long products with quantized weights take on this very processor, one token at a time, weights not in its cache.

What is timed is one product of each form, in turn, several times round; between two of them as much other memory is
read as a cache may hold. So a search of formats need not believe what another machine was measured to take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.kernel_test import KernelForm
from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_kernels import OwnKernels
from edgellm_runtime.graphs.writer import Node, Shape, graph_bytes
from edgellm_runtime.threads import thread_count

__all__ = ["product_rates"]

_ROWS, _COLUMNS = 2560, 1536  # of a weight as large as those of models of half a billion weights
_ROUNDS, _LEAST, _MOST_S = 9, 3, 0.8  # the most, the fewest, and after how long none is begun beyond those
_CACHE_BYTES = 48 << 20
_DOMAIN = "com.microsoft"
Array = NDArray[Any]


def product_rates(
    forms: Sequence[KernelForm], *, threads: int | None = None, kernels: OwnKernels | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[KernelForm, float]:  # fmt: skip
    """Nanoseconds that each weight of a product takes: the quickest of a few rounds, for what disturbs one only adds.

    Args:
        forms: products with weights in blocks, of blocks that divide 1,536.
        threads: for one product; None for what :func:`edgellm_runtime.threads.thread_count` says.
        kernels: that compute what they can; None for ONNX Runtime's.
        clock: tells seconds.

    Raises:
        BackendError: the library is missing.
    """
    draw, started = np.random.default_rng(0), clock()
    sessions = {form: _session(form, draw, thread_count(threads), kernels) for form in forms}
    x, others = draw.standard_normal((1, _COLUMNS)).astype(np.float32), np.ones(_CACHE_BYTES // 8, np.int64)
    times: dict[KernelForm, list[float]] = {form: [] for form in sessions}
    for session in sessions.values():  # which makes what it needs with the first
        session.run(None, {"x": x})
    for number in range(_ROUNDS):
        if number >= _LEAST and clock() - started > _MOST_S:
            break
        for form, session in sessions.items():
            others.sum()
            before = clock()
            session.run(None, {"x": x})
            times[form].append(clock() - before)
    return {form: 1e9 * min(found) / (_ROWS * _COLUMNS) for form, found in times.items()}


def _session(form: KernelForm, draw: np.random.Generator, threads: int, kernels: OwnKernels | None) -> Any:
    """What runs one product of random codes: a row of them is repeated, for a time does not depend on their values."""
    ort, blocks = library(), _COLUMNS // form.block
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    bytes_a_block, points = form.block * form.bits // 8, -(-blocks * form.bits // 8)
    codes = draw.integers(0, 256, (1, blocks, bytes_a_block)).astype(np.uint8)
    tensors: dict[str, Array] = {
        "w": np.repeat(codes, _ROWS, axis=0),
        "s": draw.uniform(0.01, 0.02, (_ROWS, blocks)).astype(np.float32),
    }
    if form.zeros:
        tensors["z"] = draw.integers(0, 256, (_ROWS, points)).astype(np.uint8)
    sizes = {
        "N": _ROWS, "K": _COLUMNS, "bits": form.bits, "block_size": form.block, "accuracy_level": form.level,
    }  # fmt: skip
    node = Node(form.op, ["x", *tensors], ["y"], sizes, domain=_DOMAIN)
    shapes: dict[str, Shape] = {"x": ["rows", _COLUMNS], "y": ["rows", _ROWS]}
    graph = graph_bytes([node], {"x": "float32"}, {"y": "float32"}, tensors=tensors, shapes=shapes)
    if kernels is not None:
        kernels.add_to(options)
        graph = kernels.swapped(graph)[0]
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
