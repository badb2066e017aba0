"""What a bundle's graph may be: operators of its target, shallow, without a number in it that asks for the memory.

This is no proof that a graph is harmless: sizes that depend on its inputs are known only when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from edgellm_runtime.graphs.operators import BODY, TARGETS, allowed, misfit
from edgellm_runtime.graphs.wire import Message
from edgellm_runtime.graphs.writer import ELEMENT_TYPES
from edgellm_runtime.spec import Signature

__all__ = ["check_interface", "check_rules"]

_MAX_NODES = 200_000
_MAX_ELEMENTS = 1 << 28  # of a tensor whose size stands in the graph
_MAX_INLINE = 1 << 20  # numbers inside the graph; larger tensors are beside it
_MAX_RANK = 8
_INT64, _STRING = 7, 8
_UNUSED = ("functions", "training_info", "configuration")
_GRAPH_UNUSED = ("sparse_initializer", "quantization_annotation")

# Operators that make more numbers than they read, and the inputs that say how many.
_SIZES: Mapping[str, tuple[int, ...]] = {
    "ConstantOfShape": (0,), "Expand": (1,), "Tile": (1,), "Pad": (1,), "OneHot": (1,), "Range": (0, 1, 2),
}  # fmt: skip


def check_rules(model: Message, target: str) -> None:
    """Refuse what no exporter of ours writes.

    Args:
        model: from :func:`~edgellm_runtime.graphs.onnx_file.read_model`.
        target: what the manifest says that it was made for.

    Raises:
        ValueError: names the operator, the attribute or the tensor.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not known; there are {', '.join(TARGETS)}")
    if used := [name for name in _UNUSED if model.get(name)]:
        raise ValueError(f"it has {used[0]}, which no bundle needs")
    graph = model.get("graph")
    if graph is None:
        raise ValueError("it has no graph")
    known = _constants(graph)
    _check_graph(graph, target, known, inside="")


def check_interface(model: Message, signature: Signature) -> None:
    """Refuse a graph whose inputs or outputs are of another type or size than the signature's of that name.

    Raises:
        ValueError: names the tensor, and both.
    """
    told = {t.name: (t.dtype, t.shape) for t in (*signature.inputs, *signature.outputs)}
    for spec in signature.state:
        told |= {spec.past_name: (spec.dtype, spec.shape), spec.present_name: (spec.dtype, spec.shape)}
    for value in (*model["graph"].get("input", ()), *model["graph"].get("output", ())):
        name, tensor = _text(value.get("name", b"")), value.get("type", {}).get("tensor_type")
        if name not in told:  # the session's own names are compared later, with those of what it can be given
            continue
        dtype, shape = told[name]
        if tensor is None or tensor.get("elem_type", 0) != ELEMENT_TYPES[dtype]:
            raise ValueError(f"{name} is not of {dtype}, as the manifest says")
        sizes = [dim.get("dim_value") for dim in tensor.get("shape", {}).get("dim", ())]
        if "shape" in tensor and (
            len(sizes) != len(shape)
            or any(a is not None and isinstance(b, int) and a != b for a, b in zip(sizes, shape, strict=True))
        ):
            raise ValueError(f"{name} has sizes {sizes}, and {list(shape)} in the manifest")


def _check_graph(graph: Message, target: str, known: dict[bytes, list[int]], inside: str) -> None:
    if used := [name for name in _GRAPH_UNUSED if graph.get(name)]:
        raise ValueError(f"it has {used[0]}, which no bundle needs")
    nodes = graph.get("node", ())
    if len(nodes) > _MAX_NODES:
        raise ValueError(f"{len(nodes)} operators are more than the {_MAX_NODES} that a graph may have")
    for tensor in graph.get("initializer", ()):
        _check_tensor(tensor)
    for node in nodes:
        _check_node(node, target, known, inside)


def _check_node(node: Message, target: str, known: dict[bytes, list[int]], inside: str) -> None:
    domain, name = _text(node.get("domain", b"")), _text(node.get("op_type", b""))
    called = f"{domain}::{name}" if domain else name
    ranges = allowed(target, domain, name)
    if ranges is None:
        raise ValueError(f"operator {called} is none that a graph for target {target} may have")
    if "overload" in node:
        raise ValueError(f"operator {called} has an overload")
    for attribute in node.get("attribute", ()):
        if wrong := misfit(attribute, ranges):
            raise ValueError(f"operator {called} has {wrong}, outside what it may have")
        if "t" in attribute:
            _check_tensor(attribute["t"])
        elif "g" in attribute:
            if inside or ranges.get(_text(attribute["name"])) is not BODY:
                raise ValueError(f"operator {called} within {inside or called}: loops are not nested")
            body = attribute["g"]
            _check_graph(body, target, {**known, **_constants(body)}, called)
    if name in _SIZES:
        _check_sizes(node, called, known)


def _check_tensor(tensor: Message) -> None:
    name, dims = _text(tensor.get("name", b"")), tensor.get("dims", [])
    if tensor.get("data_type", 0) in (0, _STRING) or "segment" in tensor:
        raise ValueError(f"tensor {name!r} holds no numbers")
    if len(dims) > _MAX_RANK or any(size < 0 for size in dims):
        raise ValueError(f"tensor {name!r} has sizes {dims[:9]}")
    if "external_data" not in tensor and (count := math.prod(dims)) > _MAX_INLINE:
        raise ValueError(f"tensor {name!r} of {count} numbers is inside the graph; they belong beside it")


def _check_sizes(node: Message, called: str, known: Mapping[bytes, list[int]]) -> None:
    """A size that stands in the graph is one that memory can hold."""
    inputs: Sequence[bytes] = node.get("input", ())
    found = [known.get(inputs[i]) if i < len(inputs) else None for i in _SIZES[_text(node["op_type"])]]
    if called == "Range":
        if all(found) and None not in found:
            start, limit, delta = (values[0] for values in found if values)
            if delta == 0 or abs(limit - start) // abs(delta) > _MAX_ELEMENTS:
                raise ValueError(f"operator Range counts from {start} to {limit} by {delta}")
        return
    for values in found:
        sizes = [abs(v) for v in values or () if v]
        if math.prod(sizes) > _MAX_ELEMENTS:
            raise ValueError(f"operator {called} makes a tensor of sizes {(values or [])[:8]}; memory holds none")


def _constants(graph: Message) -> dict[bytes, list[int]]:
    """Name to numbers, of the small whole ones that stand in a graph."""
    found = {t.get("name", b""): values for t in graph.get("initializer", ()) if (values := list(_integers(t)))}
    for node in graph.get("node", ()):
        if node.get("op_type") == b"Constant" and node.get("output"):
            for attribute in node.get("attribute", ()):
                values = list(_integers(attribute["t"])) if "t" in attribute else list(attribute.get("ints", ()))
                values = [attribute["i"]] if "i" in attribute else values
                if values:
                    found[node["output"][0]] = values
    return found


def _integers(tensor: Message) -> Iterator[int]:
    if tensor.get("data_type") == _INT64 and math.prod(tensor.get("dims", [])) <= 2 * _MAX_RANK:
        raw = tensor.get("raw_data", b"")
        yield from (int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8))
        yield from tensor.get("int64_data", ())


def _text(value: bytes) -> str:
    return value[:100].decode("utf-8", "backslashreplace")
