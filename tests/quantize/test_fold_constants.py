"""What a forward computes from weights alone is a weight: by its numbers, unread until written, and quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from edgellm.models.protocol import State, Step
from edgellm.ops import take_positions
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.capture import OPSET, capture
from edgellm_exporters.graph.lower import lower_to, prepare
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.graph.translate import translated
from edgellm_exporters.passes.find_linears import FindLinears
from edgellm_exporters.passes.fold_constants import FoldConstants
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.planning import make_plan
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime import StateSpec

WIDTH = 64


class Computed(nn.Module):
    """Something of a weight (64, 64) and of x (batch, 64)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def graph_of(module: nn.Module) -> ir.Model:
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.randn(3, WIDTH),), dynamic_shapes=({0: batch},), strict=False)
    return translated(program, ["x"], ["y"], opset=OPSET)


def run(model: ir.Model, x: Tensor) -> np.ndarray:
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x.numpy()})[0]
    return found


class Unread(ir.LazyTensor):
    """A weight that counts how often it is read."""

    reads = 0

    def numpy(self) -> Any:
        type(self).reads += 1
        return super().numpy()


CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {  # with how many nodes are left
    "a gain": (lambda x, w: x * (1 + w[0]), 1),
    "a slice": (lambda x, w: x @ w[:, :16], 1),
    "a transpose": (lambda x, w: x @ w.mT, 1),
    "a cast": (lambda x, w: x * w[0].double().exp().float(), 1),
    "joined": (lambda x, w: x @ torch.cat([w[:16], -w[16:]]), 1),
    "normed": (lambda x, w: x @ (w / w.norm(dim=1, keepdim=True)), 1),
    "a softmax": (lambda x, w: x * F.softplus(w[1]).softmax(-1), 1),
    "parts": (lambda x, w: x * w.chunk(2)[1][0] + w.chunk(2)[0][1], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_computed_from_a_weight_is_one_constant_that_is_not_read(name: str) -> None:
    torch.manual_seed(0)
    function, left = CASES[name]
    module, x = Computed(function), torch.randn(5, WIDTH)
    before, after = graph_of(module), graph_of(module)
    weight = after.graph.initializers["weight"]
    array = module.weight.detach().numpy()
    weight.const_value = Unread(lambda: ir.tensor(array), dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape))
    Unread.reads = 0
    assert FoldConstants()(after).modified
    assert Unread.reads == 0
    assert len(after.graph) == left < len(before.graph)
    assert any(str(n).startswith("weight:") for n in after.graph.initializers)
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(after, x), module(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    assert Unread.reads > 0


def test_what_depends_on_an_input_or_is_spread_out_stays() -> None:
    model = graph_of(Computed(lambda x, w: x * 2 + w.sum() * x.sum() + w[:1].expand(4096, WIDTH).sum(1)[0]))
    FoldConstants()(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("ReduceSum") == 1
    assert kinds.count("Mul") == 2


def test_a_product_with_a_turned_weight_is_a_linear() -> None:
    model = graph_of(Computed(lambda x, w: x @ w.T))
    FindLinears()(model)
    (linear,) = (node for node in model.graph if node.op_type == "Linear")
    assert [v.name for v in linear.inputs[:2] if v is not None] == ["x", "weight"]


@dataclass(frozen=True)
class Config:
    vocab_size: int = 96
    max_context: int = 32


class Gained(nn.Module):
    """Norms with gains of 1 + w, a parametrized layer, a slice of one, and a head whose rows no block divides."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.table = nn.Embedding(96, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH) * 0.3)
        self.up = weight_norm(nn.Linear(WIDTH, 48))
        self.wide = nn.Linear(WIDTH, 128, bias=False)
        self.narrow = nn.Linear(12, WIDTH)
        self.down = nn.Linear(48, WIDTH)
        self.head = nn.Linear(WIDTH, 96, bias=False)

    def state_specs(self) -> list[StateSpec]:
        return []

    def forward(self, tokens: Tensor, state: State | None = None, step: Step | None = None) -> Any:
        step = step or Step.whole(tokens)
        x = self.table(tokens)
        y = F.rms_norm(x, (WIDTH,), 1 + self.gain, 1e-6)
        x = x + self.down(torch.tanh(self.up(y))) + F.linear(y, self.wide.weight[:WIDTH])
        x = x + self.narrow(x[..., :12])
        return self.head(take_positions(x, step.logit_positions)), {}


def gained() -> Gained:
    torch.manual_seed(3)
    model = Gained().eval()
    with torch.no_grad():  # columns of unequal size, for smoothing to even out
        model.table.weight.mul_(torch.logspace(0, 1.5, WIDTH))
    return model


@pytest.mark.parametrize("method", ["w8a8", "int4"])
def test_smoothing_and_quantization_see_computed_weights(method: str) -> None:
    model, target = gained(), find_target("cpu")
    graph = prepare(capture(model), target)
    tokens = [[int(t) for t in torch.randint(0, 96, (32,))] for _ in range(80)]
    plan = make_plan(find_method(method, target.methods), graph, model, tokens[:2], tokens if method == "int4" else ())
    weights = {part for name in plan.schemes for part in name.split("+")}
    assert {"up.weight", "down.weight"} <= weights
    assert any(w.startswith("wide.weight:") for w in weights)
    assert plan.floats == ({} if method == "w8a8" else {"narrow.weight": (WIDTH, 12)})
    smoothed = {part for name in plan.smoothing.columns for part in name.split("+")}
    assert "up.weight" in smoothed
    lower_to(graph, target, plan)


@pytest.mark.parametrize(("target", "method"), [("onnx", "none"), ("onnx", "int8"), ("cpu", "int8"), ("cpu", "int4")])
def test_a_model_of_computed_weights_is_exported(target: str, method: str, tmp_path: Path) -> None:
    exported = export(gained(), tmp_path / "out", options=ExportOptions(target=target, quantize=method))
    assert exported.verification.ok
    said = exported.bundle.manifest.quantization
    if method != "none":
        assert said["floats"] == {"narrow.weight": [WIDTH, 12]}
        assert any(note.startswith("narrow.weight (64 x 12) stays float, because its rows") for note in exported.notes)


def test_the_quantized_reference_has_parametrized_weights_rounded_and_names_what_it_cannot_have() -> None:
    model, target = gained(), find_target("onnx")
    graph = prepare(capture(model), target)
    plan = make_plan(find_method("int8", target.methods), graph, model, [[1, 2, 3]])
    with pytest.raises(Exception, match=r"wide.weight:\S+ is computed in the forward; hold its bundle against the"):
        quantized_model(model, plan)
    plan.schemes = {name: s for name, s in plan.schemes.items() if ":" not in name}
    rounded = quantized_model(model, plan)
    difference = rounded.up.weight - model.up.weight
    assert 0 < float(difference.detach().abs().max()) < 0.01
