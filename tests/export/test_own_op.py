"""An op in a model's own file: its reference is its form on every target, until a target has a rule for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.models.protocol import Step
from edgellm.ops import take_positions
from edgellm.ops.canonical import DOMAIN
from edgellm.ops.schema import OPS, REQUIRED, Op
from edgellm_exporters.engines.fixed_sizes import EngineOptions
from edgellm_exporters.errors import CaptureError, QuantizeError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph import references, targets
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.graph.lower import prepare
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.quantize.methods import METHODS, find_method
from edgellm_exporters.quantize.planning import Uses, make_plan
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime import StateSpec, open_session

VOCAB, WIDTH, CONTEXT = 61, 32, 48


@pytest.fixture(autouse=True)
def _ops_as_they_were() -> Iterator[None]:
    before = dict(OPS)
    OPS.update({op.name: op for op in (LEAK, DOUBLE)})
    yield
    OPS.clear()
    OPS.update(before)


def double_reference(x: Tensor) -> Tensor:
    return x * 2


def leak_reference(
    x: Tensor, past: Tensor, lengths: Tensor, w_in: Tensor, w_out: Tensor, bias: Tensor | None = None, *, decay: float,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A projection, a sum that decays from token to token, a projection back."""
    steps = torch.arange(x.shape[1])
    u = F.linear(x, w_in) * (steps < lengths[:, None])[..., None]  # (batch, time, width)
    distance = (steps[:, None] - steps).float()
    y = torch.where(distance >= 0, decay**distance, 0.0) @ u + decay ** (steps + 1.0)[:, None] * past[:, None]
    last = (lengths.long() - 1)[:, None, None].expand(-1, 1, y.shape[2])
    return F.linear(DOUBLE(y) * gain, w_out, bias), y.gather(1, last)[:, 0]


DOUBLE = Op(name="Double", inputs=("x",), outputs=("y",), reference=double_reference)
LEAK = Op(
    name="Leak", inputs=("x", "past", "lengths", "w_in", "w_out", "bias"), outputs=("y", "present"),
    attributes={"decay": REQUIRED, "gain": 1.0}, states={"past": "present"}, matrices=("w_in", "w_out"),
    reference=leak_reference,
)  # fmt: skip
for op in (LEAK, DOUBLE):
    del OPS[op.name]  # only these tests know them


@dataclass(frozen=True)
class Config:
    vocab_size: int = VOCAB
    max_context: int = CONTEXT


