"""A graph whose products with weights in blocks read floats, as slow as that is, and round nothing that they read."""

from __future__ import annotations

from edgellm_runtime.graphs.rewriting import with_attribute
from edgellm_runtime.graphs.wire import Message

__all__ = ["with_float_inputs"]

_LEVEL, _IN_8_BITS, _AS_FLOATS = "accuracy_level", 4, 1


def with_float_inputs(model: bytes) -> bytes:
    """The same graph, whose numbers are those of its weights alone.

    Args:
        model: the serialized model.
    """
    return with_attribute(model, _rounds, _LEVEL, _AS_FLOATS)[0]


def _rounds(node: Message) -> bool:
    given = {a.get("name", b""): a.get("i", 0) for a in node.get("attribute", ())}
    return node.get("op_type") == b"MatMulNBits" and given.get(_LEVEL.encode()) == _IN_8_BITS
