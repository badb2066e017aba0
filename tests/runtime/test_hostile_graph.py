"""Bundles whose manifest vouches for a graph that means harm: refused before another parser than ours sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnx import TensorProto, helper
from test_external_files import LOCATION, field, number
from tiny_bundles import attention_bundle, copied, edit_manifest, recurrent_bundle, sign

from edgellm_runtime import BundleError, load


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return copied(recurrent_bundle(), tmp_path)


def refusal_of(bundle: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        load(bundle, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def graph_of(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def put(bundle: Path, graph: onnx.ModelProto | bytes) -> None:
    """A graph that the manifest vouches for."""
    data = graph if isinstance(graph, bytes) else graph.SerializeToString()
    (bundle / "model.onnx").write_bytes(data)
    sign(bundle, "model.onnx")


def stored(location: str, *dims: int, offset: int = 0, kind: int = TensorProto.FLOAT) -> TensorProto:
    made = TensorProto(name="w", data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=location)
    made.external_data.add(key="offset", value=str(offset))
    return made


def test_third_field_does_not_hide_the_place_that_protobuf_reads(bundle: Path) -> None:
    hidden = field(13, LOCATION + field(2, b"/etc/passwd") + field(3, b"model.onnx.data")) + number(14, 1)
    put(bundle, (bundle / "model.onnx").read_bytes() + field(7, field(5, hidden)))
    assert "entry holds field 3 of wire type 2, which is not known" in refusal_of(bundle)


def test_tag_of_five_bytes_does_not_hide_a_graph(bundle: Path) -> None:
    graph = field(7, field(5, stored("/etc/passwd", 4).SerializeToString()))
    put(bundle, b"\xba\x80\x80\x80\x00" + graph[1:])
    assert "a number is written longer than it is" in refusal_of(bundle)


@pytest.mark.parametrize("name", ["manifest.json", "unlisted", "Manifest.json"])
def test_manifest_and_unlisted_files_are_not_read_as_weights(bundle: Path, name: str) -> None:
    (bundle / "unlisted").write_bytes(bytes(64))
    graph = graph_of(bundle)
    graph.graph.initializer.append(stored(name, 4))
    put(bundle, graph)
    assert f"reads ['{name}'], which the manifest does not list; refusing to follow" in refusal_of(bundle)


@pytest.mark.parametrize("name", ["goldens.json", "model.onnx"])
def test_files_of_another_meaning_are_not_read_as_weights(bundle: Path, name: str) -> None:
    graph = graph_of(bundle)
    graph.graph.initializer.append(stored(name, 4))
    put(bundle, graph)
    assert f"reads ['{name}'] as weights, which are none" in refusal_of(bundle)


@pytest.mark.parametrize("name", ["Manifest.json", "MANIFEST.JSON", "Model.onnx"])
def test_name_that_some_disks_take_for_another_is_refused(bundle: Path, name: str) -> None:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files=files | {name: {"bytes": 1, "sha256": ""}})
    message = refusal_of(bundle)
    assert "is not a plain name inside the bundle" in message or "differ in capital letters only" in message


def test_terabyte_of_nothing_after_the_weights_is_not_read(bundle: Path) -> None:
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: nothing is stored
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files=files | {"model.onnx.data": {"bytes": 1 << 40, "sha256": "0" * 64}})
    assert "1099511627776 bytes, of which the graph reads the first" in refusal_of(bundle)


def test_terabytes_of_nothing_that_the_graph_asks_for_are_not_read(bundle: Path) -> None:
    graph = graph_of(bundle)
    graph.graph.initializer.append(stored("model.onnx.data", 1 << 41))
    put(bundle, graph)
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.truncate(1 << 43)  # a hole: nothing is stored
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files=files | {"model.onnx.data": {"bytes": 1 << 43, "sha256": "0" * 64}})
    assert "weights of 8796 GB are more than 8 times this machine's memory" in refusal_of(bundle)


def test_weights_that_are_read_a_thousand_times_over_are_refused(bundle: Path) -> None:
    graph = graph_of(bundle)
    size = (bundle / "model.onnx.data").stat().st_size
    for i in range(1000):
        graph.graph.initializer.append(stored("model.onnx.data", size // 4))
        graph.graph.initializer[-1].name = f"again{i}"
    put(bundle, graph)
    assert f"{size} bytes are read as" in refusal_of(bundle)


def test_graph_that_is_not_named_as_one_is_not_handed_to_other_parsers(tmp_path: Path) -> None:
    """ONNX Runtime takes a file by its name for a format of its own, whose files nobody checks."""
    bundle = copied(attention_bundle("cpu"), tmp_path)
    graphs = {"prefill": {"file": "prefill.ort", "time": 8}, "decode": {"file": "decode.onnx", "time": 1}}
    edit_manifest(bundle, graphs=graphs, capacity=1 << 20)
    assert "graph 'prefill.ort' is not named as one" in refusal_of(bundle)


def test_tensor_hidden_in_a_branch_of_a_function_is_found(bundle: Path) -> None:
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=stored("/etc/passwd", 4))], "b", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    graph = graph_of(bundle)
    graph.functions.add(name="f", domain="d").node.append(node)
    put(bundle, graph)
    assert "reads ['/etc/passwd'], which the manifest does not list" in refusal_of(bundle)


def with_node(bundle: Path, kind: str, inputs: list[str], domain: str = "", **attributes: Any) -> onnx.ModelProto:
    """The bundle's graph with one more operator, of which nothing comes."""
    graph = graph_of(bundle)
    graph.graph.node.append(helper.make_node(kind, inputs, ["unused"], domain=domain, **attributes))
    return graph


