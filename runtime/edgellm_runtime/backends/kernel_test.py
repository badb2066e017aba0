"""Whether the kernels that a graph of quantized weights uses compute what they should, on this very processor.

A library has a kernel for each kind of processor, and what is right on the machine of whoever exported a bundle has
been wrong on another's: asymmetric 4-bit products of ONNX Runtime are reported half off on processors with AVX2 alone
(onnxruntime issue 29853), and others change tokens without a word. So a product of each form that a bundle has is
compared with NumPy's before the bundle runs, once for a machine and a version of the library.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.caches import CacheFile
from edgellm_runtime.backends.ort import library
from edgellm_runtime.errors import BackendError
from edgellm_runtime.freed_pages import trim
from edgellm_runtime.graphs.onnx_file import nodes_of, read_model
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import Node, graph_bytes

__all__ = [
    "ALL_ROWS", "BOUND", "FEW_ROWS", "KernelForm", "check_kernels", "forms_in", "kernel_error", "packed_codes",
    "processor",
]  # fmt: skip

Array = NDArray[Any]
BOUND = 0.03  # of a product's length; rounding inputs to 8 bits costs 0.006, a wrong kernel far more
FEW_ROWS, ALL_ROWS = (1, 4), (1, 2, 3, 4, 8, 16, 17, 65)  # kernels for few rows of the input differ from those for many
_DOMAIN = "com.microsoft"
_OUTPUTS = 33  # of a product: no multiple of any kernel's width
_KINDS = ("GatherBlockQuantized", "MatMulIntegerToFloat", "MatMulNBits")
_LARGEST_BLOCK = 4096


@dataclass(frozen=True, order=True)
class KernelForm:
    """One kind of product with quantized weights.

    Args:
        op: the operator.
        bits: of a weight.
        block: weights that share a scale; 0: a row's.
        level: its ``accuracy_level``; 4 rounds inputs to 8 bits.
        zeros: whether blocks have zero points.
    """

    op: str
    bits: int = 8
    block: int = 0
    level: int = 0
    zeros: bool = False

    def __str__(self) -> str:
        if self.op == "MatMulIntegerToFloat":
            return self.op
        points = "asymmetric" if self.zeros else "symmetric"
        return f"{self.op} of {self.bits} bits in {points} blocks of {self.block}"


def forms_in(model: Message) -> frozenset[KernelForm]:
    """The forms that a graph uses, of those that can be tried.

    Args:
        model: from :func:`~edgellm_runtime.graphs.onnx_file.read_model`.
    """
    return frozenset(form for node in nodes_of(model) if (form := _form(node)) is not None)


def _form(node: Message) -> KernelForm | None:
    op = node.get("op_type", b"").decode("latin1")
    if op not in _KINDS:
        return None
    if op == "MatMulIntegerToFloat":
        return KernelForm(op)
    given = {a.get("name", b""): a.get("i", 0) for a in node.get("attribute", ())}
    inputs: Sequence[bytes] = node.get("input", ())
    form = KernelForm(
        op, given.get(b"bits", 4), given.get(b"block_size", 128), given.get(b"accuracy_level", 0),
        zeros=len(inputs) > 3 and bool(inputs[3]),
    )  # fmt: skip
    return form if form.bits in (2, 4, 8) and form.block <= _LARGEST_BLOCK else None


def kernel_error(form: KernelForm, rows: Iterable[int] = ALL_ROWS) -> float:
    """How far a product is from NumPy's, as a part of its length, at the worst number of rows.

    Args:
        form: the kind of product.
        rows: numbers of input rows to try.

    Raises:
        BackendError: the library is missing.
    """
    ort = library()
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    draw = np.random.default_rng(7)
    graph, weight = _trial(form, draw)
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return max(_off(session, form, weight, count, draw) for count in rows)


def _off(session: Any, form: KernelForm, weight: Array, rows: int, draw: np.random.Generator) -> float:
    if form.op == "GatherBlockQuantized":
        x = draw.integers(0, len(weight), (1, rows))
        expected = weight[x]
    elif form.op == "MatMulIntegerToFloat":
        x = draw.integers(0, 256, (rows, weight.shape[1])).astype(np.uint8)
        expected = (x.astype(np.float64) - 128) @ weight.T
    else:
        x = draw.standard_normal((rows, weight.shape[1])).astype(np.float32)
        expected = x.astype(np.float64) @ weight.T
    (y,) = session.run(None, {"x": x})
    error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else np.inf


def _trial(form: KernelForm, draw: np.random.Generator) -> tuple[bytes, Array]:
    """A graph of one product, and the weight (outputs, inputs) that its codes stand for, in float64."""
    if form.op == "MatMulIntegerToFloat":
        codes = draw.integers(-128, 128, (96, _OUTPUTS)).astype(np.int8)
        scales = draw.uniform(0.01, 0.02, _OUTPUTS).astype(np.float32)
        tensors: dict[str, Array] = {
            "w": codes,
            "one": np.array(1, np.float32),
            "s": scales,
            "middle": np.array(128, np.uint8),
        }
        tensors["none"] = np.zeros(_OUTPUTS, np.int8)
        node = Node(form.op, ["x", "w", "one", "s", "middle", "none"], ["y"], domain=_DOMAIN)
        return _graph(node, "uint8", tensors), (codes * scales.astype(np.float64)).T
    blocks = 3
    columns = blocks * form.block
    codes = draw.integers(0, 1 << form.bits, (_OUTPUTS, columns)).astype(np.uint8)
    scales = draw.uniform(0.01, 0.02, (_OUTPUTS, blocks)).astype(np.float32)
    points = draw.integers(0, 1 << form.bits, (_OUTPUTS, blocks)).astype(np.uint8) if form.zeros else None
    middle = np.full((_OUTPUTS, blocks), 1 << form.bits - 1) if points is None else points
    weight = np.repeat(scales, form.block, 1).astype(np.float64) * (
        codes.astype(np.float64) - np.repeat(middle, form.block, 1)
    )
    packed = packed_codes(codes, form.bits)
    tensors = {"w": packed, "s": scales}
    if points is not None:
        tensors["z"] = packed_codes(points, form.bits)
    sizes = {"bits": form.bits, "block_size": form.block}
    more = ["z"] if form.zeros else []
    if form.op == "GatherBlockQuantized":
        node = Node(
            form.op, ["w", "x", "s", *more], ["y"], {**sizes, "gather_axis": 0, "quantize_axis": 1}, domain=_DOMAIN
        )
        return _graph(node, "int64", tensors), weight
    tensors["w"] = packed.reshape(_OUTPUTS, blocks, -1)
    sizes |= {"N": _OUTPUTS, "K": columns, "accuracy_level": form.level}
    return _graph(Node(form.op, ["x", "w", "s", *more], ["y"], sizes, domain=_DOMAIN), "float32", tensors), weight


def _graph(node: Node, dtype: str, tensors: dict[str, Array]) -> bytes:
    return graph_bytes([node], {"x": dtype}, {"y": "float32"}, tensors=tensors, shapes={"x": ["rows", "width"]})


def packed_codes(codes: Array, bits: int) -> Array:
    """Rows of codes, several to a byte, the first in its lowest bits."""
    each = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    parts = padded.reshape(len(codes), -1, each) << (bits * np.arange(each, dtype=np.uint8))
    packed: Array = np.bitwise_or.reduce(parts, axis=2).astype(np.uint8)
    return packed


def check_kernels(graph: Path, digest: str) -> None:
    """Make sure that each quantized product of a graph is right here.

    What was found right is remembered in this user's caches, for the graph, the processor and the library's version.

    Args:
        graph: a ``model.onnx`` that was checked.
        digest: its sha256.

    Raises:
        BackendError: a product is wrong on this processor.
    """
    cache = CacheFile("kernel-test", digest, library().__version__, processor())
    if cache.read() is not None:
        return
    for form in sorted(forms_in(read_model(graph.read_bytes()))):
        if (error := _known_error(form)) > BOUND:
            raise BackendError(
                f"ONNX Runtime {library().__version__} computes {form} wrong on this processor, by {error:.0%}; "
                f"install another version of it, or export the model again with {_remedy(form)}"
            )
    cache.write(b"right")
    trim()  # what the trials took, before weights come


@functools.cache
def _known_error(form: KernelForm) -> float:
    return kernel_error(form, FEW_ROWS)


def _remedy(form: KernelForm) -> str:
    return "--quantize none" if form.bits == 8 and not form.zeros else "--quantize int8"


@functools.cache
def processor() -> str:
    """What this machine's processor is and can do, as one text."""
    return "; ".join(_lines()) or f"{platform.machine()} {platform.processor()}"


def _lines() -> Iterator[str]:
    """The lines of the first core that say it, on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.partition("\n\n")[0].splitlines():
        if line.split("\t")[0].strip().lower() in ("model name", "flags", "features", "cpu part", "stepping"):
            yield " ".join(line.split())
