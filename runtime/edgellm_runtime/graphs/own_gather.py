"""Which look-up in a table of codes edgellm's own operator computes, and the node of it."""

from __future__ import annotations

from edgellm_runtime.graphs.graph_view import GraphView
from edgellm_runtime.graphs.own_attention import DOMAIN
from edgellm_runtime.graphs.writer import Node

__all__ = ["GATHER", "own_gather"]

GATHER = "BlockGather"
_BITS, _LEAST_BLOCK = (2, 4, 8), 16
_READ = {"bits", "block_size", "gather_axis", "quantize_axis"}


def own_gather(view: GraphView, place: int) -> Node | None:
    """The node of edgellm's own operator that gives the rows that a node of a graph does; None if there is none.

    Args:
        view: the graph.
        place: of the node.
    """
    node = view.node(place)
    if (node.op, view.domain(place)) != ("GatherBlockQuantized", "com.microsoft") or len(node.inputs) not in (3, 4):
        return None
    given, (codes, places, scales, *zeros) = node.numbers, node.inputs
    bits, block = given.get("bits", 4), given.get("block_size", 128)
    asked = view.input(places)
    table, points = view.constants.get(codes), view.constants.get(zeros[0]) if zeros and zeros[0] else None
    if set(view.attributes(place)) - _READ or given.get("gather_axis", 0) != 0 or bits not in _BITS:
        return None
    if table is None or table.dims is None or len(table.dims) != 2 or table.dtype != "uint8" or block < _LEAST_BLOCK:
        return None
    scale, width = view.constants.get(scales), table.dims[1] * 8 // bits
    if given.get("quantize_axis", 1) not in (1, -1) or asked is None or asked.dtype != "int64":
        return None
    blocks = -(-width // block)
    if scale is None or scale.dtype != "float32" or scale.dims != (table.dims[0], blocks):
        return None
    if bool(zeros and zeros[0]) and (points is None or points.dtype != "uint8"):
        return None
    sizes = {"N": table.dims[0], "K": width, "bits": bits, "block_size": block, "zeros": int(points is not None)}
    inputs = [places, codes, view.uncast(scales)[0], *(zeros if points is not None else [])]
    return Node(GATHER, inputs, node.outputs, sizes, domain=DOMAIN, name=node.name)
