"""Which look-up in a table of codes edgellm's own operator computes, and the node of it."""

from __future__ import annotations

from edgellm_runtime.graphs.graph_view import Constant, GraphView
from edgellm_runtime.graphs.own_attention import DOMAIN
from edgellm_runtime.graphs.stored_weights import stored_weights
from edgellm_runtime.graphs.writer import Node

__all__ = ["GATHER", "gather_chain", "own_gather"]

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
    points = view.constants.get(zeros[0]) if zeros and zeros[0] else None
    if set(view.attributes(place)) - _READ or given.get("gather_axis", 0) != 0 or bits not in _BITS:
        return None
    scale, (rows, width) = view.constants.get(scales), _size(view.constants.get(codes), bits)
    if not width or block < _LEAST_BLOCK:
        return None
    if given.get("quantize_axis", 1) not in (1, -1) or asked is None or asked.dtype != "int64":
        return None
    blocks = -(-width // block)
    if scale is None or scale.dtype != "float32" or scale.dims != (rows, blocks):
        return None
    if bool(zeros and zeros[0]) and (points is None or points.dtype != "uint8"):
        return None
    stored = stored_weights(view, codes, scales)
    sizes = {"N": rows, "K": width, "bits": bits, "block_size": block, "zeros": int(points is not None), **stored.said}
    inputs = [places, stored.codes, stored.scales, *(zeros if points is not None else [])]
    return Node(GATHER, inputs, node.outputs, sizes, domain=DOMAIN, name=node.name)


def gather_chain(view: GraphView, place: int) -> frozenset[int]:
    """Places of the nodes before a look-up that the operator stands for as well."""
    codes, _, scales, *_ = view.node(place).inputs
    return stored_weights(view, codes, scales).chain


def _size(table: Constant | None, bits: int) -> tuple[int, int]:
    """Rows and columns of a table of whole bytes; 0 of what is none."""
    if table is None or table.dims is None or len(table.dims) != 2 or table.dtype != "uint8":
        return 0, 0
    return table.dims[0], table.dims[1] * 8 // bits
