"""The product of edgellm-kernels against ONNX Runtime's MatMulNBits, each in a session, in turn, on cold weights.

    python scripts/kernels_gate.py --shape 576x3072 --shape 1024x6144

Each session holds so many matrices of a shape that none is in a cache when its turn comes. A round runs both, so that
what else the machine does falls on both; the ratio is taken of the fastest rounds and of the medians.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_runtime.backends.ort import library
from edgellm_runtime.graphs.writer import Node, graph_bytes

SHAPES = ("576x3072", "1536x576", "1024x6144")


def session(domain: str, op: str, shape: tuple[int, int], block: int, count: int, threads: int, lib: str) -> Any:
    """Products of one input with ``count`` matrices of random codes."""
    ort = library()
    inputs, outputs = shape
    blocks = -(-inputs // block)
    draw = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    nodes = []
    for i in range(count):
        tensors[f"w{i}"] = draw.integers(0, 256, (outputs, blocks, block // 2), dtype=np.uint8)
        tensors[f"s{i}"] = draw.uniform(0.01, 0.02, (outputs, blocks)).astype(np.float16).astype(np.float32)
        tensors[f"z{i}"] = draw.integers(0, 256, (outputs, (blocks + 1) // 2), dtype=np.uint8)
        sizes = {"bits": 4, "block_size": block, "N": outputs, "K": inputs, "accuracy_level": 4}
        nodes.append(Node(op, ["x", f"w{i}", f"s{i}", f"z{i}"], [f"y{i}"], sizes, domain=domain))
    graph = graph_bytes(
        nodes, {"x": "float32"}, {f"y{i}": "float32" for i in range(count)}, tensors=tensors,
        shapes={"x": ["rows", inputs]},
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.enable_mem_pattern = False
    options.register_custom_ops_library(lib)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def measure(shape: tuple[int, int], arguments: argparse.Namespace) -> None:
    """One shape: a line for each number of rows."""
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    weights = shape[0] * shape[1]
    count = int(arguments.megabytes * 2e6 / weights) + 1
    ways = {
        "MatMulNBits": session(
            "com.microsoft", "MatMulNBits", shape, arguments.block, count, arguments.threads, arguments.library
        ),
        "ours": session("edgellm", "MatMul4Bits", shape, arguments.block, count, arguments.threads, arguments.library),
    }
    for rows in arguments.rows:
        x = np.random.default_rng(1).standard_normal((rows, shape[0])).astype(np.float32)
        times: dict[str, list[float]] = {name: [] for name in ways}
        last = {}
        for turn in range(arguments.rounds + 2):
            for name in ways if turn % 2 else reversed(ways):
                start = clock()
                got = ways[name].run(None, {"x": x})
                if turn >= 2:
                    times[name].append((clock() - start) / count)
                last[name] = got[0]
        off = np.linalg.norm(last["ours"] - last["MatMulNBits"]) / np.linalg.norm(last["MatMulNBits"])
        rates = {name: (weights / np.median(t) / 1e9, weights / min(t) / 1e9) for name, t in times.items()}
        theirs, ours = rates["MatMulNBits"], rates["ours"]
        print(
            f"{shape[0]} x {shape[1]}, blocks of {arguments.block}, {rows} rows, {count} matrices: MatMulNBits "
            f"{theirs[0]:.1f} (best {theirs[1]:.1f}), ours {ours[0]:.1f} ({ours[1]:.1f}) billion weights/s; "
            f"{ours[0] / theirs[0]:.2f}x of medians, {ours[1] / theirs[1]:.2f}x of the best; apart {off:.1e}",
            flush=True,
        )


def main() -> None:
    """Every shape that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="inputs x outputs; may come again")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=160, help="of codes in each session")
    parser.add_argument("--library", default=None)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the calling thread: for one thread on a busy machine"
    )
    arguments = parser.parse_args()
    if arguments.library is None:
        import edgellm_kernels

        arguments.library = str(edgellm_kernels.library())
    arguments.library = str(Path(arguments.library).resolve())
    for shape in arguments.shape or SHAPES:
        inputs, outputs = (int(size) for size in shape.split("x"))
        measure((inputs, outputs), arguments)


if __name__ == "__main__":
    main()
