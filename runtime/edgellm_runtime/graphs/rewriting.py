"""Nodes of a serialized graph given another operator, the rest of its bytes left as they are.

Works on a model that :func:`~edgellm_runtime.graphs.onnx_file.read_model` accepts: what is not changed is copied, so
that nothing of it needs to be understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from edgellm_runtime.graphs.onnx_file import read_message
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import attribute, message, number, text

__all__ = ["with_attribute", "with_operator"]

Chosen = Callable[[Message], bool]
_MODEL_GRAPH, _MODEL_OPSET, _GRAPH_NODE, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 7, 8, 1, 4, 5, 7
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def with_operator(model: bytes, chosen: Chosen, *, domain: str, op: str) -> tuple[bytes, int]:
    """A model whose chosen nodes are of another operator, with inputs, outputs and attributes as they were.

    Nodes within loops and branches are left alone.

    Args:
        model: the serialized model.
        chosen: told each node of its graph, as :mod:`~edgellm_runtime.graphs.onnx_file` reads them.
        domain: of the operator, in its first version.
        op: its name.

    Returns:
        The model, and how many nodes were changed.
    """

    def other(data: bytes) -> bytes:
        kept = b"".join(raw for field, raw, _ in _fields(data) if field not in (_NODE_OP, _NODE_DOMAIN))
        return kept + text(_NODE_OP, op) + text(_NODE_DOMAIN, domain)

    changed, count = _with_nodes(model, chosen, other)
    return (changed + message(_MODEL_OPSET, text(1, domain) + number(2, 1)), count) if count else (model, 0)


def with_attribute(model: bytes, chosen: Chosen, name: str, value: int) -> tuple[bytes, int]:
    """A model whose chosen nodes have another whole number as one of their attributes.

    Args:
        model: the serialized model.
        chosen: as for :func:`with_operator`.
        name: of the attribute.
        value: in the place of what it is.

    Returns:
        The model, and how many nodes were changed.
    """

    def other(data: bytes) -> bytes:
        kept = b"".join(
            raw
            for field, raw, content in _fields(data)
            if field != _NODE_ATTRIBUTE or read_message(content, "attribute").get("name") != name.encode()
        )
        return kept + message(_NODE_ATTRIBUTE, attribute(name, value))

    return _with_nodes(model, chosen, other)


def _with_nodes(model: bytes, chosen: Chosen, change: Callable[[bytes], bytes]) -> tuple[bytes, int]:
    """A model with the chosen nodes of its graph changed, and how many they are."""
    count = 0

    def node(data: bytes) -> bytes:
        nonlocal count
        if not chosen(read_message(data, "node")):
            return data
        count += 1
        return change(data)

    def graph(data: bytes) -> bytes:
        return b"".join(
            message(field, node(content)) if field == _GRAPH_NODE else raw for field, raw, content in _fields(data)
        )

    changed = b"".join(
        message(field, graph(content)) if field == _MODEL_GRAPH else raw for field, raw, content in _fields(model)
    )
    return changed, count


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field of a message: its number, all its bytes, and what it holds if that has a length."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _varint(data, at)
        content = b""
        wire = tag & 7
        if wire == _VARINT:
            _, at = _varint(data, at)
        elif wire == _LENGTH:
            length, at = _varint(data, at)
            content, at = data[at : at + length], at + length
        else:
            at += {_FIXED64: 8, _FIXED32: 4}[wire]
        yield tag >> 3, data[start:at], content


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return result, at
