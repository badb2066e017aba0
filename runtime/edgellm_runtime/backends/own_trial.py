"""Whether edgellm's own kernels compute what they should, on this very processor: each operator against NumPy.

What is tried is what a bundle's graph has of them: the bits and blocks of its products, and what is done before and
between these. A trial is a node with few random weights, computed by NumPy in float64 from the very numbers that its
codes stand for, with inputs rounded as ``kernels/src/product.h`` says. Where another order of sums comes before that
rounding, a code may be another, which is all that a result may be off by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.caches import CacheFile
from edgellm_runtime.backends.kernel_test import packed_codes, processor
from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_attention_trial import AttentionForm, attention_error, attention_form
from edgellm_runtime.backends.own_gather_trial import GatherForm, gather_error, gather_form
from edgellm_runtime.backends.own_kernels import OwnKernels, Unusable, find, tell
from edgellm_runtime.graphs.onnx_file import ReadGraph
from edgellm_runtime.graphs.own_attention import ATTENTIONS, DOMAIN
from edgellm_runtime.graphs.own_gather import GATHER
from edgellm_runtime.graphs.own_operators import UNIT
from edgellm_runtime.graphs.writer import Node, Shape, graph_bytes
from edgellm_runtime.kernel_choice import chosen_kernels

__all__ = ["OWN_BOUND", "OwnForm", "ProductForm", "form_of", "own_error", "usable_kernels"]

Array = NDArray[Any]
FEW_ROWS = (1, 4, 17)
OWN_BOUND = 0.01  # of a result's length; without the rounding of inputs it would be 0.006 a product
_EPSILON = 1e-5
_OUTPUTS, _BLOCKS = 33, 3  # no multiple of any kernel's width; of those that feed a gate, a multiple of 64
_LONG_ROW = 144


@dataclass(frozen=True, order=True)
class ProductForm:
    """One kind of product.

    Args:
        bits: of a weight.
        block: weights that share a scale; 0: a row's.
        zeros: whether blocks have zero points.
        sums: how many inputs share a sum that is read beside them; 0: no sums.
    """

    bits: int
    block: int
    zeros: bool = False
    sums: int = 0

    def __str__(self) -> str:
        blocks = f"blocks of {self.block}" if self.block else "rows"
        return f"{self.bits} bits in {'asymmetric' if self.zeros else 'symmetric'} {blocks}"


@dataclass(frozen=True, order=True)
class OwnForm:
    """One kind of node.

    Args:
        op: the operator.
        products: one, or two with a gate between them.
    """

    op: str
    products: tuple[ProductForm, ...]

    def __str__(self) -> str:
        return f"{self.op} of {' and '.join(map(str, self.products))}"


AnyForm: TypeAlias = OwnForm | AttentionForm | GatherForm


def form_of(node: Node) -> AnyForm:
    """The kind of a node of one of edgellm's own operators."""
    if node.op == GATHER:
        return gather_form(node)
    if node.op in ATTENTIONS:
        return attention_form(node)
    suffixes = ("", "_down") if "N_down" in node.attributes else ("",)
    return OwnForm(node.op, tuple(_product_form(node, suffix) for suffix in suffixes))


def _product_form(node: Node, suffix: str) -> ProductForm:
    def size(name: str) -> int:
        value = node.attributes[f"{name}{suffix}"]
        assert isinstance(value, int)
        return value

    return ProductForm(size("bits"), size("block_size"), zeros=bool(size("zeros")), sums=size("sums"))


