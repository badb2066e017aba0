"""The product of edgellm-kernels against ONNX Runtime's MatMulNBits, on cold weights.

    python scripts/kernels_gate.py --shape 576x3072 --shape 1024x6144 --rows 1 4
    python scripts/kernels_gate.py --bits 8 --block 32 --shape 576x49152

Each session holds so many matrices of a shape that none is in a cache when its turn comes, and inputs and outputs are
bound once, as edgellm's runtime has them. Each library has processes of its own, which take turns, so that what else
the machine does falls on both; within one process the two sessions hinder each other. The ratio is taken of the medians
and of the fastest rounds. On a busy machine the threads of a product wait for each other longer than they compute:
``--realtime`` keeps other programs off the processors meanwhile, a second at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_runtime.backends.ort import library
from edgellm_runtime.graphs.writer import Node, graph_bytes

SHAPES = ("576x960", "576x576", "576x3072", "1536x576", "1024x6144")
WAYS = {"MatMulNBits": "com.microsoft", "BlockProduct": "edgellm"}


def session(op: str, shape: tuple[int, int], count: int, arguments: argparse.Namespace) -> Any:
    """Products of one input with ``count`` matrices of random codes."""
    ort = library()
    (inputs, outputs), block, bits = shape, arguments.block, arguments.bits
    blocks = -(-inputs // block)
    draw = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    nodes = []
    for i in range(count):
        tensors[f"w{i}"] = draw.integers(0, 256, (outputs, blocks, block * bits // 8), dtype=np.uint8)
        tensors[f"s{i}"] = draw.uniform(0.01, 0.02, (outputs, blocks)).astype(np.float16).astype(np.float32)
        tensors[f"z{i}"] = draw.integers(0, 256, (outputs, -(-blocks * bits // 8)), dtype=np.uint8)
        sizes = {"bits": bits, "block_size": block, "N": outputs, "K": inputs}
        sizes |= {"sums": 0, "zeros": 1} if WAYS[op] == "edgellm" else {"accuracy_level": 4}
        nodes.append(Node(op, ["x", f"w{i}", f"s{i}", f"z{i}"], [f"y{i}"], sizes, domain=WAYS[op]))
    shapes = {"x": ["rows", inputs], **{f"y{i}": ["rows", outputs] for i in range(count)}}
    names = {f"y{i}": "float32" for i in range(count)}
    graph = graph_bytes(nodes, {"x": "float32"}, names, tensors=tensors, shapes=shapes)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = arguments.threads, 1
    options.log_severity_level, options.enable_mem_pattern = 3, False
    options.register_custom_ops_library(arguments.library)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def bound(made: Any, shape: tuple[int, int], rows: int, count: int) -> tuple[Any, list[Any]]:
    """A session's arrays for so many rows, and those of its outputs."""
    x = np.random.default_rng(1).standard_normal((rows, shape[0])).astype(np.float32)
    value = library().OrtValue.ortvalue_from_numpy
    outputs = [np.zeros((rows, shape[1]), np.float32) for _ in range(count)]
    binding = made.io_binding()
    kept = [value(x), *map(value, outputs)]
    binding.bind_ortvalue_input("x", kept[0])
    for i, output in enumerate(kept[1:]):
        binding.bind_ortvalue_output(f"y{i}", output)
    return binding, [x, kept, outputs]


@contextlib.contextmanager
def alone(on: bool) -> Iterator[None]:
    """Let no ordinary program run while this one's threads want to."""

    def schedule(policy: int, priority: int) -> None:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    if on:
        schedule(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        if on:
            schedule(os.SCHED_OTHER, 0)


def times_of(op: str, shape: tuple[int, int], arguments: argparse.Namespace) -> list[tuple[list[float], Any]]:
    """For each number of rows, seconds a product of each round, and what the first product gives."""
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    count = int(arguments.megabytes * 8e6 / arguments.bits / (shape[0] * shape[1])) + 1
    made, found = session(op, shape, count, arguments), []
    for rows in arguments.rows:
        binding, kept = bound(made, shape, rows, count)
        times = []
        with alone(arguments.realtime):
            made.run_with_iobinding(binding)  # wakes its threads
            for _ in range(arguments.rounds):
                start = clock()
                made.run_with_iobinding(binding)
                times.append((clock() - start) / count)
        found.append((times, kept[2][0].copy()))
    return found


def measure(shape: tuple[int, int], arguments: argparse.Namespace) -> None:
    """One shape: a line for each number of rows."""
    runs: dict[str, list[list[tuple[list[float], Any]]]] = {op: [] for op in WAYS}
    for _ in range(arguments.processes):
        for op in WAYS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                runs[op].append(process.submit(times_of, op, shape, arguments).result())
    for i, rows in enumerate(arguments.rows):
        theirs, ours = (runs[op][0][i][1] for op in WAYS)
        off = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        times = [[each for run in runs[op] for each in run[i][0]] for op in WAYS]
        rates = [(shape[0] * shape[1] / np.median(t) / 1e9, shape[0] * shape[1] / min(t) / 1e9) for t in times]
        (their_median, their_best), (our_median, our_best) = rates
        print(
            f"{shape[0]} x {shape[1]}, {arguments.bits} bits in blocks of {arguments.block}, {rows} rows: "
            f"MatMulNBits {their_median:.1f} (best {their_best:.1f}), ours {our_median:.1f} ({our_best:.1f}) billion "
            f"weights/s; {our_median / their_median:.2f}x of medians, {our_best / their_best:.2f}x of the best; "
            f"apart {off:.1e}",
            flush=True,
        )


def main() -> None:
    """Every shape that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="inputs x outputs; may come again")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8))
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40, help="of a process")
    parser.add_argument("--processes", type=int, default=3, help="of each library, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=160, help="of codes in each session")
    parser.add_argument("--library", default=None, help="instead of the installed one")
    parser.add_argument("--cpu-time", action="store_true", help="of the calling thread; for one thread")
    parser.add_argument("--realtime", action="store_true", help="needs root on Linux")
    arguments = parser.parse_args()
    if arguments.library is None:
        import edgellm_kernels

        arguments.library = edgellm_kernels.library()
    arguments.library = str(Path(arguments.library).resolve())
    for shape in arguments.shape or SHAPES:
        inputs, outputs = (int(size) for size in shape.split("x"))
        measure((inputs, outputs), arguments)


if __name__ == "__main__":
    main()
