"""A graph as rules for its nodes look at it: who makes a value, who reads it, and what is known before it runs."""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgellm_runtime.errors import BundleError
from edgellm_runtime.graphs.layer_map import GraphNode, graph_nodes
from edgellm_runtime.graphs.onnx_file import nodes_of
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import ELEMENT_TYPES

__all__ = ["Constant", "GraphView", "nodes_as_they_should_be"]

_TYPES = {number: dtype for dtype, number in ELEMENT_TYPES.items()}
_LAYOUTS = {"float32": "f", "int64": "q", "int32": "i", "uint8": "B", "int8": "b"}
_LISTS = {"float32": "float_data", "int64": "int64_data", **dict.fromkeys(("int32", "uint8", "int8"), "int32_data")}
_NOBODY: set[int] = set()
_SAME_NUMBERS = ("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Identity")


@contextmanager
def nodes_as_they_should_be() -> Iterator[None]:
    """Look at a graph's nodes, each as its operator has inputs and outputs.

    Raises:
        BundleError: a node has others.
    """
    try:
        yield
    except (ValueError, IndexError) as error:
        raise BundleError(
            "a node of the graph has other inputs or outputs than its operator; export the bundle again"
        ) from error


@dataclass(frozen=True)
class Constant:
    """What is known of a tensor before a graph runs.

    Args:
        dtype: of its elements.
        size: how many they are.
        dims: of an initializer or what is cast from one; None where a node has given it another shape.
    """

    dtype: str
    size: int
    dims: tuple[int, ...] | None


