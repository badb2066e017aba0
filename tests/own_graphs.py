"""Small graphs of products with quantized weights as exporters write them, for the tests of edgellm's own kernels."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_bundles import attention_model, text_assets

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_kernels import find
from edgellm_runtime.graphs.onnx_file import read_model
from edgellm_runtime.graphs.writer import Node, graph_bytes

Array = NDArray[Any]
LIBRARY = "com.microsoft"
EPSILON = 1e-5


@functools.cache
def bundle(method: str) -> Path:
    """A small decoder that answers texts, quantized so."""
    folder = Path(tempfile.mkdtemp()) / "b"
    export(attention_model(), folder, text=text_assets(), options=ExportOptions(target="cpu", quantize=method))
    return folder


def ops(graph: bytes) -> list[str]:
    """The kinds of a graph's nodes, in order."""
    return [node["op_type"].decode() for node in read_model(graph)["graph"]["node"]]


def opened(model: bytes | str, threads: int = 2, *, own: bool = True) -> Any:
    """A session, which knows the operators or does not."""
    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if own:
        find(ort).add_to(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def codes_of(packed: Array, bits: int) -> Array:
    """Bytes as the codes in them, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed[..., None] >> shifts & (1 << bits) - 1).reshape(*packed.shape[:-1], -1).astype(np.int64)


class Matrix:
    """Random codes, scales and zeros as MatMulNBits has them; scales are float16's, or need float32.

    Args:
        seed: of the numbers.
        outputs: rows.
        inputs: columns.
        block: columns that share a scale; 0: all of a row, as MatMulIntegerToFloat has them.
        zeros: whether blocks have zero points.
        half: whether scales are float16's.
        bits: of a code.
    """

    def __init__(
        self, seed: int, outputs: int, inputs: int, block: int, *, zeros: bool = False, half: bool = True, bits: int = 4
    ) -> None:
        draw, self.block, self.bits, self.shape = np.random.default_rng(seed), block, bits, (outputs, inputs)
        step = block or inputs
        blocks = -(-inputs // step)
        self.codes = draw.integers(0, 256, (outputs, blocks, step * bits // 8), dtype=np.uint8)
        if not block:
            self.codes = draw.integers(-128, 128, (inputs, outputs)).astype(np.int8)
        scales = draw.uniform(-0.02, 0.02, (outputs, blocks)).astype(np.float32)
        scales[0, 0] = 3e-7  # a float16 below the normal ones
        self.scales = scales.astype(np.float16).astype(np.float32) if half else scales
        self.zeros = draw.integers(0, 256, (outputs, -(-blocks * bits // 8)), dtype=np.uint8) if zeros else None

    def weights(self) -> tuple[Array, Array]:
        """Codes less zeros (outputs, blocks, block), whole numbers, and scales (outputs, blocks)."""
        if not self.block:
            return self.codes.T.astype(np.int64)[:, None], self.scales
        whole = codes_of(self.codes, self.bits)
        if self.zeros is None:
            return whole - (1 << self.bits - 1), self.scales
        return whole - codes_of(self.zeros, self.bits)[:, : whole.shape[1], None], self.scales

    @property
    def sizes(self) -> dict[str, int]:
        outputs, inputs = self.shape
        return {"bits": self.bits, "block_size": self.block, "N": outputs, "K": inputs}

    def tensors(self, name: str = "") -> dict[str, Array]:
        found = {f"{name}w": self.codes, f"{name}s": self.scales if self.block else self.scales[:, 0].copy()}
        return found if self.zeros is None else found | {f"{name}z": self.zeros}


@dataclass
class Chain:
    """A graph that is put together node by node.

    Args:
        nodes: until now.
        tensors: its constants.
    """

    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, Array] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """A node; the name of its first output."""
        self.nodes.append(Node(op, inputs, outputs, attributes, domain=domain, name=f"{op}_{len(self.nodes)}"))
        return outputs[0]

    def product(self, matrix: Matrix, x: str, y: str, *, sums: int = 0, cast: bool = False) -> str:
        """A product as it is exported: after sums of blocks, or between the nodes that round rows.

        With ``cast``, scales are kept in float16 and widened by a node.
        """
        tensors = matrix.tensors(y)
        self.tensors |= tensors
        if cast:
            self.tensors[f"{y}half"] = self.tensors.pop(f"{y}s").astype(np.float16)
            self.add("Cast", [f"{y}half"], f"{y}s", to=1)
        if not matrix.block:
            return self._of_rows(matrix, x, y)
        if sums:
            self.tensors[f"{y}shape"] = np.array([0, 0, matrix.shape[1] // (sums + 1), sums], np.int64)
            self.tensors[f"{y}axis"] = np.array([-1], np.int64)
            blocks = self.add("Reshape", [x, f"{y}shape"], f"{y}blocks")
            total = self.add("ReduceSum", [blocks, f"{y}axis"], f"{y}sums", keepdims=0)
            x = self.add("Concat", [x, total], f"{y}both", axis=-1)
        return self.add("MatMulNBits", [x, *tensors], y, domain=LIBRARY, **matrix.sizes, accuracy_level=4)

    def _of_rows(self, matrix: Matrix, x: str, y: str) -> str:
        self.tensors |= {
            f"{y}axis": np.array([-1], np.int64), f"{y}part": np.array(1 / 127, np.float32),
            f"{y}one": np.array(1, np.float32), f"{y}middle": np.array(128, np.uint8),
        }  # fmt: skip
        most = self.add("ReduceMax", [x, f"{y}axis"], f"{y}most", keepdims=1)
        least = self.add("ReduceMin", [x, f"{y}axis"], f"{y}least", keepdims=1)
        top = self.add("Max", [most, self.add("Neg", [least], f"{y}negated")], f"{y}top")
        scale = self.add("Mul", [top, f"{y}part"], f"{y}scale")
        shape = self.add("Shape", [scale], f"{y}shape")
        zero = self.add("ConstantOfShape", [shape], f"{y}zero", value=np.array([128], np.uint8))
        size = matrix.shape[1]
        rounded = self.add("QuantizeLinear", [x, scale, zero], f"{y}rounded", axis=-1, block_size=size)
        whole = [rounded, f"{y}w", f"{y}one", f"{y}s", f"{y}middle"]
        return self.add("Mul", [self.add("MatMulIntegerToFloat", whole, f"{y}whole", domain=LIBRARY), scale], y)

    def norm(self, x: str, skip: str, y: str, total: str, size: int, *more: str) -> str:
        """The RMS norm of a sum, which is an output of its own."""
        self.tensors[f"{y}gamma"] = np.random.default_rng(9).uniform(0.5, 1.5, size).astype(np.float32)
        inputs = [x, skip, f"{y}gamma", *more]
        op = "SkipSimplifiedLayerNormalization"
        return self.add(op, inputs, y, "", "", total, domain=LIBRARY, epsilon=EPSILON)

    def gate(self, x: str, y: str, half: int) -> str:
        """The first half of rows, through SiLU, times the second."""
        self.tensors[f"{y}sizes"] = np.array([half, half], np.int64)
        self.add("Split", [x, f"{y}sizes"], f"{y}gate", f"{y}up", axis=-1)
        sigmoid = self.add("Sigmoid", [f"{y}gate"], f"{y}sigmoid")
        silu = self.add("Mul", [f"{y}gate", sigmoid], f"{y}silu")
        return self.add("Mul", [silu, f"{y}up"], y)

    def model(self, width: int, *outputs: str) -> bytes:
        """The graph, whose inputs are those of x and skip that are read."""
        read = {name for node in self.nodes for name in node.inputs}
        inputs = {name: "float32" for name in ("x", "skip") if name in read}
        shapes = {name: ["batch", "time", width] for name in inputs}
        return graph_bytes(self.nodes, inputs, dict.fromkeys(outputs, "float32"), tensors=self.tensors, shapes=shapes)


def layer(first: Matrix, last: Matrix, *, sums: bool = False) -> Chain:
    """A norm of x + skip, an MLP with a gate, and a norm of what comes of it: outputs y, total and again."""
    width, half = first.shape[1], last.shape[1]
    if sums:
        width, half = width * 32 // 33, half * 32 // 33
    chain = Chain()
    chain.norm("x", "skip", "normed", "total", width)
    chain.product(first, "normed", "both", sums=32 * sums)
    chain.product(last, chain.gate("both", "gated", half), "y", sums=32 * sums)
    return chain
