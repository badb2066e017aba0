"""Small ONNX graphs as bytes, for work that must be done where a tensor is: copies, zeros, choosing a token.

The runtime does not have the onnx package, and needs of it no more than a handful of nodes. Shapes are left open, so
that one graph serves every size, unless they are given.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ELEMENT_TYPES", "Attribute", "Node", "Shape", "attribute", "graph_bytes", "message", "node_bytes", "number",
    "text", "with_outputs",
]  # fmt: skip

Attribute: TypeAlias = "float | str | Sequence[int] | NDArray[Any]"
Shape = Sequence[int | str]  # a text names a size that is free
NO_SHAPES: Mapping[str, Shape] = {}

# Of onnx.proto3: the numbers that TensorProto.DataType gives to our dtypes.
ELEMENT_TYPES: Mapping[str, int] = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11,
    "bfloat16": 16,
}  # fmt: skip
_IR_VERSION, _OPSET = 10, 21
_FLOAT, _INT, _STRING, _TENSOR, _INTS = 1, 2, 3, 4, 7  # of AttributeProto.AttributeType
_FIXED32 = 5
_SHORT = tuple(bytes([value]) for value in range(0x80))  # numbers of one byte, which most are


@dataclass(frozen=True)
class Node:
    """One operator.

    Args:
        op: its name.
        inputs: names of values; empty for one left out.
        outputs: names of values.
        attributes: numbers, texts, lists of whole numbers, or tensors.
        domain: where the name is from; empty for ONNX's own.
        name: of the node.
    """

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    domain: str = ""
    name: str = ""


def graph_bytes(
    nodes: Sequence[Node], inputs: Mapping[str, str], outputs: Mapping[str, str],
    constants: Mapping[str, Sequence[int]] | None = None, shapes: Mapping[str, Shape] = NO_SHAPES,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> bytes:  # fmt: skip
    """A serialized ``ModelProto``.

    Args:
        nodes: in an order that can be run.
        inputs: name to dtype.
        outputs: name to dtype.
        constants: name to whole numbers, (n,) int64.
        shapes: of those inputs and outputs that are not left open.
        tensors: name to numbers of any of :data:`ELEMENT_TYPES` that NumPy has.
    """
    graph = b"".join(message(1, node_bytes(node)) for node in nodes) + text(2, "edgellm")
    graph += b"".join(message(5, _integers(name, values)) for name, values in (constants or {}).items())
    graph += b"".join(message(5, _tensor(name, values)) for name, values in (tensors or {}).items())
    graph += b"".join(message(11, _value(name, dtype, shapes.get(name))) for name, dtype in inputs.items())
    graph += b"".join(message(12, _value(name, dtype, shapes.get(name))) for name, dtype in outputs.items())
    opsets = {"": _OPSET, **{node.domain: 1 for node in nodes if node.domain}}
    imports = b"".join(message(8, text(1, domain) + number(2, version)) for domain, version in opsets.items())
    return number(1, _IR_VERSION) + message(7, graph) + imports


def with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """A serialized ``ModelProto`` whose graph gives some more of its values.

    What follows a message in protocol buffers is merged into it, so nothing of the model is read.

    Args:
        model: the serialized model.
        names: of values that nodes of its graph make.
    """
    return model + message(7, b"".join(message(12, text(1, name)) for name in names))


def node_bytes(node: Node) -> bytes:
    """A serialized ``NodeProto``."""
    texts = b"".join(text(1, name) for name in node.inputs) + b"".join(text(2, name) for name in node.outputs)
    kind = (text(3, node.name) if node.name else b"") + text(4, node.op)
    kind += text(7, node.domain) if node.domain else b""
    return texts + kind + b"".join(message(5, attribute(*item)) for item in node.attributes.items())


def attribute(name: str, value: Attribute) -> bytes:
    """What an attribute of a node holds: a number, a text, a list of whole numbers, or a tensor."""
    if isinstance(value, str):
        return text(1, name) + text(4, value) + number(20, _STRING)
    if isinstance(value, int):
        return text(1, name) + number(3, value) + number(20, _INT)
    if isinstance(value, float):
        return text(1, name) + _varint(2 << 3 | _FIXED32) + struct.pack("<f", value) + number(20, _FLOAT)
    if not isinstance(value, Sequence):
        return text(1, name) + message(5, _tensor("", value)) + number(20, _TENSOR)
    return text(1, name) + b"".join(number(8, int(v)) for v in value) + number(20, _INTS)


def _integers(name: str, values: Sequence[int]) -> bytes:
    data = b"".join(_varint(v) for v in values)
    return number(1, len(values)) + number(2, ELEMENT_TYPES["int64"]) + message(7, data) + text(8, name)


def _tensor(name: str, values: NDArray[Any]) -> bytes:
    sizes = b"".join(number(1, size) for size in values.shape)
    return sizes + number(2, ELEMENT_TYPES[values.dtype.name]) + text(8, name) + message(9, values.tobytes())


def _value(name: str, dtype: str, shape: Shape | None) -> bytes:
    tensor = number(1, ELEMENT_TYPES[dtype])
    if shape is not None:
        sizes = (text(2, size) if isinstance(size, str) else number(1, size) for size in shape)
        tensor += message(2, b"".join(message(1, size) for size in sizes))
    return text(1, name) + message(2, message(1, tensor))


def message(field_number: int, content: bytes) -> bytes:
    """A field that holds a message, or bytes."""
    return _varint(field_number << 3 | 2) + _varint(len(content)) + content


def text(field_number: int, value: str) -> bytes:
    """A field that holds a text."""
    return message(field_number, value.encode())


def number(field_number: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return _varint(field_number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    if 0 <= value < len(_SHORT):
        return _SHORT[value]
    value &= (1 << 64) - 1  # a negative number is written as its two's complement
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)
