"""CONTRIBUTING's walk-throughs of a target, a quantization and a graph pass, walked as they are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from families import make
from test_docs import REPOSITORY, blocks

from edgellm.ops.schema import View
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.capture import OPSET
from edgellm_exporters.graph.targets import TARGETS, Target
from edgellm_exporters.lowering import standard
from edgellm_exporters.lowering.context import Lowering, shape_of
from edgellm_exporters.passes.merge_linears import MergeLinears
from edgellm_exporters.quantize.methods import METHODS, Method
from edgellm_exporters.quantize.plan import Scheme
from edgellm_runtime.graphs import operators

NAMES = {
    "Lowering": Lowering, "MergeLinears": MergeLinears, "Method": Method, "OPSET": OPSET, "Scheme": Scheme,
    "Sequence": Sequence, "Target": Target, "View": View, "ir": ir, "shape_of": shape_of, "standard": standard,
}  # fmt: skip


def written(mark: str) -> Any:
    """What the block of that mark defines."""
    (code,) = (code for found, _, code in blocks(REPOSITORY / "CONTRIBUTING.md") if found == f"tested: {mark}")
    module = ModuleType(mark)
    module.__dict__.update(NAMES)
    exec("from __future__ import annotations\n" + code, module.__dict__)
    return module


@pytest.mark.parametrize("family", ["decoder untied with biases", "lstm"])
@pytest.mark.parametrize("method", ["none", "int8"])
def test_the_target_in_contributing_is_one(
    family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = written("target").PACKED
    monkeypatch.setitem(TARGETS, packed.name, packed)
    monkeypatch.setitem(operators.TARGETS, packed.name, operators.TARGETS["onnx"])
    made = export(make(family), tmp_path / "bundle", options=ExportOptions(target=packed.name, quantize=method))
    assert made.verification.ok
    if method == "none" and family != "lstm":
        assert b"Gemm" in (tmp_path / "bundle" / "model.onnx").read_bytes()


def test_the_quantization_in_contributing_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "coarse", written("quantization").COARSE)
    for target in ("cpu", "onnx"):
        made = export(make("decoder"), tmp_path / target, options=ExportOptions(target=target, quantize="coarse"))
        assert made.verification.ok
        assert any("4" in name for name in made.bundle.manifest.quantization["weights"])


def test_the_pass_in_contributing_is_one() -> None:
    x = ir.Value(name="x", shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, value = [], x
    for op in ("Neg", "Neg", "Abs"):
        nodes.append(ir.node(op, [value]))
        value = nodes[-1].outputs[0]
        value.shape, value.type = x.shape, x.type
    value.name = "y"
    graph = ir.Graph([x], [value], nodes=nodes, opset_imports={"": OPSET}, name="g")
    model, given = ir.Model(graph, ir_version=10), np.array([-1, 0, 2], np.float32)

    def run() -> np.ndarray:
        made = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
        found: np.ndarray = made.run(None, {"x": given})[0]
        return found

    before = run()
    assert written("pass").DropDoubleNegation()(model).modified
    assert nodes[2].inputs[0] is x
    np.testing.assert_array_equal(run(), before)
