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
_STATE = "present."
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def to_dtype(array: NDArray[np.generic], dtype: str, rounded: str = "") -> NDArray[np.generic]:
    """An array in a dtype's numbers, rounded to a narrower one first."""
    return array.astype(_NUMPY[rounded or dtype]).astype(_NUMPY[dtype])


def narrow(model: ir.Model, dtype: str, rounded: str = "") -> None:
    """Turn every float32 of a graph into ``dtype``, bodies of loops too, but what it gives besides the state. In place.

    Before: a lowered graph whose floats are all float32. After: the same graph in ``dtype``, but for weights that are
    read as whole numbers only. Weights are converted when they are written, and what is wider than float16 holds is
    refused by the proof, not here.

    Args:
        model: a lowered graph; its logits, and hidden states if it gives them, stay float32.
        dtype: ``float16``, ``bfloat16`` or ``float32``.
        rounded: a narrower dtype that weights are rounded to first; empty for none.
    """
    wanted = FLOATS[dtype]
    given = [at for at, value in enumerate(model.graph.outputs) if not str(value.name).startswith(_STATE)]
    if dtype != "float32":
        for at in given:
            _keep_float(model.graph, at)
    kept = [model.graph.outputs[at] for at in given]
    kept += [value for graph in _graphs(model.graph) for value in graph.initializers.values() if _made_whole(value)]
    for graph in _graphs(model.graph):
        for value in graph.initializers.values():
            if any(value is other for other in kept):
                continue
            if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
                value.const_value = _converted(value.const_value, wanted, dtype, rounded)
        for value in _values(graph):
            if value.dtype == ir.DataType.FLOAT and not any(value is other for other in kept):
                value.type = ir.TensorType(wanted)
        for node in graph:
            _retype(node, wanted, dtype, rounded, keep=any(node.outputs[0] is other for other in kept))


def _made_whole(value: ir.Value) -> bool:
    """Whether a weight is read as whole numbers only, such as ids of tokens, of which 16 bits hold few exactly."""
    to = [node.attributes["to"].as_int() for node in value.consumers() if node.op_type == "Cast"]
    return len(value.uses()) == len(to) > 0 and all(ir.DataType(kind).is_integer() for kind in to)


def _keep_float(graph: ir.Graph, at: int) -> None:
    """Put a cast between what computes an output and the output."""
    value = graph.outputs[at]
    name, shape = value.name, value.shape
    cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)})
    value.name = f"{name}.narrow"
    cast.outputs[0].name, cast.outputs[0].shape = name, shape
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.append(cast)
    graph.outputs[at] = cast.outputs[0]


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
    if node.op_type == "ConstantOfShape" and value is None:  # zeros in float32, unless it says otherwise
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(to_dtype(np.zeros(1), dtype), dtype=wanted))
