"""Rotary tables that are computed when a graph is loaded: the same numbers to the last position, no more in a step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from general_models import build

from edgellm.general.model import GeneralModel
from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm.models.foreign.rope import rotary
from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.protocol import LanguageModel
from edgellm_exporters.export import export
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.graph.lower import lower_to, prepare
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.graph.write import GRAPH_FILE, write_graph
from edgellm_exporters.passes.compute_tables import ComputeTables, waves_of
from edgellm_exporters.quantize.plan import Plan
from edgellm_runtime import open_session
from edgellm_runtime.checks.kernel_events import Kernel
from edgellm_runtime.checks.traffic import GraphTraffic, Traffic
from edgellm_runtime.checks.traffic import Step as Ran
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.graphs.layer_map import graph_nodes
from edgellm_runtime.graphs.onnx_file import read_model

FAR, HEAD, CONTEXT = 131072, 8, 2048
NEAR = 2.0**-21  # of the amplitude: twice what a table may differ by, for ONNX Runtime rounds its cosine too
FORMS: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_theta": 1e6},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "longrope": {
        "factor": 32.0, "original_max_position_embeddings": 65536, "short_factor": [1.0, 1.07, 1.4, 2.1],
        "long_factor": [1.0, 2.0, 8.0, 30.0],
    },
}  # fmt: skip
Tables = tuple[np.ndarray, np.ndarray]


def said(kind: str, turning: int = HEAD) -> dict[str, Any]:
    numbers = {key: n[: turning // 2] if isinstance(n, list) else n for key, n in FORMS[kind].items()}
    return {"rope_theta": 1e4, "rope_type": kind, **numbers}


def own_tables(kind: str, *, still: int = 0) -> Tables:
    fields: dict[str, Any] = {"head_dim": HEAD - still, "max_context": FAR}
    rotary()["rope_parameters"]("rope_parameters", {"rope_parameters": said(kind, HEAD - still)}, fields)
    table = RotaryTable(
        HEAD - still, fields["max_context"], fields["rope_theta"], factors=fields["rope_factors"],
        amplitude=fields["rope_amplitude"], still=still,
    )  # fmt: skip
    return table.cos.numpy(), table.sin.numpy()


def foreign_tables(kind: str) -> tuple[Tables, np.ndarray]:
    """What transformers computes, and its frequencies."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, head_dim=HEAD, max_position_embeddings=FAR,
        rope_parameters=said(kind),
    )  # fmt: skip
    module = LlamaRotaryEmbedding(config)
    positions = int(said(kind).get("original_max_position_embeddings", FAR)) if kind == "longrope" else FAR
    cos, sin = module(torch.zeros(1, positions, 1), torch.arange(positions)[None])
    half = slice(HEAD // 2)
    return (cos[0, :, half].numpy(), sin[0, :, half].numpy()), module.inv_freq.numpy()


def turning(cos: np.ndarray, sin: np.ndarray) -> ir.Model:
    """A graph that turns x (1, 1, time, features) by two tables."""
    width = 2 * cos.shape[1]
    x = ir.Value(name="x", shape=ir.Shape([1, 1, "time", width]), type=ir.TensorType(ir.DataType.FLOAT))
    at = ir.Value(name="at", shape=ir.Shape([1, "time"]), type=ir.TensorType(ir.DataType.INT64))
    tables = [
        ir.Value(
            name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT)
        )
        for name, array in (("cos", cos), ("sin", sin))
    ]
    node = ir.node("RotaryEmbedding", [x, *tables, at])
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x, at], [y], nodes=[node], initializers=tables, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10)


def tables_of(model: ir.Model, positions: int, width: int) -> Tables:
    """What the graph turns (1, 0) to at each position."""
    x = np.zeros((1, 1, positions, 2 * width), np.float32)
    x[..., :width] = 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x, "at": np.arange(positions)[None]})
    return y[0, 0, :, :width], y[0, 0, :, width:]


