"""Which files a graph reads: held against the onnx package, which reads protocol buffers as ONNX Runtime does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgellm_runtime.graphs.external_files import ELEMENT_BITS, external_files
from edgellm_runtime.graphs.onnx_file import FIELDS, MAX_GRAPH_BYTES


def split(data: bytes) -> Iterator[tuple[int, bytes | None]]:
    """Tag and content of each field, which are well formed; a number's content is None, its bytes are in the tag."""
    at = 0
    while at < len(data):
        start = at
        tag, at = number_at(data, at)
        if tag & 7 == 2:
            size, at = number_at(data, at)
            if at + size > len(data):
                raise ValueError
            yield tag, data[at : at + size]
            at += size
        elif tag & 7 == 0:
            value, at = number_at(data, at)
            yield tag | value << 64, None
        else:
            raise ValueError
        assert at > start


def number_at(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def whole(tag: int, content: bytes | None) -> bytes:
    return longer(tag & (1 << 64) - 1) + (longer(tag >> 64) if content is None else longer(len(content)) + content)


def longer(value: int, more: int = 0) -> bytes:
    """A number with so many more bytes than it takes."""
    out = bytearray()
    while value >= 0x80 or not out:
        out.append(value & 0x7F | (0x80 if value >= 0x80 else 0))
        value >>= 7
        if out[-1] < 0x80:
            break
    else:
        out.append(value)
    if more:
        out[-1] |= 0x80
        out += b"\x80" * (more - 1) + b"\x00"
    return bytes(out)


def field(tag: int, data: bytes) -> bytes:
    return longer(tag << 3 | 2) + longer(len(data)) + data


def number(tag: int, value: int) -> bytes:
    return longer(tag << 3) + longer(value)


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


def test_tables_are_those_of_onnx() -> None:
    """A field that a new onnx adds must be added to the table; a message that may hold tensors must be looked into."""
    kinds = {
        "model": onnx.ModelProto, "opset": onnx.OperatorSetIdProto, "training": onnx.TrainingInfoProto,
        "function": onnx.FunctionProto, "graph": onnx.GraphProto, "value": onnx.ValueInfoProto,
        "node": onnx.NodeProto, "attribute": onnx.AttributeProto, "sparse": onnx.SparseTensorProto,
        "tensor": onnx.TensorProto, "entry": onnx.StringStringEntryProto,
        "type": onnx.TypeProto, "tensor_type": onnx.TypeProto.Tensor, "shape": onnx.TensorShapeProto,
        "dim": onnx.TensorShapeProto.Dimension,
    }  # fmt: skip
    names = {proto.DESCRIPTOR.full_name: kind for kind, proto in kinds.items()}
    scalars = {1: "double", 2: "float", 3: "int", 4: "uint64", 5: "int32", 9: "bytes", 12: "bytes", 14: "int32"}
    assert kinds.keys() == FIELDS.keys()
    for kind, proto in kinds.items():
        for field in proto.DESCRIPTOR.fields:
            inner = field.message_type
            holds = scalars[field.type] if inner is None else names.get(inner.full_name, "opaque")
            name, told = FIELDS[kind][field.number].split()
            assert name == field.name
            if told.removeprefix("*") == "opaque":
                assert not reaches_a_tensor(inner, set()), f"{kind}.{name}"
                holds = "opaque"
            assert told == ("*" if field.is_repeated else "") + holds, f"{kind}.{name}"
        assert len(FIELDS[kind]) == len(proto.DESCRIPTOR.fields)


def reaches_a_tensor(message: Any, seen: set[str]) -> bool:
    if message.full_name in seen:
        return False
    seen.add(message.full_name)
    inner = [field.message_type for field in message.fields if field.message_type is not None]
    return message.full_name == "onnx.TensorProto" or any(reaches_a_tensor(m, seen) for m in inner)


def test_element_sizes_are_those_of_onnx() -> None:
    for number, bits in ELEMENT_BITS.items():
        name = TensorProto.DataType.Name(number)
        size = helper.tensor_dtype_to_np_dtype(number).itemsize * 8
        assert bits == ({"4": 4, "2": 2}.get(name.removesuffix("E2M1")[-1], size) if bits < 8 else size), name


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
    graph = field(5, field(13, field(1, b"location") + field(2, b"outside")))
    for _ in range(30):  # a graph's node's attribute's graph
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(ValueError, match="nested too deeply"):
        external_files(field(7, graph))


def entry(*fields: bytes) -> bytes:
    """A model with one tensor in a file, whose ``external_data`` is these fields."""
    return field(7, field(5, field(13, b"".join(fields)) + number(14, 1)))


LOCATION, LISTED = field(1, b"location"), field(2, b"model.onnx.data")


@pytest.mark.parametrize(
    ("trick", "data"),
    [
        ("a third field that other readers skip", entry(LOCATION, field(2, b"secret"), field(3, b"model.onnx.data"))),
        ("a value that comes twice", entry(LOCATION, LISTED, field(2, b"secret"))),
        ("a key that comes twice", entry(field(1, b"offset"), field(2, b"secret"), LOCATION)),
        ("two places", field(7, field(5, 2 * field(13, LOCATION + LISTED) + number(14, 1)))),
        ("a tag of five bytes", b"\xba\x80\x80\x80\x00" + field(7, b"")[1:]),
        ("a length of two bytes", b"\x3a\x80\x00"),
        ("a graph in two pieces", 2 * field(7, field(2, b"g"))),
        ("a group", bytes([7 << 3 | 3, 7 << 3 | 4])),
        ("a graph that is a number", number(7, 1)),
        ("field 0", b"\x02\x00"),
        ("an element type whose upper half others cut off", field(7, field(5, number(2, (1 << 32) + 1)))),
        ("a place that is not said to be in a file", field(7, field(5, field(13, LOCATION + LISTED)))),
        ("no place", field(7, field(5, number(14, 1)))),
        ("a key that is not known", entry(field(1, b"checksum"), field(2, b"0"))),
        ("an offset that is none", field(7, field(5, field(13, LOCATION + LISTED) + number(14, 1)
         + field(13, field(1, b"offset") + field(2, b"-1"))))),
    ],
)  # fmt: skip
def test_bytes_with_two_readings_are_refused(trick: str, data: bytes) -> None:
    with pytest.raises(ValueError):
        external_files(data)


def test_oversized_graph_is_not_read() -> None:
    with pytest.raises(ValueError, match="more than the"):
        external_files(bytes(MAX_GRAPH_BYTES + 1))


def read_by_onnx(message: Any) -> Iterator[str]:
    """Every place that onnx and ONNX Runtime would open, by onnx's own description of its format."""
    if isinstance(message, TensorProto) and message.data_location == TensorProto.EXTERNAL:
        places = [e.value for e in message.external_data if e.key == "location"]
        yield places[-1] if places else ""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for inner in value if descriptor.is_repeated else [value]:
                yield from read_by_onnx(inner)


EVERYWHERE = model(
    [branch("a"), helper.make_node("Constant", [], ["c"], sparse_value=sparse("b"))], [tensor("c")],
    [function("d"), function("e", default=True)], sparse_initializer=[sparse("f")],
)  # fmt: skip
del EVERYWHERE.graph.node[0].attribute[1]
DATA = EVERYWHERE.SerializeToString()
PAIRS = st.tuples(st.sampled_from([b"location", b"offset", b"length"]), st.sampled_from([b"a", b"secret", b"0"]))
TAGS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 20, 22, 23, 25, 99])


