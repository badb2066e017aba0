"""What an expert costs that no token has chosen, and a gate and what it multiplies in one product."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from expert_graphs import mixture_graph, mixture_model, tokens

from edgellm.ops import EXPERT
from edgellm.ops.schema import views
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.passes.merge_experts import MergeExperts
from edgellm_exporters.quantize.plan import ROW, Plan, Scheme


def kernels_of_a_token(scheme: Scheme | None, experts: int, chosen: int, folder: Path) -> Counter[str]:
    """How often each operator ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(mixture_graph([scheme] * experts), options, ["CPUExecutionProvider"])
    session.run(None, tokens(1, 1, experts, chosen))
    events = json.loads(Path(session.end_profiling()).read_text())
    return Counter(e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))


THREE = [Scheme(3, 64, symmetric=False, scale_bits=bits) for bits in (16, 8)]


@pytest.mark.parametrize("scheme", [None, Scheme(4, 32), Scheme(8, ROW), *THREE], ids=str)
def test_an_expert_without_tokens_costs_a_question_and_nothing_else(scheme: Scheme | None, tmp_path: Path) -> None:
    few, many = (kernels_of_a_token(scheme, count, 2, tmp_path) for count in (3, 9))
    assert many - few == {"If": 6, "Identity": 6} and not few - many
    assert sum(count for op, count in many.items() if "MatMul" in op) == 2 * 2


def graph_of(model: ir.Model) -> onnxruntime.InferenceSession:
    made = ir.to_proto(lower_to(model, TARGETS["onnx"], Plan())).SerializeToString()
    return onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])


def test_a_gate_and_what_it_multiplies_become_one_product_with_the_same_numbers() -> None:
    form = {"limit": 0.4, "offset": 1.0, "slope": 1.5}  # they stay with the one that they are of
    before, after = (mixture_model([None] * 3, packed=False, form=form) for _ in range(2))
    assert MergeExperts()(after).modified
    assert [n.op_type for n in after.graph] == ["Split", "Expert", "Expert", "Expert"]
    assert {name.split(".", 2)[2] for name in after.graph.initializers} >= {"gate+up.weight", "down.weight"}
    feeds = tokens(2, 5, 3, 2)
    (a,), (b,) = (graph_of(model).run(None, feeds) for model in (before, after))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.abs(a - feeds["total"]).max() > 0.1
    assert not MergeExperts()(after).modified


def test_a_gate_that_another_expert_reads_too_is_not_merged() -> None:
    model = mixture_model([None] * 3, packed=False)
    _, first, second, _ = model.graph
    place = next(i for i, value in enumerate(first.inputs) if value is not None and value.name.endswith("gate.weight"))
    second.replace_input_with(place, first.inputs[place])
    MergeExperts()(model)
    assert [view.packed for view in views(model.graph, EXPERT)] == [False, False, True]