class _Trial:
    """Random weights of a product.

    Args:
        form: its kind.
        outputs: of it.
        width: inputs, without sums; rounded up to what the form can have.
        draw: where numbers come from.
    """

    def __init__(self, form: ProductForm, outputs: int, width: int, draw: np.random.Generator) -> None:
        step = form.sums or (1 if form.block else 16)
        self.form, self.width = form, -(-width // step) * step
        columns = self.width + (self.width // form.sums if form.sums else 0)
        block = form.block or columns
        blocks = -(-columns // block)
        codes = draw.integers(0, 1 << form.bits, (outputs, blocks * block)).astype(np.uint8)
        scales = draw.uniform(0.01, 0.02, (outputs, blocks)).astype(np.float16).astype(np.float32)
        middle = np.full((outputs, blocks), 1 << form.bits - 1, np.uint8)
        points = draw.integers(0, 1 << form.bits, (outputs, blocks)).astype(np.uint8) if form.zeros else middle
        whole = codes.astype(np.int64) - np.repeat(points, block, 1)
        self.weight = (whole * np.repeat(scales, block, 1).astype(np.float64))[:, :columns]
        packed = packed_codes(codes, form.bits).reshape(outputs, blocks, -1)
        self.tensors = {"codes": packed, "scales": scales.astype(np.float16)}  # as bundles have them
        if not form.block:
            self.tensors = {"codes": np.ascontiguousarray(whole.T).astype(np.int8), "scales": scales[:, 0].copy()}
        if form.zeros:
            self.tensors["zeros"] = packed_codes(points, form.bits)
        self.sizes = {
            "N": outputs, "K": columns, "bits": form.bits, "block_size": form.block, "sums": form.sums,
            "zeros": int(form.zeros),
        }  # fmt: skip

    def of(self, x: Array) -> Array:
        """The product of rows, rounded to 8 bits in float32, in float64."""
        x = x.astype(np.float32)
        if self.form.sums:
            x = np.concatenate([x, x.reshape(len(x), -1, self.form.sums).sum(-1)], -1)
        columns = x.shape[1]
        block = self.form.block or columns
        parts = np.pad(x, ((0, 0), (0, -columns % block))).reshape(len(x), -1, block)
        top = np.abs(parts).max(-1, keepdims=True)
        parts = np.rint(parts * (np.float32(127) / top)).astype(np.float64) * (top / np.float32(127))
        product: Array = parts.reshape(len(x), -1)[:, :columns] @ self.weight.T
        return product


def own_error(form: AnyForm, rows: Iterable[int] = FEW_ROWS) -> float:
    """How far an operator is from NumPy, as a part of its result's length, at the worst number of rows.

    Args:
        form: the kind of node.
        rows: numbers of input rows to try.

    Raises:
        BackendError: the library is missing.
        Unusable: the kernels cannot run here.
    """
    if isinstance(form, AttentionForm):
        return attention_error(form)
    if isinstance(form, GatherForm):
        return gather_error(form)
    ort, draw = library(), np.random.default_rng(7)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    find(ort).add_to(options)
    trials = list(_trials(form, draw))
    gamma = draw.uniform(0.5, 1.5, trials[0].width).astype(np.float32) if "Norm" in form.op else None
    graph = _graph(form, trials, gamma)
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return max(_off(session, trials, gamma, count, draw) for count in rows)


def _trials(form: OwnForm, draw: np.random.Generator) -> Iterator[_Trial]:
    first, *after = form.products
    width = _BLOCKS * first.block if first.block else _LONG_ROW
    if not after:
        yield _Trial(first, _OUTPUTS, width, draw)
        return
    (second,) = after
    middle = _Trial(second, _OUTPUTS, math.lcm(2 * UNIT, second.sums or 1), draw)
    yield _Trial(first, 2 * middle.width, width, draw)
    yield middle


def _graph(form: OwnForm, trials: Sequence[_Trial], gamma: Array | None) -> bytes:
    inputs, outputs, tensors, sizes = ["x"], ["y"], dict[str, Array](), dict[str, Any]()
    if gamma is not None:
        inputs += ["skip", "gamma"]
        outputs.append("sum")
        tensors["gamma"] = gamma
        sizes["epsilon"] = _EPSILON
    for trial, suffix in zip(trials, ("", "_down"), strict=False):
        inputs += [f"{name}{suffix}" if name in trial.tensors else "" for name in ("codes", "scales", "zeros")]
        tensors |= {f"{name}{suffix}": value for name, value in trial.tensors.items()}
        sizes |= {f"{name}{suffix}": value for name, value in trial.sizes.items()}
    while not inputs[-1]:
        inputs.pop()
    rows: dict[str, Shape] = {name: ["rows", trials[0].width] for name in inputs[: 1 if gamma is None else 2]}
    node = Node(form.op, inputs, outputs, sizes, domain=DOMAIN)
    floats = dict.fromkeys(rows, "float32")
    return graph_bytes([node], floats, dict.fromkeys(outputs, "float32"), tensors=tensors, shapes=rows)


def _off(session: Any, trials: Sequence[_Trial], gamma: Array | None, rows: int, draw: np.random.Generator) -> float:
    x = draw.standard_normal((rows, trials[0].width)).astype(np.float32)
    given, expected = {"x": x}, [x.astype(np.float64)]
    if gamma is not None:
        given["skip"] = draw.standard_normal(x.shape).astype(np.float32)
        total = expected[0] + given["skip"]
        expected = [total / np.sqrt((total**2).mean(-1, keepdims=True) + _EPSILON) * gamma, total]
    expected[0] = trials[0].of(expected[0])
    if len(trials) > 1:
        gate, up = np.split(expected[0], 2, -1)
        expected[0] = trials[1].of(gate / (1 + np.exp(-gate)) * up)
    found = session.run(None, given)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
    return float(max(errors)) if np.isfinite(errors).all() else np.inf


def usable_kernels(
    graph: Path, asked: str | None = None, read: ReadGraph | None = None
) -> tuple[OwnKernels, bytes] | None:
    """Edgellm's own kernels and the graph that runs on them, if they are asked for.

    Where they cannot run or are wrong, that is told, and it is None.

    Args:
        graph: a ``model.onnx`` that was checked.
        asked: as :func:`~edgellm_runtime.kernel_choice.chosen_kernels` takes it.
        read: what is in the file, where it has been read already.

    Raises:
        OptionError: neither ``onnxruntime`` nor ``own``.
    """
    if chosen_kernels(asked) != "own":
        return None
    try:
        kernels = find(library())
        swapped, nodes = kernels.swapped(graph.read_bytes() if read is None else read)
        if not nodes:
            raise Unusable(f"{graph.parent} has no product that edgellm-kernels computes")
        forms = sorted({form_of(node) for node in nodes}, key=repr)
        cache = CacheFile("kernel-test", kernels.digest, library().__version__, processor(), *map(repr, forms))
        if cache.read() is None:
            for form in forms:
                if (error := _known_error(form)) > OWN_BOUND:
                    raise Unusable(f"edgellm-kernels computes {form} wrong on this processor, by {error:.0%}")
            cache.write(b"right")
    except Unusable as reason:
        tell(str(reason))
        return None
    return kernels, swapped


@functools.cache
def _known_error(form: AnyForm) -> float:
    return own_error(form)
