"""Forms that TensorRT would not compute as they are written, or not build at all: one table, one pass over a graph.

The silent ones are the reason for it: the parser takes such a graph, and the engine computes something else. Each row
is held against the installed library by a test, so that a row that is no longer true is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.defs
import onnx_ir as ir

from edgellm_exporters.errors import LoweringError

__all__ = ["TRAPS", "Surroundings", "Trap", "lint"]

_RECURRENT = ("LSTM", "GRU", "RNN")
_LOOPS = (*_RECURRENT, "Loop", "Scan")
_QUANTIZING = ("DequantizeLinear", "QuantizeLinear")
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Surroundings:
    """What a row may ask for besides a node.

    Args:
        graph: the whole one.
        kinds: of all nodes, those in bodies of loops too.
        dtype: of activations.
    """

    graph: ir.Graph
    kinds: frozenset[str]
    dtype: ir.DataType


@dataclass(frozen=True)
class Trap:
    """One form to refuse.

    Args:
        name: of the row.
        ops: the operators that it looks at; empty for all.
        found: whether a node has the form.
        what: TensorRT does with it.
        instead: the form to use.
    """

    name: str
    ops: tuple[str, ...]
    found: Callable[[ir.Node, Surroundings], bool]
    what: str
    instead: str


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _input(node: ir.Node, name: str) -> ir.Value | None:
    """An input by its name in ONNX's own schema."""
    index = _names(node.op_type).index(name)
    return node.inputs[index] if index < len(node.inputs) else None


@functools.cache
def _names(op: str) -> list[str]:
    return [parameter.name for parameter in onnx.defs.get_schema(op).inputs]


def _of_codes(node: ir.Node, what: str) -> ir.Value | None:
    """The scale or the zero_point of a quantizing node."""
    return _input(node, f"{'x' if node.op_type == 'DequantizeLinear' else 'y'}_{what}")


def _codes_dtype(node: ir.Node) -> ir.DataType | None:
    """The type of the codes that a quantizing node reads or makes."""
    if node.op_type == "DequantizeLinear":
        value = _input(node, "x")
        if value is not None and value.dtype is not None:
            return value.dtype
    zero = _of_codes(node, "zero_point")
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    return ir.DataType(int(_number(node, "output_dtype", 0))) or ir.DataType.UINT8  # what ONNX takes without a zero


def _nonzero(node: ir.Node, view: Surroundings) -> bool:
    zero = _of_codes(node, "zero_point")
    if zero is None:
        return False
    return zero.const_value is None or bool(np.any(zero.const_value.numpy().astype(np.float32)))


def _negative(node: ir.Node, view: Surroundings) -> bool:
    """Of scales that are there already; those that are computed when they are written are positive by their scheme."""
    scale = _of_codes(node, "scale")
    tensor = None if scale is None else scale.const_value
    if tensor is None or isinstance(tensor, ir.LazyTensor):
        return False
    return bool((tensor.numpy().astype(np.float32) <= 0).any())


def _other_scale(node: ir.Node, view: Surroundings) -> bool:
    scale = _of_codes(node, "scale")
    return scale is not None and scale.dtype != view.dtype


def _inner_cache(node: ir.Node, view: Surroundings) -> bool:
    past = _input(node, "past_cache")
    return past is None or not past.is_graph_input() or not node.outputs[0].is_graph_output()


def _narrow_cache(node: ir.Node, view: Surroundings) -> bool:
    past = _input(node, "past_cache")
    return past is not None and past.dtype is not None and past.dtype.bitwidth == 8


def _reduces(node: ir.Node, view: Surroundings) -> bool:
    how = node.attributes.get("reduction")
    return how is not None and how.as_string() != "none"


def _given_lengths(node: ir.Node, view: Surroundings) -> bool:
    return _input(node, "sequence_lens") is not None and view.dtype in _HALF


def _quantized_weights(node: ir.Node, view: Surroundings) -> bool:
    makers = [value.producer() for value in (_input(node, "W"), _input(node, "R")) if value is not None]
    return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


