"""Which layer of its model each node of a graph belongs to, told from the names that the graph has kept.

Weights and states are named by their place in the model (``layers.3.mlp.up_proj.weight``, ``past.layers.3.k``), and the
outputs of layers may have names of their own. What reads or writes such a name is of that layer; everything else goes
with what it computes from, or, if it computes from no token, with what reads it. Nothing here knows an architecture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from edgellm_runtime.graphs.wire import Message

__all__ = ["EMBEDDING", "HEAD", "SHARED", "WHOLE", "GraphNode", "graph_nodes", "layer_map"]

EMBEDDING, HEAD = "embedding", "head"
SHARED = "shared"  # what several layers read and no token's embedding is: lengths, masks, tables
WHOLE = "model"  # of a graph that names no layer
_INPUT = "tokens"
_NUMBERED = re.compile(r"(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*\.\d+(?=\.)")
_PAST, _PRESENT = "past.", "present."
_SIZES = ("Shape", "Size")  # read a tensor's sizes and none of its numbers
_NONE: frozenset[str] = frozenset()
_COUNTS = (6, 7, 9)  # int32, int64 and bool of TensorProto.DataType: places and sizes, never weights


@dataclass(frozen=True)
class GraphNode:
    """A node of a graph.

    Args:
        name: its own; may be empty.
        op: the operator's name.
        inputs: names of values; empty for one left out.
        outputs: likewise.
        numbers: its attributes that are whole numbers.
        body: whether it has a graph of its own inside.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]
    body: bool = False


def graph_nodes(model: Message) -> list[GraphNode]:
    """The nodes of a model's graph in their order, those inside of other nodes left out.

    Args:
        model: from :func:`~edgellm_runtime.graphs.onnx_file.read_model`.
    """
    return [
        GraphNode(
            _text(node.get("name", b"")), _text(node.get("op_type", b"")), _texts(node.get("input", ())),
            _texts(node.get("output", ())),
            {_text(a.get("name", b"")): int(a["i"]) for a in node.get("attribute", ()) if "i" in a},
            any(a.keys() & {"g", "graphs"} for a in node.get("attribute", ())),
        )
        for node in model.get("graph", {}).get("node", ())
    ]  # fmt: skip


def layer_map(model: Message, paths: Collection[str] = (), prefix: str = "") -> list[str]:
    """The layer of each node: its path in the model, or one of the words above.

    Args:
        model: from :func:`~edgellm_runtime.graphs.onnx_file.read_model`.
        paths: of layers, where they are known; else, names are searched for them.
        prefix: how the names of layers' outputs begin, where the graph has such.

    Returns:
        As many as :func:`graph_nodes` gives, in its order.
    """
    nodes = graph_nodes(model)
    weights = {_text(t.get("name", b"")): t for t in model.get("graph", {}).get("initializer", ())}
    finder = _Paths(paths)
    marks = [_marked(node, weights, finder) for node in nodes]
    order = {path: place for place, path in enumerate(dict.fromkeys(m for m in marks if m is not None))}
    if not order:
        return [WHOLE] * len(nodes)
    return _Places(nodes, marks, order, _weights_behind(nodes, weights), prefix).labels()


class _Paths:
    """Finds a layer's path at the beginning of a name.

    Args:
        known: paths; none: any words up to the first number.
    """

    def __init__(self, known: Collection[str]) -> None:
        self._known = sorted(known, key=len)

    def of(self, name: str) -> str | None:
        if self._known:
            return next((path for path in self._known if name.startswith(f"{path}.")), None)
        found = _NUMBERED.match(name)
        return found.group() if found else None


def _marked(node: GraphNode, weights: Mapping[str, Message], paths: _Paths) -> str | None:
    """The layer that a node's own names tell: states before weights."""
    states = [name for name in node.inputs if name.startswith(_PAST)]
    states += [name for name in node.outputs if name.startswith(_PRESENT)]
    found = [paths.of(name.partition(".")[2]) for name in states]
    found += [paths.of(name) for name in node.inputs if name in weights]
    return next((path for path in found if path is not None), None)