def test_gathernd_with_impossible_batch_dims_is_refused_and_ends_no_process(bundle: Path) -> None:
    """ONNX Runtime 1.32 ends the process over it, at load."""
    put(bundle, with_node(bundle, "GatherND", ["tokens", "logit_positions"], batch_dims=-(2**31)))
    assert "operator GatherND has batch_dims=-2147483648, outside what it may have" in refusal_of(bundle)


@pytest.mark.parametrize(
    ("kind", "domain", "named"),
    [
        ("Loop", "", "Loop"), ("Det", "", "Det"), ("StringNormalizer", "", "StringNormalizer"), ("Foo", "", "Foo"),
        ("RandomNormal", "", "RandomNormal"), ("FusedConv", "com.microsoft", "com.microsoft::FusedConv"),
        ("PyOp", "ai.onnx.contrib", "ai.onnx.contrib::PyOp"), ("Add", "com.microsoft", "com.microsoft::Add"),
    ],
)  # fmt: skip
def test_operator_outside_the_list_is_refused_by_name(bundle: Path, kind: str, domain: str, named: str) -> None:
    put(bundle, with_node(bundle, kind, ["tokens"], domain))
    assert f"operator {named} is none that a graph for target cpu may have" in refusal_of(bundle)


def test_kernels_of_one_target_are_refused_in_anothers_graph(bundle: Path) -> None:
    edit_manifest(bundle, target={"name": "onnx", "requires": {"onnxruntime": "1.30"}})
    assert (
        "com.microsoft::SkipSimplifiedLayerNormalization is none that a graph for target onnx may have"
        in refusal_of(bundle)
    )


