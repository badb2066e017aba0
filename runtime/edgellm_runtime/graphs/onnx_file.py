"""An ONNX graph read without the onnx package: its nodes, and every tensor wherever it may be.

The tables are onnx.proto's. Messages that can hold no tensor and no node (types, shapes, notes) are passed over whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.graphs.wire import Message, Reader, compiled

__all__ = ["FIELDS", "MAX_GRAPH_BYTES", "ReadGraph", "nodes_of", "read_message", "read_model", "tensors_of"]

MAX_GRAPH_BYTES = 32 << 20  # weights are beside it; the graph of 80 layers is a tenth of this
_MAX_FIELDS = 4_000_000

FIELDS = {
    "model": {
        1: "ir_version int", 2: "producer_name bytes", 3: "producer_version bytes", 4: "domain bytes",
        5: "model_version int", 6: "doc_string bytes", 7: "graph graph", 8: "opset_import *opset",
        14: "metadata_props *opaque", 20: "training_info *training", 25: "functions *function",
        26: "configuration *opaque",
    },
    "opset": {1: "domain bytes", 2: "version int"},
    "training": {
        1: "initialization graph", 2: "algorithm graph", 3: "initialization_binding *opaque",
        4: "update_binding *opaque",
    },
    "function": {
        1: "name bytes", 4: "input *bytes", 5: "output *bytes", 6: "attribute *bytes", 7: "node *node",
        8: "doc_string bytes", 9: "opset_import *opset", 10: "domain bytes", 11: "attribute_proto *attribute",
        12: "value_info *opaque", 13: "overload bytes", 14: "metadata_props *opaque",
    },
    "graph": {
        1: "node *node", 2: "name bytes", 5: "initializer *tensor", 10: "doc_string bytes", 11: "input *value",
        12: "output *value", 13: "value_info *opaque", 14: "quantization_annotation *opaque",
        15: "sparse_initializer *sparse", 16: "metadata_props *opaque",
    },
    "value": {1: "name bytes", 2: "type type", 3: "doc_string bytes", 4: "metadata_props *opaque"},
    "type": {
        1: "tensor_type tensor_type", 4: "sequence_type opaque", 5: "map_type opaque", 6: "denotation bytes",
        7: "opaque_type opaque", 8: "sparse_tensor_type opaque", 9: "optional_type opaque",
    },
    "tensor_type": {1: "elem_type int32", 2: "shape shape"},
    "shape": {1: "dim *dim"},
    "dim": {1: "dim_value int", 2: "dim_param bytes", 3: "denotation bytes"},
    "node": {
        1: "input *bytes", 2: "output *bytes", 3: "name bytes", 4: "op_type bytes", 5: "attribute *attribute",
        6: "doc_string bytes", 7: "domain bytes", 8: "overload bytes", 9: "metadata_props *opaque",
        10: "device_configurations *opaque",
    },
    "attribute": {
        1: "name bytes", 2: "f float", 3: "i int", 4: "s bytes", 5: "t tensor", 6: "g graph", 7: "floats *float",
        8: "ints *int", 9: "strings *bytes", 10: "tensors *tensor", 11: "graphs *graph", 13: "doc_string bytes",
        14: "tp opaque", 15: "type_protos *opaque", 20: "type int32", 21: "ref_attr_name bytes",
        22: "sparse_tensor sparse", 23: "sparse_tensors *sparse",
    },
    "sparse": {1: "values tensor", 2: "indices tensor", 3: "dims *int"},
    "tensor": {
        1: "dims *int", 2: "data_type int32", 3: "segment opaque", 4: "float_data *float", 5: "int32_data *int32",
        6: "string_data *bytes", 7: "int64_data *int", 8: "name bytes", 9: "raw_data bytes", 10: "double_data *double",
        11: "uint64_data *uint64", 12: "doc_string bytes", 13: "external_data *entry", 14: "data_location int32",
        16: "metadata_props *opaque",
    },
    "entry": {1: "key bytes", 2: "value bytes"},
}  # fmt: skip
_TABLES = {kind: compiled(fields) for kind, fields in FIELDS.items()}
# Through which fields of a message tensors and nodes are reached.
_INNER = {
    kind: tuple(
        (name, kind_of.removeprefix("*"), "*" in kind_of)
        for name, kind_of in (text.split() for text in fields.values())
        if kind_of.removeprefix("*") in ("graph", "training", "function", "node", "attribute", "sparse", "tensor")
    )
    for kind, fields in FIELDS.items()
}


def read_model(data: bytes) -> Message:
    """A serialized model: field name to value, as onnx.proto names them.

    Raises:
        ValueError: it is none, is too large, or has more than one reading.
    """
    if not data:
        raise ValueError("the file is empty")
    if len(data) > MAX_GRAPH_BYTES:
        raise ValueError(f"{len(data)} bytes are more than the {MAX_GRAPH_BYTES} that a graph may have")
    return Reader(data, _TABLES, _MAX_FIELDS).read("model")


@dataclass(frozen=True)
class ReadGraph:
    """A serialized model and what it says, so that who needs both reads it once.

    Args:
        data: the model.
        model: what :func:`read_model` makes of it.
    """

    data: bytes
    model: Message

    @classmethod
    def of(cls, data: bytes) -> ReadGraph:
        """Reads a serialized model; errors as :func:`read_model`."""
        return cls(data, read_model(data))


def read_message(data: bytes, kind: str) -> Message:
    """A part of a model, such as a ``node``, read as :func:`read_model` reads the whole.

    Raises:
        ValueError: it is none of that kind.
    """
    return Reader(data, _TABLES, _MAX_FIELDS).read(kind)


def tensors_of(message: Message, kind: str = "model") -> Iterator[Message]:
    """Every tensor of a message: initializers, sparse ones, and those in attributes, branches and functions."""
    if kind == "tensor":
        yield message
    for inner, what in _parts(message, kind):
        yield from tensors_of(inner, what)


def nodes_of(message: Message, kind: str = "model") -> Iterator[Message]:
    """Every node of a message, those in branches and functions too."""
    if kind == "node":
        yield message
    for inner, what in _parts(message, kind):
        yield from nodes_of(inner, what)


def _parts(message: Message, kind: str) -> Iterator[tuple[Any, str]]:
    for name, what, repeated in _INNER[kind]:
        if (found := message.get(name)) is not None:
            for inner in found if repeated else (found,):
                yield inner, what
