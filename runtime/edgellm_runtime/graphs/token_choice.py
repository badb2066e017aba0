"""The graph that chooses the best tokens of a row of logits, which every device that has them runs in its own way.

ONNX Runtime makes a session of it where it is asked for; of TensorRT, an engine is built beside those of a bundle. No
library is imported here.
"""

from __future__ import annotations

import math
from hashlib import sha256

from edgellm_runtime.graphs.writer import ELEMENT_TYPES, NO_SHAPES, Node, graph_bytes

__all__ = ["LOGITS", "MOST", "RESULTS", "choosing_digest", "choosing_graph"]

LOGITS = "logits"
RESULTS = {"ids": "int64", "values": "float32", "sum": "float32"}
MOST = 3840  # tokens of a row; TensorRT sorts no more
_LAST = {"keepdims": 1}
_REDUCTIONS = (("ReduceMax", "x", "values"), ("ReduceMin", "named", "ids"))


def choosing_graph(dtype: str, vocab: int, count: int, *, sized: bool = False) -> bytes:
    """From logits (batch, 1, vocab) to ``ids`` and ``values`` (batch, 1, count), the best first, and ``sum``.

    A single one is the lowest id among equals: the maximum first, then the least id that has it, which no order of
    reduction changes. Several come from a sort, whose order among equals is the library's. ``sum`` (batch, 1, 1), of
    all logits, is NaN where one of them is, which a maximum may hide.

    Args:
        dtype: of the logits.
        vocab: how many a row.
        count: how many to choose.
        sized: whether to state every size but the batch's, for a library that plans its own reductions.
    """
    nodes = [
        Node("Cast", ["logits"], ["x"], {"to": ELEMENT_TYPES["float32"]}),
        Node("ReduceSum", ["x", "last"], ["sum"], _LAST),
    ]
    constants = {"last": [-1]}
    if count == 1:
        constants |= {"zero": [0], "one": [1], "vocab": [vocab]}
        maximum, least = ([Node(op, [x, "last"], [y], _LAST)] for op, x, y in _REDUCTIONS)
        if not sized and (parts := _parts(vocab)) > 1:
            constants |= {"grid": [0, parts, vocab // parts], "line": [0, 1, parts]}
            maximum, least = (_by_parts(op, x, y) for op, x, y in _REDUCTIONS)
        nodes += [
            *maximum,
            Node("Equal", ["x", "values"], ["equal"]),
            Node("Squeeze", ["zero"], ["start"]),
            Node("Squeeze", ["vocab"], ["limit"]),
            Node("Squeeze", ["one"], ["delta"]),
            Node("Range", ["start", "limit", "delta"], ["iota"]),
            Node("Where", ["equal", "iota", "vocab"], ["named"]),
            *least,
        ]
    else:
        constants |= {"k": [count]}
        nodes.append(Node("TopK", ["x", "k"], ["values", "ids"], {"axis": -1, "largest": 1, "sorted": 1}))
    row, some, one = (("batch", 1, size) for size in (vocab, count, 1))
    shapes = {LOGITS: row, "ids": some, "values": some, "sum": one} if sized else NO_SHAPES
    return graph_bytes(nodes, {LOGITS: dtype}, RESULTS, constants, shapes)


def _parts(vocab: int) -> int:
    """Into how many equal parts to cut a row, the divisor nearest its square root."""
    return max(n for n in range(1, math.isqrt(vocab) + 1) if vocab % n == 0)


def _by_parts(op: str, x: str, y: str) -> list[Node]:
    """A reduction of parts of rows and then of what these gave: cuDNN's takes a thread for a row, 8 ms of 49,152."""
    return [
        Node("Reshape", [x, "grid"], [f"{x}.parts"]),
        Node(op, [f"{x}.parts", "last"], [f"{x}.of_parts"], _LAST),
        Node("Reshape", [f"{x}.of_parts", "line"], [f"{x}.line"]),
        Node(op, [f"{x}.line", "last"], [y], _LAST),
    ]


def choosing_digest(vocab: int, count: int) -> str:
    """The sha256 of the graph that an engine for choosing is built from."""
    return sha256(choosing_graph("float32", vocab, count, sized=True)).hexdigest()
