"""A loop over one token, unrolled, computes what the loop does; one over several stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgellm_exporters.passes.unroll_single_steps import UnrollSingleSteps


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def loop(time: int | str) -> ir.Model:
    """h_t = decay_t h_{t-1} + x_t, which gives h_t and 2 h_t; its result is read again."""
    h, decay, x = value("h", 2, 3), value("decay", time, 2, 3), value("x", time, 2, 3)
    inside = [value(name, 2, 3) for name in ("h_in", "decay_in", "x_in")]
    faded = ir.node("Mul", [inside[0], inside[1]])
    new = ir.node("Add", [faded.outputs[0], inside[2]])
    given = ir.node("Add", [new.outputs[0], new.outputs[0]])
    nodes = [faded, new, given]
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].shape = f"inner{number}", ir.Shape([2, 3])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    body = ir.Graph(inside, [new.outputs[0], given.outputs[0]], nodes=nodes, name="body")
    scan = ir.node("Scan", [h, decay, x], attributes={"body": body, "num_scan_inputs": 2}, num_outputs=2)
    for output, like in zip(scan.outputs, (h, x), strict=True):
        output.shape, output.type = like.shape, like.type
    last = ir.node("Neg", [scan.outputs[1]])
    last.outputs[0].shape, last.outputs[0].type, last.outputs[0].name = x.shape, x.type, "y"
    scan.outputs[0].name, scan.outputs[1].name = "present", "each"
    graph = ir.Graph(
        [h, decay, x], [scan.outputs[0], last.outputs[0]], nodes=[scan, last], name="g", opset_imports={"": 23}
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {"h": (2, 3), "decay": (1, 2, 3), "x": (1, 2, 3)}
    return list(session.run(None, {n: draw.standard_normal(s).astype(np.float32) for n, s in sizes.items()}))


@pytest.mark.parametrize("time", [1, "time"])
def test_a_loop_over_one_token_becomes_its_step(time: int | str) -> None:
    model = loop(time)
    before = run(model)
    assert UnrollSingleSteps()(model).modified
    assert [node.op_type for node in model.graph] == ["Squeeze", "Squeeze", "Mul", "Add", "Add", "Unsqueeze", "Neg"]
    for a, b in zip(before, run(model), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("time", [2, "rows"])
def test_a_loop_over_several_tokens_or_something_else_stays(time: int | str) -> None:
    model = loop(time)
    assert not UnrollSingleSteps()(model).modified
