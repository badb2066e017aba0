"""What this machine can do at the moment: bytes a second from memory, and operations a second in float32.

Both are measured with as many threads as a model has. Caches answer for small models, and kernels of whole numbers do
more than float32's, so a kernel may be above either.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.checks.machine import free_memory
from edgellm_runtime.checks.traffic import Traffic
from edgellm_runtime.graphs.writer import Node, graph_bytes

__all__ = ["Roof", "measure_roof"]

_LEAST_BYTES, _MOST_BYTES = 64 << 20, 512 << 20  # of the array that is read
_CACHES = 4  # times the last level's size: of less, a part would come from there
_SIDE = 1024  # of the matrices that are multiplied
_ROUNDS = 6  # the first is to warm up; the best of the others counts, for others on the machine only slow it


@dataclass(frozen=True)
class Roof:
    """The most that this machine did.

    Args:
        bytes_per_s: read from memory.
        operations_per_s: of a product of float32 matrices, a multiplication and an addition being two.
        threads: that it did it with.
        array_bytes: of what was read; where that is no more than the caches hold, it was not read from memory.
    """

    bytes_per_s: float
    operations_per_s: float
    threads: int
    array_bytes: int

    def seconds(self, traffic: Traffic) -> float | None:
        """The least time that a kernel can take; None where not all is known that it must do."""
        if traffic.operations is None:
            return None
        return max(traffic.bytes / self.bytes_per_s, traffic.operations / self.operations_per_s)

    def bound(self, traffic: Traffic) -> str | None:
        """What keeps a kernel from being faster: ``memory`` or ``arithmetic``."""
        if traffic.operations is None:
            return None
        memory = traffic.bytes / self.bytes_per_s >= traffic.operations / self.operations_per_s
        return "memory" if memory else "arithmetic"


def measure_roof(threads: int, root: Path = Path("/")) -> Roof:
    """Measure this machine, which takes about a second.

    Args:
        threads: of the CPU.
        root: where ``sys`` is.
    """
    size = _array_bytes(root)
    return Roof(size / _fastest_read(size, threads), 2 * _SIDE**3 / _fastest_product(threads), threads, size)


def _array_bytes(root: Path) -> int:
    cache = max((_cache_bytes(file) for file in root.glob("sys/devices/system/cpu/cpu*/cache/index*/size")), default=0)
    most = min(_MOST_BYTES, (free_memory(root) or _MOST_BYTES) // 4)
    return max(min(max(_LEAST_BYTES, _CACHES * cache), most), 1 << 20)


def _cache_bytes(file: Path) -> int:
    try:
        text = file.read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 0


def _fastest_read(size: int, threads: int) -> float:
    """Seconds of reading so many bytes, each thread its part."""
    parts: list[NDArray[Any]] = [np.ones(max(1, size // 4 // threads), np.int32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return _best(lambda: list(pool.map(np.max, parts)))  # NumPy lets others run meanwhile


def _fastest_product(threads: int) -> float:
    """Seconds of a product of two square matrices, with the library and the number of threads that models run on."""
    from edgellm_runtime.backends.ort import library

    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    shapes = dict.fromkeys("xyz", (_SIDE, _SIDE))
    graph = graph_bytes(
        [Node("MatMul", ["x", "y"], ["z"])], {"x": "float32", "y": "float32"}, {"z": "float32"}, shapes=shapes
    )
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feeds = {name: np.full((_SIDE, _SIDE), 0.5, np.float32) for name in "xy"}
    return _best(lambda: session.run(None, feeds))


def _best(action: Any) -> float:
    taken = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])
