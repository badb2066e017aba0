"""Bundles whose manifest vouches for a graph that means harm: refused before another parser than ours sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
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