class Leaky(nn.Module):
    """Two layers of the op and a head; ``between`` may compute something else from what the layers give."""

    def __init__(self, between: Op | None = None) -> None:
        super().__init__()
        self.config, self.between = Config(), between
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH) for _ in range(2)])
        self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) * WIDTH**-0.5 for _ in range(4)])
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def state_specs(self) -> list[StateSpec]:
        return [StateSpec(f"sum{i}", ("batch", WIDTH), "float32", "replace") for i in range(2)]

    def forward(self, tokens: Tensor, state: Any = None, step: Step | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        state, step = state or {}, step or Step.whole(tokens)
        x, present = self.embedding(tokens), {}
        for i, norm in enumerate(self.norms):
            past = state.get(f"sum{i}", x.new_zeros(tokens.shape[0], WIDTH))
            y, present[f"sum{i}"] = LEAK(
                norm(x), past, step.lengths, *self.weights[2 * i : 2 * i + 2], self.bias if i else None,
                decay=0.5 + 0.4 * i, gain=1.0 - 0.5 * i,
            )  # fmt: skip
            x = x + (y if self.between is None else self.between(y))
        return self.head(take_positions(x, step.logit_positions)), present if state else {}


def model(between: Op | None = None) -> Leaky:
    torch.manual_seed(0)
    return Leaky(between).eval()


def kinds(graph: ir.Model) -> list[str]:
    return sorted(node.op_type for node in graph.graph if node.domain == DOMAIN)


def test_captured_it_is_one_node_with_what_is_not_the_default() -> None:
    graph = capture(model())
    nodes = [LEAK.of(node) for node in graph.graph if node.op_type == "Leak"]
    assert [(n.decay, n.gain, n.bias is None) for n in nodes] == [(0.5, 1.0, True), (pytest.approx(0.9), 0.5, False)]
    assert "gain" not in nodes[0].node.attributes
    assert [str(n.y.shape[1]) for n in nodes] == ["time", "time"]


@pytest.mark.parametrize("target", TARGETS)
def test_without_a_rule_it_becomes_what_its_reference_does(target: str) -> None:
    graph = prepare(capture(model()), TARGETS[target])
    assert not {"Leak", "Double"} & set(kinds(graph))
    assert kinds(graph).count("Linear") == 5  # two in each layer, and the head
    shapes = Uses(graph).shapes
    assert {f"weights.{i}" for i in range(4)} <= shapes.keys()
    names = [value.name for node in graph.graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_it_is_traced_once_for_each_distinct_call(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    trace = references._trace
    monkeypatch.setattr(references, "_trace", lambda r, *rest: traced.append(r.op.name) or trace(r, *rest))
    graph = capture(model(DOUBLE))
    prepare(graph, TARGETS["onnx"])
    assert sorted(traced) == ["Double", "Leak", "Leak"]  # the layers differ; what they double has one shape


@pytest.mark.parametrize("method", ["none", "int8"])
@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_bundle_equals_pytorch(target: str, method: str, tmp_path: Path) -> None:
    own = model()
    exported = export(own, tmp_path / "b", options=ExportOptions(target=target, quantize=method))
    assert exported.verification.ok
    windows = [np.random.default_rng(1).integers(0, VOCAB, n).tolist() for n in (CONTEXT, 9, 1)]
    report = compare(own, open_session(exported.bundle, threads=1), windows)
    assert not [c for c in report.checks(dict(METHODS[method].bounds)) if not c.ok]
    codes = [v for v in ir.load(exported.bundle.file("model.onnx")).graph.initializers if v.startswith("weights.0.")]
    assert bool([v for v in codes if "codes" in v]) == (method == "int8")


@pytest.mark.parametrize(("target", "method"), [("cuda", "int4"), ("tensorrt", "int8")])
def test_targets_for_gpus_have_it_too_and_prove_it(target: str, method: str, tmp_path: Path) -> None:
    engine = EngineOptions(build=False) if TARGETS[target].roles else None
    options = ExportOptions(target=target, dtype="float16", quantize=method, engine=engine)
    assert export(model(), tmp_path / "b", options=options).verification.ok


def test_a_rule_in_one_file_makes_it_that_targets_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rule(context: Any, view: Any) -> list[ir.Value]:
        return [context.op("Add", view.x, view.x)]

    with_rule = replace(TARGETS["cpu"], rules={**TARGETS["cpu"].rules, "Double": rule})
    monkeypatch.setattr(targets, "TARGETS", {**TARGETS, "cpu": with_rule})
    assert kinds(prepare(capture(model()), with_rule)).count("Double") == 2
    assert export(model(), tmp_path / "b").verification.ok


def looping_reference(x: Tensor) -> Tensor:
    return LOOPING(x) if torch.compiler.is_exporting() else x


def fixed_reference(x: Tensor) -> Tensor:
    return x + torch.arange(int(x.shape[1]))[:, None]


def branching_reference(x: Tensor) -> Tensor:
    return x * 2 if bool((x > 0).all()) else x


LOOPING = Op(name="Looping", inputs=("x",), outputs=("y",), like=lambda x: [x], reference=looping_reference)
FIXED = Op(name="Fixed", inputs=("x",), outputs=("y",), like=lambda x: [x], reference=fixed_reference)
BRANCHING = Op(name="Branching", inputs=("x",), outputs=("y",), like=lambda x: [x], reference=branching_reference)
for op in (LOOPING, FIXED, BRANCHING):
    del OPS[op.name]


@pytest.mark.parametrize(
    ("op", "said"),
    [(LOOPING, "consists of itself"), (FIXED, "which must stay free"), (BRANCHING, "cannot be traced: ")],
)
def test_a_reference_that_no_graph_can_be_made_of_is_refused_with_its_file(op: Op, said: str) -> None:
    OPS[op.name] = op
    graph = capture(model(op))
    with pytest.raises(CaptureError, match=rf"op {op.name}: its reference in .*test_own_op\.py, .*{said}"):
        prepare(graph, TARGETS["cpu"])


def test_the_reference_of_quantized_models_says_what_it_cannot_round() -> None:
    own, target = model(), TARGETS["cpu"]
    graph = prepare(capture(own), target)
    plan = make_plan(find_method("w8a8", target.methods), graph, own, [[1, 2, 3]])
    with pytest.raises(QuantizeError, match=r"weights\.\d is multiplied outside an nn\.Linear"):
        quantized_model(own, plan)(torch.tensor([[1, 2, 3]]), {})
    assert isinstance(quantized_model(own, plan, integer_products=False), Leaky)