def optimized(graph: Path, scratch: Path) -> collections.Counter[str]:
    """The nodes that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(scratch / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    made = onnx.load(scratch / "optimized.onnx", load_external_data=False)
    return collections.Counter(node.op_type for node in made.graph.node)


@pytest.mark.parametrize("kind", FORMS)
def test_the_tables_of_every_scaling_come_out_the_same_to_the_last_position(kind: str) -> None:
    theirs, frequencies = foreign_tables(kind)
    found = waves_of(*theirs)
    assert found is not None
    np.testing.assert_array_equal(found.frequencies, frequencies)
    for cos, sin in (theirs, own_tables(kind), own_tables(kind, still=4)):
        model = turning(cos, sin)
        ComputeTables()(model)
        assert not {"cos", "sin"} & set(model.graph.initializers)
        for stored, again in zip((cos, sin), tables_of(model, *cos.shape), strict=True):
            assert np.abs(stored - again).max() <= NEAR * cos[0].max()


@pytest.mark.parametrize("kind", ["row", "angle", "start", "small", "large", "nan", "read otherwise", "other shape"])
def test_tables_that_are_something_else_stay_stored(kind: str) -> None:
    angles = np.outer(np.arange(2048), 0.5 ** np.arange(4)).astype(np.float32).astype(np.float64)
    if kind == "angle":
        angles[:, 1] = np.arange(2048) * 0.3  # the product in float64
    elif kind == "start":
        angles += 0.1
    elif kind == "small":
        angles = angles[:1000]
    elif kind == "large":
        angles = np.repeat(angles, 65, axis=1)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    if kind == "row":
        cos[-1, 2] += np.float32(1e-6)
    elif kind == "nan":
        sin[5, 1] = np.nan
    elif kind == "other shape":
        sin = sin[:-1]
    model = turning(cos, sin)
    if kind == "read otherwise":  # sines where another operator reads cosines
        (node,) = model.graph
        x, first, second, at = node.inputs
        model.graph.append(ir.node("RotaryEmbedding", [x, second, first, at]))
    ComputeTables()(model)
    assert {"cos", "sin"} <= set(model.graph.initializers)


def tiny(road: str, kind: str) -> LanguageModel:
    if road == "general":
        return GeneralModel(build("llama", max_position_embeddings=CONTEXT, rope_parameters=said(kind)))
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=96, width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=56,
        max_context=CONTEXT, rope_theta=1e6, rope_factors=(1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 4.0, 4.0), rope_amplitude=1.14,
    )  # fmt: skip
    return Decoder(config)


@pytest.mark.parametrize(("road", "kind"), [("own", "yarn"), ("general", "yarn")])
def test_a_bundle_of_either_road_is_smaller_by_its_tables_and_holds_at_the_far_end(
    road: str, kind: str, tmp_path: Path
) -> None:
    """And ONNX Runtime runs the nodes that it would with stored tables."""
    model = tiny(road, kind)
    bundle = export(model, tmp_path / "bundle").bundle
    found = verify(bundle, open_session(bundle, device="cpu", threads=1))
    assert f"after {CONTEXT - 12}" in {check.name: check.what for check in found.checks}["far.kl"]
    assert found.ok
    (tmp_path / "stored").mkdir()
    storing = dataclasses.replace(find_target("cpu"), after_lowering=())
    captured = prepare(capture(model), storing)
    write_graph(lower_to(captured, storing, Plan()), tmp_path / "stored", lambda what, share: None)
    computed, stored = (
        sum((tmp_path / folder / name).stat().st_size for name in (GRAPH_FILE, f"{GRAPH_FILE}.data"))
        for folder in ("bundle", "stored")
    )
    assert stored - computed > 2 * CONTEXT * 8 * 4 - 2048
    runs = [optimized(tmp_path / folder / GRAPH_FILE, tmp_path) for folder in ("bundle", "stored")]
    assert runs[0] == runs[1]
    assert runs[0]["GroupQueryAttention"] == 2


def test_the_rows_that_attention_reads_of_a_computed_table_are_counted_as_of_a_stored_one(tmp_path: Path) -> None:
    write_graph(
        lower_to(prepare(capture(tiny("own", "yarn")), find_target("cpu")), find_target("cpu"), Plan()), tmp_path,
        lambda what, share: None,
    )  # fmt: skip
    model = read_model((tmp_path / GRAPH_FILE).read_bytes())
    nodes = graph_nodes(model)
    place = next(i for i, node in enumerate(nodes) if node.op == "GroupQueryAttention")
    folded = 1 + next(i for i, node in enumerate(nodes) if "rotary.sin" in node.outputs)
    kernel = Kernel("n", "GroupQueryAttention", 0, 0.0, 1.0, (), ((1, 3, 64),))
    step = Ran(past=10, time=3, capacity=64)
    found = GraphTraffic(model, nodes, (), range(folded, len(nodes))).of(kernel, place, step)
    assert isinstance(found, Traffic)
    assert found.weights == 2 * 3 * 8 * 4
