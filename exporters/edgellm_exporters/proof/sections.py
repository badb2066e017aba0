"""A graph cut into sections that run one after the other, so that no more than one section's weights are in memory.

A cut falls between nodes where few values are needed on its other side; those become outputs of one section and inputs
of the next. Nothing here knows what a layer is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx
import onnx.helper

__all__ = ["Section", "sections_of"]


@dataclass(frozen=True)
class Section:
    """Some neighbouring nodes of a graph.

    Args:
        model: serialized; it reads weights from the files that the whole graph reads.
        inputs: names of what it needs: of the graph's inputs, and of what sections before it give.
        outputs: names of what it gives, in the order of its outputs.
        nbytes: of its weights.
    """

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nbytes: int


def sections_of(model: bytes, most: int, fetch: Collection[str] = ()) -> list[Section]:
    """Cut a graph.

    Args:
        model: serialized, its nodes in an order that can be run.
        most: bytes of a section's weights, unless one node's are more.
        fetch: names of values that some section must give besides the graph's outputs.

    Returns:
        The sections in their order; one where the graph is small or has no place to be cut at.
    """
    graph = _Graph(onnx.ModelProto.FromString(model), frozenset(fetch))
    found, start = [], 0
    while start < len(graph.nodes):
        stop = graph.stop(start, most)
        found.append(graph.section(start, stop))
        start = stop
    return found


class _Graph:
    """A graph's nodes apart from those that compute constants: these are computed in each section that needs them.

    A kernel prepares weights that are constants; of a weight that came from another section it would not know.
    """

    def __init__(self, model: onnx.ModelProto, fetch: frozenset[str]) -> None:
        self._model, graph = model, model.graph
        self._sizes = {tensor.name: _nbytes(tensor) for tensor in graph.initializer}
        self._asked = {value.name for value in graph.output} | fetch
        inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
        self._known = {value.name: value for value in (*graph.input, *graph.value_info, *inferred, *graph.output)}
        for node in graph.node:
            if node.op_type == "Concat" and node.output[0] in self._known:  # of products made in parts
                whole = self._known[node.output[0]].type.tensor_type.elem_type
                parts = (name for name in node.input if name not in self._known)
                self._known |= {name: onnx.helper.make_tensor_value_info(name, whole, None) for name in parts}
        self._makes: dict[str, onnx.NodeProto] = {}  # constants, by name
        self.nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            names = set(_reads(node))
            constant = names <= self._sizes.keys() | self._makes.keys() and self._asked.isdisjoint(node.output)
            if constant:
                self._makes |= dict.fromkeys(node.output, node)
            else:
                self.nodes.append(node)
        self._order = {id(node): place for place, node in enumerate(graph.node)}

    @cached_property
    def _last_use(self) -> Mapping[str, int]:
        return {name: place for place, node in enumerate(self.nodes) for name in _reads(node)}

    @cached_property
    def _crossing(self) -> Sequence[Sequence[str]]:
        """For each node, the values that are made by it and those before it, and read after it."""
        found, alive = [], list[str]()
        for place, node in enumerate(self.nodes):
            alive = [name for name in (*alive, *node.output) if self._last_use.get(name, -1) > place]
            found.append(tuple(alive))
        return found

    def stop(self, start: int, most: int) -> int:
        """Where a section ends that begins at a node: the place of the first node that is not in it."""
        held, enough, last = set[str](), list[int](), len(self.nodes)
        for place in range(start, len(self.nodes)):
            held |= self._weights(self.nodes[place])
            nbytes = sum(self._sizes[name] for name in held)
            if nbytes > most and place > start:
                last = place
                break
            enough += [place] if 2 * nbytes > most else []
        if last == len(self.nodes):
            return last
        for places in (enough, range(start, last)):
            if able := [place for place in places if self._can_end(place)]:
                return 1 + min(able, key=lambda place: (len(self._crossing[place]), -place))
        final = len(self.nodes) - 1
        return 1 + next((place for place in range(last, final) if self._can_end(place)), final)

    def _can_end(self, place: int) -> bool:
        """Whether a section may end with a node: of all that crosses there, the type is known."""
        return all(name in self._known for name in self._crossing[place])

    def _weights(self, node: onnx.NodeProto) -> set[str]:
        """The initializers that a node reads, itself or by the constants that it reads."""
        found = set[str]()
        for name in _reads(node):
            if name in self._sizes:
                found.add(name)
            elif name in self._makes:
                found |= self._weights(self._makes[name])
        return found

    def _constants(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nodes that make the constants that a node reads."""
        for name in _reads(node):
            if name in self._makes:
                yield self._makes[name]
                yield from self._constants(self._makes[name])

    def section(self, start: int, stop: int) -> Section:
        """The nodes from one place to another, as a model."""
        own = self.nodes[start:stop]
        every = {id(node): node for node in (*own, *(made for node in own for made in self._constants(node)))}
        nodes = sorted(every.values(), key=lambda node: self._order[id(node)])
        weights = set[str]().union(*map(self._weights, own))
        made = {name for node in nodes for name in node.output}
        outside = dict.fromkeys(name for node in nodes for name in _reads(node))
        inputs = tuple(name for name in outside if name not in made and name not in self._sizes)
        outputs = tuple(
            name for node in own for name in node.output if name in self._asked or self._last_use.get(name, -1) >= stop
        )  # fmt: skip
        model, graph = onnx.ModelProto(), self._model.graph
        model.CopyFrom(_without_content(self._model))
        model.graph.name = graph.name
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in weights)
        model.graph.input.extend(self._value(name) for name in inputs)
        model.graph.output.extend(self._value(name) for name in outputs)
        model.graph.value_info.extend(v for v in graph.value_info if v.name in made | weights and v.name not in outputs)
        return Section(model.SerializeToString(), inputs, outputs, sum(self._sizes[name] for name in weights))

    def _value(self, name: str) -> onnx.ValueInfoProto:
        return self._known.get(name) or onnx.ValueInfoProto(name=name)


def _without_content(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model's versions and functions."""
    found = onnx.ModelProto(ir_version=model.ir_version)
    found.opset_import.extend(model.opset_import)
    found.functions.extend(model.functions)
    return found


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The names of what a node reads from around it, those that its branches and loops read too."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            for each in graph.node:
                yield from (name for name in _reads(each) if name not in inside)
                inside.update(each.output)
            yield from (value.name for value in graph.output if value.name not in inside)


def _nbytes(tensor: onnx.TensorProto) -> int:
    outside = {entry.key: entry.value for entry in tensor.external_data}
    return int(outside["length"]) if "length" in outside else tensor.ByteSize()