def rewritten(draw: st.DrawFn, data: bytes, depth: int = 0) -> bytes:
    """A message's fields in other forms: pieces, repeats, longer numbers, other fields between."""
    fields = list(split(data))
    if fields is None or not fields:
        return data
    at = draw(st.integers(0, len(fields) - 1))
    tag, content = fields[at]
    act = draw(st.integers(0, 11))
    if content is not None and act < 5 and depth < 12:
        written = [field(tag >> 3, rewritten(draw, content, depth + 1))]
    elif content is not None and act == 5:
        cut = draw(st.integers(0, len(content)))
        written = [field(tag >> 3, content[:cut]), field(tag >> 3, content[cut:])]
    elif content is not None and act == 6:
        written = [longer(tag, draw(st.integers(1, 6))) + longer(len(content), draw(st.integers(0, 3))) + content]
    elif act == 7:
        written = [whole(tag, content), field(draw(TAGS), draw(st.sampled_from([b"", LOCATION + LISTED, b"x"])))]
    elif act == 8:
        written = [whole(tag, content), number(draw(TAGS), draw(st.integers(0, 1)))]
    elif act == 9:
        key, value = draw(PAIRS)
        written = [field(13, field(1, key) + field(2, value)), whole(tag, content)]
    elif act == 10:
        written = [bytes([tag & 0x78 | 3]), whole(tag, content), bytes([tag & 0x78 | 4])]
    else:
        written = [whole(tag, content)] * 2
    return b"".join([*(whole(*f) for f in fields[:at]), *written, *(whole(*f) for f in fields[at + 1 :])])


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_place_that_onnx_would_open_is_found_or_the_graph_refused(data: st.DataObject) -> None:
    def changed(draw: st.DrawFn) -> bytes:
        made = DATA
        for _ in range(draw(st.integers(0, 3))):
            with suppress(ValueError, IndexError):
                made = rewritten(draw, made)
        if draw(st.booleans()):
            spoiled = bytearray(made)
            for _ in range(draw(st.integers(1, 3))):
                spoiled[draw(st.integers(0, len(spoiled) - 1))] ^= 1 << draw(st.integers(0, 7))
            made = bytes(spoiled)
        return made

    made = data.draw(st.composite(changed)())
    try:
        found, opened = external_files(made), onnx.ModelProto.FromString(made)
    except (ValueError, DecodeError):  # refused here, or there for what is inside a type or a note
        return
    assert set(read_by_onnx(opened)) <= found


def test_untouched_model_is_read_whole() -> None:
    assert external_files(DATA) == set("abcdef") == set(read_by_onnx(EVERYWHERE))