class GraphView:
    """The graph of a model.

    Args:
        model: from :func:`~edgellm_runtime.graphs.onnx_file.read_model`.
        keep: names of values that must stay, beside the graph's outputs.
    """

    def __init__(self, model: Message, keep: Collection[str] = ()) -> None:
        graph: Message = model["graph"]
        self._messages: list[Message] = graph.get("node", [])
        self._domains = [_text(message.get("domain", b"")) for message in self._messages]
        self._tensors = {_text(tensor.get("name", b"")): tensor for tensor in graph.get("initializer", ())}
        self.nodes = graph_nodes(model)
        self._makers = {name: i for i, node in enumerate(self.nodes) for name in node.outputs if name}
        self._readers: dict[str, set[int]] = defaultdict(set)
        for i, node in enumerate(self.nodes):
            for name in node.inputs:
                self._readers[name].add(i)
        self.gives = [_text(value.get("name", b"")) for value in graph.get("output", ())]
        self._kept = {*keep, *self.gives}
        bodies = [i for i, node in enumerate(self.nodes) if node.body]
        for i in bodies:  # what is read inside of loops and branches
            inner = (node for part in self._messages[i]["attribute"] for node in nodes_of(part, "attribute"))
            for name in (_text(name) for node in inner for name in node.get("input", ())):
                self._readers[name].add(i)
        self.constants = dict(self._constants())
        self._inputs = {_text(value.get("name", b"")): _described(value) for value in graph.get("input", ())}

    def branch(self, place: int, name: str) -> GraphView | None:
        """A graph inside of a node, which sees this one's constants; None where there is none, or one with its own."""
        attributes = self._messages[place].get("attribute", ())
        found = next((a["g"] for a in attributes if a.get("name") == name.encode() and "g" in a), None)
        if found is None or found.get("initializer") or found.get("input"):
            return None
        inner = GraphView({"graph": found})
        inner._tensors, inner.constants = self._tensors, self.constants
        return inner

    def domain(self, place: int) -> str:
        """Of a node's operator."""
        return self._domains[place]

    def attributes(self, place: int) -> dict[str, float | str | None]:
        """Of a node, those that are numbers or texts; None for others."""
        found: dict[str, float | str | None] = {}
        for attribute in self._messages[place].get("attribute", ()):
            value = next((attribute[key] for key in ("i", "f", "s") if key in attribute), None)
            found[_text(attribute.get("name", b""))] = _text(value) if isinstance(value, bytes) else value
        return found

    def whole_numbers(self, place: int, name: str) -> tuple[int, ...]:
        """A node's attribute that is a list of whole numbers; none where it is not there."""
        attributes = self._messages[place].get("attribute", ())
        return tuple(next((a["ints"] for a in attributes if a.get("name") == name.encode() and "ints" in a), ()))

    def input(self, name: str) -> Constant | None:
        """What is known of an input of the graph that is a tensor; sizes that are free are 0."""
        return self._inputs.get(name)

    def tensor_attribute(self, place: int, name: str) -> bytes | None:
        """The bytes of a node's attribute that is a tensor."""
        attributes = self._messages[place].get("attribute", ())
        found = next((a["t"] for a in attributes if a.get("name") == name.encode() and "t" in a), None)
        data: bytes | None = None if found is None else found.get("raw_data")
        return data

    def made_by(self, name: str, op: str, domain: str = "") -> int | None:
        """The place of the node that makes a value, if it is of that operator."""
        place = self._makers.get(name)
        same = place is not None and (self.nodes[place].op, self.domain(place)) == (op, domain)
        return place if same else None

    def readers(self, name: str) -> frozenset[int]:
        """The places of the nodes that read a value."""
        return frozenset(self._readers.get(name, ()))

    def only_reader(self, name: str, op: str, domain: str = "") -> int | None:
        """The place of the one node that reads a value, if it is of that operator and nothing else needs the value."""
        readers = self.readers(name)
        place = next(iter(readers)) if len(readers) == 1 and self.inner(name, readers) else None
        same = place is not None and (self.nodes[place].op, self.domain(place)) == (op, domain)
        return place if same else None

    def inner(self, name: str, readers: Collection[int]) -> bool:
        """Whether nothing but these nodes needs a value."""
        return name not in self._kept and self._readers.get(name, _NOBODY).issubset(readers)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """The elements of an initializer that is in the graph itself; None of others."""
        tensor = self._tensors.get(name)
        if tensor is None or "external_data" in tensor:
            return None
        dtype, size = _TYPES.get(tensor.get("data_type", 0), ""), math.prod(tensor.get("dims", ()))
        if (listed := tensor.get(_LISTS.get(dtype, ""))) is not None:
            return tuple(listed) if len(listed) == size else None
        layout, data = _LAYOUTS.get(dtype), tensor.get("raw_data", b"")
        if layout is None or len(data) != size * struct.calcsize(layout):
            return None
        return struct.unpack(f"<{size}{layout}", data)

    def sizes(self, name: str) -> tuple[int, ...] | None:
        """The elements of an initializer of int64 that is in the graph itself; None of others."""
        given, numbers = self.constants.get(name), self.numbers(name)
        return (
            tuple(map(int, numbers)) if given is not None and given.dtype == "int64" and numbers is not None else None
        )

    def uncast(self, name: str) -> tuple[str, frozenset[int]]:
        """The float16 initializer that a constant is cast from, and the cast's place; else the constant itself."""
        place = self.made_by(name, "Cast")
        source = "" if place is None else self.node(place).inputs[0]
        if place is None or source not in self._tensors or self.constants[source].dtype != "float16":
            return name, frozenset()
        return source, frozenset([place])

    def _constants(self) -> Iterator[tuple[str, Constant]]:
        found: dict[str, Constant] = {}
        for name, tensor in self._tensors.items():
            dims = tuple(int(size) for size in tensor.get("dims", ()))
            found[name] = Constant(_TYPES.get(tensor.get("data_type", 0), ""), math.prod(dims), dims)
        for place, node in enumerate(self.nodes):
            first = found.get(node.inputs[0]) if node.inputs else None
            if first is None or self.domain(place) or not node.outputs:
                continue
            if node.op == "Cast":
                found[node.outputs[0]] = Constant(_TYPES.get(node.numbers.get("to", 0), ""), first.size, first.dims)
            elif node.op in _SAME_NUMBERS and all(name in found for name in node.inputs if name):
                found[node.outputs[0]] = Constant(first.dtype, first.size, None)
        yield from found.items()

    def node(self, place: int) -> GraphNode:
        """The node at a place."""
        return self.nodes[place]


def _described(value: Message) -> Constant:
    tensor = value.get("type", {}).get("tensor_type", {})
    dims = tuple(int(dim.get("dim_value", 0)) for dim in tensor.get("shape", {}).get("dim", ()))
    return Constant(_TYPES.get(tensor.get("elem_type", 0), ""), math.prod(dims), dims)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "backslashreplace")
