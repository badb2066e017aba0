"""Weights of 3 bits: what a file holds of them, and the 4-bit codes that graphs make of it when they are loaded."""

from __future__ import annotations

import functools
import gc
import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from families import VOCAB, cpu_targets, make
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundles import sign

from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.quantize.plan import Scheme
from edgellm_runtime import BackendError, BundleError, open_session
from edgellm_runtime.backends.spread_codes import SpreadCodes, spread_codes
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.graphs.three_bits import condensed, spread
from edgellm_runtime.session import Session
from edgellm_runtime.state.memory_peak import memory_peak

METHOD, SCHEME = "3:32:asymmetric", Scheme(3, 32, symmetric=False)
UNPACKING = {"BitShift", "BitwiseAnd", "BitwiseOr"}


@functools.cache
def bundle(target: str) -> Bundle:
    loose = {"kl": 100.0, "split": 100.0, "batch": 100.0, "top1": 0.0, "state": 100.0}
    options = ExportOptions(target=target, quantize=METHOD, bounds=loose)
    return export(make("decoder"), Path(tempfile.mkdtemp()) / "b", options=options).bundle


@given(size=st.integers(1, 9), seed=st.integers(0, 99))
def test_bytes_of_small_codes_come_back_from_three_quarters_of_their_size(size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 8, (2, 4 * size)).astype(np.uint8)
    packed = codes[0] | codes[1] << 4
    stored = condensed(packed)
    assert 4 * stored.nbytes == 3 * packed.nbytes
    assert (spread(stored) == packed).all()


@pytest.mark.parametrize("target", cpu_targets())
def test_a_file_has_three_bits_for_each_code_and_what_the_format_says_in_all(target: str) -> None:
    tensors = {t.name: len(t.raw_data) for t in onnx.load(bundle(target).file(GRAPH)).graph.initializer}
    name, (rows, columns) = "layers.1.attention.o_proj.weight", (96, 128)
    parts = {part.rpartition(".")[2]: size for part, size in tensors.items() if part.startswith(f"{name}.")}
    assert parts.keys() == {"three_bits", "scales", "zeros"}
    assert parts["three_bits"] == rows * columns * 3 // 8
    assert sum(parts.values()) == SCHEME.nbytes(rows, columns)


@pytest.mark.parametrize("target", cpu_targets())
def test_nothing_of_unpacking_is_left_for_a_step(target: str, tmp_path: Path) -> None:
    graph, options = bundle(target).file(GRAPH), onnxruntime.SessionOptions()
    stored = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 3
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    run = {node.op_type for node in onnx.load(tmp_path / "run.onnx", load_external_data=False).graph.node}
    assert stored >= UNPACKING
    assert not run & UNPACKING


def logits(found: Bundle) -> np.ndarray:
    return logits_of(open_session(found, threads=1))


def logits_of(session: Session) -> np.ndarray:
    tokens = np.random.default_rng(4).integers(0, VOCAB, (1, 12))
    return session.step(tokens, session.new_state(capacity=12), logits="all").copy()


def test_codes_are_put_in_order_before_the_library_reads_a_graph_and_give_the_same_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = bundle("cpu")
    ready = spread_codes(found.file(GRAPH).read_bytes(), found.file(GRAPH).parent)
    left = {node.op_type for node in onnx.load_model_from_string(ready.graph).graph.node}
    assert not left & UNPACKING and "MatMulNBits" in left and len(ready.codes) >= 10
    ours = logits(found)
    monkeypatch.setattr("edgellm_runtime.backends.ort.spread_codes", lambda model, folder, keep: SpreadCodes(model))
    np.testing.assert_array_equal(ours, logits(found))


def test_codes_are_gone_when_a_session_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def watched(model: bytes, folder: Path, keep: tuple[str, ...]) -> SpreadCodes:
        ready = spread_codes(model, folder, keep)
        made.extend(weakref.ref(codes.base) for codes in ready.codes.values())
        return ready

    found = bundle("cpu")
    expected = logits(found)
    monkeypatch.setattr("edgellm_runtime.backends.ort.spread_codes", watched)
    session = open_session(found, threads=1)
    gc.collect()
    assert len(made) >= 10 and not any(array() is not None for array in made)
    filling = [np.full(1 << 20, 7, np.uint8) for _ in range(20)]  # where they were
    np.testing.assert_array_equal(logits_of(session), expected)
    del filling


def test_what_is_made_on_the_way_and_read_elsewhere_is_left_to_the_library() -> None:
    graph = bundle("cpu").file(GRAPH)
    model = onnx.load(graph, load_external_data=False)
    masked = {node.output[0] for node in model.graph.node if node.op_type == "BitwiseAnd"}
    concat = next(node for node in model.graph.node if node.op_type == "Concat" and node.input[0] in masked)
    model.graph.node.append(onnx.helper.make_node("Identity", [concat.output[0]], ["elsewhere"]))
    data = model.SerializeToString()
    assert spread_codes(data, graph.parent).graph is data


@pytest.mark.parametrize("op", ["Reshape", "BitwiseAnd", "BitwiseOr", "BitShift"])
def test_a_graph_whose_nodes_lack_inputs_is_refused_in_words(op: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle("cpu").path, tmp_path / "b"))
    model = onnx.load_model(folder / GRAPH, load_external_data=False)
    for node in (node for node in model.graph.node if node.op_type == op):
        del node.input[1:]
    (folder / GRAPH).write_bytes(model.SerializeToString())
    sign(folder, GRAPH)
    with pytest.raises(BackendError, match="refuses the graph"):
        open_session(Bundle(folder))
    for kernels in ("onnxruntime", "own"):
        with pytest.raises(BundleError, match="a node of the graph has other inputs or outputs than its operator"):
            memory_peak(Bundle(folder), 10, kernels=kernels)


@pytest.mark.parametrize("kind", ["float", "listed"])
def test_codes_in_a_shape_that_is_no_size_are_left_to_the_library(kind: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle("cpu").path, tmp_path / "b"))
    model = onnx.load_model(folder / GRAPH, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    shape = next(tensors[node.input[1]] for node in model.graph.node if node.op_type == "Reshape")
    shape.ClearField("raw_data")
    shape.float_data.extend([float("inf")] * shape.dims[0])
    if kind == "float":
        shape.data_type = onnx.TensorProto.FLOAT
    (folder / GRAPH).write_bytes(model.SerializeToString())
    sign(folder, GRAPH)
    with pytest.raises(BackendError, match="refuses the graph"):
        open_session(Bundle(folder))
    memory_peak(Bundle(folder), 10, kernels="own")
