"""Nodes of a serialized graph put in the place of others, the rest of its bytes left as they are.

Works on a model that :func:`~edgellm_runtime.graphs.onnx_file.read_model` accepts: what is not changed is copied, so
that nothing of it needs to be understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from edgellm_runtime.graphs.onnx_file import read_message, read_model
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import Node, attribute, message, node_bytes, number, text

__all__ = ["with_attribute", "with_nodes"]

Chosen = Callable[[Message], bool]
_MODEL_GRAPH, _MODEL_OPSET, _GRAPH_NODE, _NODE_ATTRIBUTE = 7, 8, 1, 5
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def with_nodes(model: bytes, nodes: Mapping[int, Sequence[Node]]) -> bytes:
    """A model some of whose nodes have given way to others.

    Args:
        model: the serialized model.
        nodes: by the place of a node in its graph, what stands there instead; may be nothing.
    """

    def graph(data: bytes) -> bytes:
        place, parts = -1, []
        for field, raw, _ in _fields(data):
            place += field == _GRAPH_NODE
            changed = field == _GRAPH_NODE and place in nodes
            parts += [message(_GRAPH_NODE, node_bytes(node)) for node in nodes[place]] if changed else [raw]
        return b"".join(parts)

    if not nodes:
        return model
    changed = b"".join(
        message(field, graph(content)) if field == _MODEL_GRAPH else raw for field, raw, content in _fields(model)
    )
    known = {opset.get("domain", b"").decode("latin1") for opset in read_model(model).get("opset_import", ())}
    fresh = sorted({node.domain for some in nodes.values() for node in some} - known)
    return changed + b"".join(message(_MODEL_OPSET, text(1, domain) + number(2, 1)) for domain in fresh)


def with_attribute(model: bytes, chosen: Chosen, name: str, value: int) -> tuple[bytes, int]:
    """A model whose chosen nodes have another whole number as one of their attributes.

    Args:
        model: the serialized model.
        chosen: told each node of its graph, as :mod:`~edgellm_runtime.graphs.onnx_file` reads them.
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
