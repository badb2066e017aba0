"""Nodes of a serialized graph put in the place of others, the rest of its bytes left as they are.

Works on a model that :func:`~edgellm_runtime.graphs.onnx_file.read_model` accepts: what is not changed is copied, so
that nothing of it needs to be understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from edgellm_runtime.graphs.onnx_file import read_message
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import Node, message, node_bytes, number, text

__all__ = ["with_initializers", "with_nodes", "with_others"]

_MODEL_GRAPH, _MODEL_OPSET, _GRAPH_NODE, _GRAPH_INITIALIZER, _NODE_ATTRIBUTE = 7, 8, 1, 5, 5
_ATTRIBUTE_GRAPHS = (6, 11)  # one, or several
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
    opsets = (read_message(content, "opset") for field, _, content in _fields(model) if field == _MODEL_OPSET)
    known = {opset.get("domain", b"").decode("latin1") for opset in opsets}
    fresh = sorted({node.domain for some in nodes.values() for node in some} - known)
    return changed + b"".join(message(_MODEL_OPSET, text(1, domain) + number(2, 1)) for domain in fresh)


def with_others(model: bytes, others: Callable[[Message], Sequence[Node] | None]) -> bytes:
    """A model with other nodes in the place of some, within loops and branches too.

    Args:
        model: the serialized model.
        others: told each node, as :mod:`~edgellm_runtime.graphs.onnx_file` reads them; gives what stands there instead,
            of operators that the model has already, or None where the node stays.
    """

    def inner(data: bytes) -> bytes:
        return b"".join(
            message(field, graph(content)) if field in _ATTRIBUTE_GRAPHS else raw
            for field, raw, content in _fields(data)
        )

    def node(data: bytes) -> bytes:
        if (found := others(read_message(data, "node"))) is not None:
            return b"".join(message(_GRAPH_NODE, node_bytes(each)) for each in found)
        parts = (
            message(field, inner(content)) if field == _NODE_ATTRIBUTE else raw for field, raw, content in _fields(data)
        )
        return message(_GRAPH_NODE, b"".join(parts))

    def graph(data: bytes) -> bytes:
        return b"".join(node(content) if field == _GRAPH_NODE else raw for field, raw, content in _fields(data))

    return b"".join(
        message(field, graph(content)) if field == _MODEL_GRAPH else raw for field, raw, content in _fields(model)
    )


def with_initializers(model: bytes, tensors: Sequence[bytes]) -> bytes:
    """A model whose graph has some more initializers.

    Args:
        model: the serialized model.
        tensors: each a serialized ``TensorProto`` of a name that the graph does not have yet.
    """
    more = b"".join(message(_GRAPH_INITIALIZER, tensor) for tensor in tensors)
    return b"".join(
        message(field, content + more) if field == _MODEL_GRAPH else raw for field, raw, content in _fields(model)
    )


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
