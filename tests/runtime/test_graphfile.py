from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgellm_runtime.graphs.external_files import _FIELDS, external_files


def tensor(location: str) -> TensorProto:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="offset", value="0")
    made.external_data.add(key="location", value=location)
    return made


def model(
    nodes: Sequence[Any] = (), initializers: Sequence[Any] = (), functions: Sequence[Any] = (), **graph: Any
) -> onnx.ModelProto:
    made = helper.make_graph(nodes, "g", [], [], initializer=initializers, **graph)
    return helper.make_model(made, functions=functions)


def branch(location: str) -> onnx.NodeProto:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor(location))], "b", [], [])
    return helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)


def function(location: str, *, default: bool = False) -> onnx.FunctionProto:
    constant = helper.make_node("Constant", [], ["c"], value=tensor(location))
    made = onnx.FunctionProto(name="f", domain="d")
    if default:
        made.attribute_proto.add(name="a", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor(location))
    else:
        made.node.append(constant)
    return made


def sparse(location: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=tensor(location), dims=[4])


@pytest.mark.parametrize(
    ("place", "made"),
    [
        ("initializer", lambda at: model(initializers=[tensor(at)])),
        ("sparse initializer", lambda at: model(sparse_initializer=[sparse(at)])),
        ("attribute", lambda at: model([helper.make_node("Constant", [], ["c"], value=tensor(at))])),
        ("sparse attribute", lambda at: model([helper.make_node("Constant", [], ["c"], sparse_value=sparse(at))])),
        ("list attribute", lambda at: model([helper.make_node("X", [], ["c"], many=[tensor(at), tensor(at)])])),
        ("branch", lambda at: model([branch(at)])),
        ("function", lambda at: model(functions=[function(at)])),
        ("function's default", lambda at: model(functions=[function(at, default=True)])),
    ],
)
def test_external_file_is_found_wherever_a_tensor_may_be(place: str, made: Any) -> None:
    assert external_files(made("../../outside").SerializeToString()) == {"../../outside"}


def test_walk_covers_every_way_from_a_model_to_a_tensor() -> None:
    """Against onnx's own description of its format: a new field that may hold tensors must be added to the table."""
    kinds = {
        "model": onnx.ModelProto, "training": onnx.TrainingInfoProto, "function": onnx.FunctionProto,
        "graph": onnx.GraphProto, "sparse": onnx.SparseTensorProto, "node": onnx.NodeProto,
        "attribute": onnx.AttributeProto, "tensor": onnx.TensorProto, "external": onnx.StringStringEntryProto,
    }  # fmt: skip
    names = {proto.DESCRIPTOR.full_name: kind for kind, proto in kinds.items() if kind != "external"}
    for kind, proto in kinds.items():
        fields = {f.number: names[f.message_type.full_name] for f in proto.DESCRIPTOR.fields
                  if f.message_type is not None and f.message_type.full_name in names}  # fmt: skip
        if kind == "tensor":
            fields[proto.DESCRIPTOR.fields_by_name["external_data"].number] = "external"
        assert _FIELDS[kind] == fields, kind


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x3a\xff\xff\xff\xff\x0f")  # a graph longer than the file
@example(b"\x3a" * 200)
@example(bytes([7 << 3 | 3]))  # a group, which no graph has
def test_garbage_gives_a_value_error_or_a_set(data: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(external_files(data), set)


@given(cut=st.integers(0, 10_000), flip=st.integers(0, 10_000))
def test_damaged_graph_gives_a_value_error_or_a_set(cut: int, flip: int) -> None:
    data = bytearray(model([branch("weights.bin")], [tensor("model.onnx.data")]).SerializeToString())
    data[flip % len(data)] ^= 0x55
    with suppress(ValueError):
        assert isinstance(external_files(bytes(data[: cut % (len(data) + 1)])), set)


def test_deep_nesting_is_refused() -> None:
    graph = _field(5, _field(13, _field(1, b"location") + _field(2, b"outside")))
    for _ in range(30):  # a graph's node's attribute's graph
        graph = _field(1, _field(5, _field(6, graph)))
    with pytest.raises(ValueError, match="nested too deeply"):
        external_files(_field(7, graph))


def _field(number: int, data: bytes) -> bytes:
    length, size = b"", len(data)
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data
