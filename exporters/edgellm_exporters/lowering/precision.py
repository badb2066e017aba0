"""One precision for a whole lowered graph: what was captured in float32 computes in another float."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_exporters.quantize.plan import STORAGE

__all__ = ["FLOATS", "narrow", "to_dtype"]

FLOATS = {
    "float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16,
}  # fmt: skip
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def to_dtype(array: NDArray[np.generic], dtype: str, rounded: str = "") -> NDArray[np.generic]:
    """An array in a dtype's numbers, rounded to a narrower one first."""
    return array.astype(_NUMPY[rounded or dtype]).astype(_NUMPY[dtype])


def narrow(model: ir.Model, dtype: str, rounded: str = "") -> None:
    """Turn every float32 of a graph into ``dtype``, bodies of loops too, but the logits, which stay float32. In place.

    Before: a lowered graph whose floats are all float32. After: the same graph in ``dtype``; weights are converted when
    they are written, and what is wider than float16 holds is refused by the proof, not here.

    Args:
        model: a lowered graph whose first output is the logits.
        dtype: ``float16``, ``bfloat16`` or ``float32``.
        rounded: a narrower dtype that weights are rounded to first; empty for none.
    """
    wanted, logits = FLOATS[dtype], model.graph.outputs[0]
    if dtype != "float32":
        _keep_float(model.graph, logits)
    for graph in _graphs(model.graph):
        for value in graph.initializers.values():
            if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
                value.const_value = _converted(value.const_value, wanted, dtype, rounded)
        for value in _values(graph):
            if value.dtype == ir.DataType.FLOAT and value is not model.graph.outputs[0]:
                value.type = ir.TensorType(wanted)
        for node in graph:
            _retype(node, wanted, dtype, rounded, keep=node.outputs[0] is model.graph.outputs[0])


def _keep_float(graph: ir.Graph, logits: ir.Value) -> None:
    """Put a cast between what computes the logits and the graph's output."""
    name, shape = logits.name, logits.shape
    cast = ir.node("Cast", [logits], attributes={"to": int(ir.DataType.FLOAT)})
    logits.name = f"{name}.narrow"
    cast.outputs[0].name, cast.outputs[0].shape = name, shape
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(cast)
    graph.outputs[0] = cast.outputs[0]


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _graphs(attribute.as_graph())


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _converted(tensor: ir.TensorProtocol, wanted: ir.DataType, dtype: str, rounded: str) -> ir.LazyTensor:
    storage = tensor.metadata_props.get(STORAGE, "")
    return ir.LazyTensor(
        lambda: ir.tensor(to_dtype(np.asarray(tensor.numpy()), dtype, rounded), dtype=wanted),
        dtype=wanted, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name,
        metadata_props={STORAGE: storage} if storage else {},
    )  # fmt: skip


def _retype(node: ir.Node, wanted: ir.DataType, dtype: str, rounded: str, *, keep: bool) -> None:
    to = node.attributes.get("to")
    if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT and not keep:
        node.attributes["to"] = ir.AttrInt64("to", int(wanted))
    value = node.attributes.get("value")
    if value is not None and value.type == ir.AttributeType.TENSOR and value.as_tensor().dtype == ir.DataType.FLOAT:
        tensor = ir.tensor(to_dtype(np.asarray(value.as_tensor().numpy()), dtype, rounded), dtype=wanted)
        node.attributes["value"] = ir.AttrTensor("value", tensor)