def _weights_behind(nodes: Sequence[GraphNode], weights: Mapping[str, Message]) -> dict[str, frozenset[str]]:
    """Of each value that is computed from weights alone, the names of those; numbers that only count are none."""
    behind = {name: frozenset([name] if _is_weight(t) else []) for name, t in weights.items()}
    for node in nodes:
        given = [name for name in node.inputs if name]
        if given and not node.body and all(name in behind for name in given):
            behind |= dict.fromkeys(filter(None, node.outputs), frozenset().union(*(behind[name] for name in given)))
    return behind


class _Places:
    """Places of nodes between embedding and head, which are -1 and the number of layers."""

    def __init__(
        self, nodes: Sequence[GraphNode], marks: Sequence[str | None], order: Mapping[str, int],
        behind: Mapping[str, frozenset[str]], prefix: str,
    ) -> None:  # fmt: skip
        self._nodes, self._marks, self._order, self._behind, self._prefix = nodes, marks, order, behind, prefix
        self._head = len(order)
        self._at: dict[str, int] = {}  # by the value that a node makes
        self._found: list[int | None] = []

    def labels(self) -> list[str]:
        self._forward()
        readers: dict[str, set[int]] = {}  # of a value, the places that read it
        labels = [""] * len(self._nodes)
        names = {-1: EMBEDDING, self._head: HEAD, **{place: path for path, place in self._order.items()}}
        for i in reversed(range(len(self._nodes))):
            node, place = self._nodes[i], self._found[i]
            if place is None:  # computed from no token: where it is read, if that is one place
                read = set().union(*(readers.get(name, set()) for name in node.outputs))
                labels[i] = names[next(iter(read))] if len(read) == 1 else SHARED
            else:
                read, labels[i] = {place}, names[place]
            for name in filter(None, node.inputs):
                readers.setdefault(name, set()).update(read)
        return labels

    def _forward(self) -> None:
        """Give each node that a token reaches its place."""
        heads, before = self._read_by_the_last(), self._before_layers()
        for node, mark in zip(self._nodes, self._marks, strict=True):
            place = self._reached(node)
            if mark is not None:
                place = self._order[mark]
            elif place == self._head - 1 and before.isdisjoint(node.outputs) and self._reads(node, heads):
                place = self._head
            self._found.append(place)
            if place is not None and node.op not in _SIZES:
                self._at |= dict.fromkeys(filter(None, node.outputs), place)

    def _reads(self, node: GraphNode, weights: frozenset[str]) -> bool:
        return any(weights & self._behind.get(name, _NONE) for name in node.inputs)

    def _before_layers(self) -> set[str]:
        """Values from which a node with a layer's name, or what a layer gives, is still to come."""
        found: set[str] = set()
        for node, mark in zip(reversed(self._nodes), reversed(self._marks), strict=True):
            if mark is not None or not found.isdisjoint(node.outputs) or any(map(self._end_of, node.outputs)):
                found.update(filter(None, node.inputs))
        return found

    def _reached(self, node: GraphNode) -> int | None:
        """The furthest of what a node reads; None if it reads nothing that comes from a token."""
        found = [self._at[name] + self._ends(name) for name in node.inputs if name in self._at]
        if _INPUT in node.inputs and node.op not in _SIZES:
            found.append(-1)
        return min(max(found), self._head) if found else None

    def _ends(self, name: str) -> bool:
        """Whether a value is what a layer gives to the next, so that what reads it is of the next."""
        return self._at[name] == self._order.get(self._end_of(name))

    def _end_of(self, name: str) -> str:
        """The layer that gives a value; none: an empty text."""
        path = name.removeprefix(self._prefix)
        return path if self._prefix and path != name else ""

    def _read_by_the_last(self) -> frozenset[str]:
        """Weights that nothing reads from the first layer's first node up to the last layer's: the head's own."""
        marked = [i for i, mark in enumerate(self._marks) if mark is not None]
        last = next(i for i in marked if self._order[str(self._marks[i])] == self._head - 1)
        between = {name for node in self._nodes[marked[0] : last] for name in node.inputs}
        return frozenset().union(*self._behind.values()) - between


def _is_weight(tensor: Message) -> bool:
    return tensor.get("data_type", 0) not in _COUNTS and math.prod(tensor.get("dims", ())) > 1


def _texts(values: Sequence[bytes]) -> tuple[str, ...]:
    try:
        return tuple(map(bytes.decode, values))
    except UnicodeDecodeError:
        return tuple(map(_text, values))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
