"""A graph whose products with quantized weights read floats, as slow as that is, and round nothing that they read."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm_runtime.graphs.onnx_file import nodes_of, read_model
from edgellm_runtime.graphs.product_parts import WIDENED_BYTES, with_product_parts
from edgellm_runtime.graphs.rewriting import with_others
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import ELEMENT_TYPES, Node

__all__ = ["with_float_inputs"]

_LEVEL, _IN_8_BITS, _AS_FLOATS = "accuracy_level", 4, 1


def with_float_inputs(model: bytes) -> bytes:
    """The same graph, whose numbers are those of its weights alone.

    Weights in blocks have a kernel that reads floats. An integer product becomes one with the floats that its codes
    stand for: rows are neither divided by their scale before it nor multiplied with it after.

    Args:
        model: the serialized model.
    """
    read = read_model(model)
    products = [node for node in nodes_of(read) if node.get("op_type") == b"MatMulIntegerToFloat"]
    outer = {name for node in read.get("graph", {}).get("node", ()) for name in _names(node, "output")}
    codes = {_names(node, "input")[0] for node in products}  # of what they read
    rows = {_names(node, "output")[0] for node in products}  # of what they make, before each has its scale

    def others(node: Message) -> Sequence[Node] | None:
        op, inputs, outputs = node.get("op_type"), _names(node, "input"), _names(node, "output")
        if op == b"MatMulNBits":
            return _reading_floats(node)
        if op == b"MatMulIntegerToFloat":
            floats = f"{outputs[0]}.weight"
            widen = Node("DequantizeLinear", [inputs[1], inputs[3]], [floats], {"axis": 1})
            if outputs[0] in outer:
                return [widen, Node("MatMul", [inputs[0], floats], outputs)]
            # in a branch or loop the library would look for the codes of a DequantizeLinear there, and give up
            wide = f"{outputs[0]}.codes"
            return [
                Node("Cast", [inputs[1]], [wide], {"to": ELEMENT_TYPES["float32"]}),
                Node("Mul", [wide, inputs[3]], [floats]),
                Node("MatMul", [inputs[0], floats], outputs),
            ]
        if (op == b"QuantizeLinear" and outputs[0] in codes) or (op == b"Mul" and inputs[0] in rows):
            return [Node("Identity", inputs[:1], outputs)]
        return None

    return with_product_parts(with_others(model, others), WIDENED_BYTES)  # which widen what they read whole


def _reading_floats(node: Message) -> Sequence[Node] | None:
    given = {a["name"].decode(): a.get("i", 0) for a in node.get("attribute", ())}
    if given.get(_LEVEL) != _IN_8_BITS:
        return None
    domain = node.get("domain", b"").decode()
    return [Node("MatMulNBits", _names(node, "input"), _names(node, "output"), {**given, _LEVEL: _AS_FLOATS}, domain)]


def _names(node: Message, key: str) -> list[str]:
    return [name.decode() for name in node.get(key, ())]