TRAPS: tuple[Trap, ...] = (
    Trap("causal attention", ("Attention",), lambda n, v: _number(n, "is_causal", 0) != 0,
         "aligns the mask with the first key: over a cache, a new token sees nothing but the oldest one",
         "is_causal=0 and a mask made of past_lengths"),
    Trap("attention without a mask", ("Attention",), lambda n, v: _input(n, "attn_mask") is None,
         "attends to slots of the cache that hold nothing", "a mask made of past_lengths"),
    Trap("nonpad_kv_seqlen", ("Attention",), lambda n, v: _input(n, "nonpad_kv_seqlen") is not None,
         "drops it without a word", "a mask made of past_lengths"),
    Trap("attention with its own cache", ("Attention",),
         lambda n, v: _input(n, "past_key") is not None or len(n.outputs) > 1,
         "does not parse it", "TensorScatter on a cache that is a graph input, before the Attention"),
    Trap("softcap", ("Attention",), lambda n, v: _number(n, "softcap", 0) != 0,
         "does not parse it", "products and a Softmax, with Tanh between"),
    Trap("attention beside a loop", ("Attention",), lambda n, v: bool(v.kinds & set(_LOOPS)),
         "builds no engine that has both", "products and a Softmax in the graph that has a loop"),
    Trap("cache written along another axis", ("TensorScatter",), lambda n, v: _number(n, "axis", -2) not in (2, -2),
         "does not parse it", "a cache (batch, heads, slots, features), axis 2"),
    Trap("circular cache", ("TensorScatter",), lambda n, v: "mode" in n.attributes
         and n.attributes["mode"].as_string() != "linear", "does not parse it", "mode 'linear'"),
    Trap("cache of 8 bits", ("TensorScatter",), _narrow_cache,
         "does not parse it", "a cache in the activations' dtype"),
    Trap("cache inside the graph", ("TensorScatter",), _inner_cache,
         "builds no engine of it", "a cache that is itself an input and an output of the graph"),
    Trap("unsigned codes", _QUANTIZING, lambda n, v: _codes_dtype(n) in (ir.DataType.UINT8, ir.DataType.UINT4,
         ir.DataType.UINT2, ir.DataType.UINT16), "does not parse them", "int8, int4 or float8e4m3fn"),
    Trap("zero points", _QUANTIZING, _nonzero, "does not parse them", "symmetric codes"),
    Trap("scales of another dtype", _QUANTIZING, _other_scale, "does not parse it", "scales in the activations' dtype"),
    Trap("integer products", ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QLinearMatMul"),
         lambda n, v: True, "does not parse them", "QuantizeLinear and DequantizeLinear before a MatMul"),
    Trap("foreign operators", (), lambda n, v: n.domain not in ("", "ai.onnx"),
         "looks for a plugin of that name, and has none", "operators of standard ONNX"),
    Trap("values scattered into sums", ("ScatterElements", "ScatterND"), _reduces,
         "does not parse it", "a product with a matrix that has a one where a value goes"),
    Trap("batch-first recurrences", _RECURRENT, lambda n, v: _number(n, "layout", 0) != 0,
         "takes it, but ONNX Runtime does not, so that nothing could be proved", "layout=0"),
    Trap("recurrences with lengths in 16 bits", _RECURRENT, _given_lengths,
         "does not parse it, and ONNX Runtime ends the process", "the cell in a Scan"),
    Trap("negative scales", _QUANTIZING, _negative, "does not parse them", "scales above zero"),
    Trap("GRU with quantized weights", ("GRU",), _quantized_weights,
         "ends the process", "the cell in a Scan"),
)  # fmt: skip


def lint(model: ir.Model, dtype: str, traps: tuple[Trap, ...] = TRAPS) -> None:
    """Refuse a graph that has any of the forms.

    Args:
        model: a lowered graph.
        dtype: of its activations.
        traps: the table.

    Raises:
        LoweringError: naming the nodes, the row and the form to use instead.
    """
    nodes = list(_nodes(model.graph))
    kind = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16, "float32": ir.DataType.FLOAT}[dtype]
    view = Surroundings(model.graph, frozenset(node.op_type for node in nodes), kind)
    found: dict[Trap, list[str]] = {}
    for node in nodes:
        for trap in traps:
            if (not trap.ops or node.op_type in trap.ops) and trap.found(node, view):
                found.setdefault(trap, []).append(node.name or str(node.outputs[0].name))
    if found:
        said = "; ".join(
            f"{trap.name} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): TensorRT {trap.what}; use "
            f"{trap.instead}"
            for trap, names in found.items()
        )
        raise LoweringError(f"the graph has forms that TensorRT does not compute as they are written: {said}")


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inner: Any = attribute.as_graph()
                yield from _nodes(inner)