@pytest.mark.parametrize(
    ("kind", "attributes", "wrong"),
    [
        ("Cast", {"to": 99}, "to=99"), ("Cast", {"to": 1}, "'w' holds no numbers"),
        ("Softmax", {"axis": 99}, "axis=99"),
        ("Softmax", {"axis": "x"}, "axis='x'"), ("Softmax", {"axes": 1.5}, "axes=1.5"),
        ("Transpose", {"perm": [0] * 65}, "'perm' of 65 values"), ("Add", {"axis": 0}, "attribute 'axis'"),
        ("Gelu", {"approximate": "x" * 999}, "approximate='xxx"), ("Attention", {"scale": float("nan")}, "scale=nan"),
        ("LSTM", {"hidden_size": 0}, "hidden_size=0"), ("Conv", {"strides": [0]}, "strides=[0]"),
    ],
)  # fmt: skip
def test_attribute_outside_its_range_is_refused_by_name(
    bundle: Path, kind: str, attributes: dict[str, Any], wrong: str
) -> None:
    graph = with_node(bundle, kind, ["tokens"], **attributes)
    if "numbers" in wrong:
        graph.graph.initializer.append(
            TensorProto(name="w", data_type=TensorProto.STRING, dims=[1], string_data=[b"x"])
        )
        graph.graph.node.pop()
    put(bundle, graph)
    assert wrong in refusal_of(bundle)


@pytest.mark.parametrize(
    ("kind", "sizes"), [("ConstantOfShape", [1 << 30]), ("Expand", [1 << 15, 1 << 15]), ("Tile", [1 << 40, 1])]
)
@pytest.mark.parametrize("place", ["initializer", "ints", "value"])
def test_tensor_of_gigabytes_whose_size_stands_in_the_graph_is_refused(
    bundle: Path, kind: str, sizes: list[int], place: str
) -> None:
    graph = with_node(bundle, kind, ["sizes"] if kind == "ConstantOfShape" else ["tokens", "sizes"])
    tensor = onnx.numpy_helper.from_array(np.array(sizes), "sizes")
    if place == "initializer":
        graph.graph.initializer.append(tensor)
    else:
        value = {"value_ints": sizes} if place == "ints" else {"value": tensor}
        graph.graph.node.append(helper.make_node("Constant", [], ["sizes"], **value))
    put(bundle, graph)
    assert f"operator {kind} makes a tensor of sizes {sizes}; memory holds none" in refusal_of(bundle)


def test_range_that_counts_for_hours_is_refused(bundle: Path) -> None:
    graph = with_node(bundle, "Range", ["a", "b", "c"])
    for name, value in (("a", 0), ("b", 10**12), ("c", 1)):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    put(bundle, graph)
    assert "operator Range counts from 0 to 1000000000000 by 1" in refusal_of(bundle)


def test_scan_within_a_scan_is_refused(bundle: Path) -> None:
    inner = helper.make_graph([], "inner", [], [])
    scan = helper.make_node("Scan", ["x"], ["y"], body=inner, num_scan_inputs=1)
    put(bundle, with_node(bundle, "Scan", ["tokens"], body=helper.make_graph([scan], "b", [], []), num_scan_inputs=1))
    assert "operator Scan within Scan: loops are not nested" in refusal_of(bundle)


def test_numbers_by_the_million_belong_beside_the_graph(bundle: Path) -> None:
    graph = graph_of(bundle)
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1 << 20) + 1, np.int8), "many"))
    put(bundle, graph)
    assert "tensor 'many' of 1048577 numbers is inside the graph" in refusal_of(bundle)


def test_sparse_tensors_functions_and_training_are_refused(bundle: Path) -> None:
    original = graph_of(bundle)
    for change, named in (
        (lambda m: m.functions.add(name="f"), "it has functions"),
        (lambda m: m.training_info.add(), "it has training_info"),
        (lambda m: m.graph.sparse_initializer.add(), "it has sparse_initializer"),
    ):
        graph = onnx.ModelProto.FromString(original.SerializeToString())
        change(graph)
        put(bundle, graph)
        assert named in refusal_of(bundle)


def test_every_graph_of_the_tiny_bundles_loads_on_every_target() -> None:
    for make in (attention_bundle, recurrent_bundle):
        for target in ("onnx", "cpu"):
            assert load(make(target), threads=1).session.width
