"""Models that are not what an export needs: the sentence says what to change in them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_models import Config, Sound
from refusals import only
from torch import Tensor, nn

from edgellm.models.protocol import State, Step
from edgellm.ops import RecurrentWeights, lstm, take_positions
from edgellm_exporters.errors import CaptureError, LoweringError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.proof.parity import unequal
from edgellm_runtime import BackendError, StateSpec, load
from edgellm_runtime.checks.verify import held


class TorchLSTM(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y, (h, c) = self.cell(x, (state["h"][None], state["c"][None]))
        return y, {"h": h[0], "c": c[0]}


class TorchGRUCell(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(32, 32)  # type: ignore[assignment]

    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        h, outputs = state["h"], []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            outputs.append(h)
        return torch.stack(outputs, 1), {"h": h, "c": state["c"]}


class Dropped(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y, present = super().run(x, state, step)
        return y, {"h": present["h"]}


class Undeclared(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y, present = super().run(x, state, step)
        return y, {**present, "cache": y}


class Misshaped(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y, present = super().run(x, state, step)
        return y, {**present, "h": y}


class Sized(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        for _ in range(x.shape[1]):
            x = x.roll(1, dims=1) * 0.5
        return super().run(x, state, step)


class Branching(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return super().run(x + 1 if x.sum() > 0 else x, state, step)


class NoLengths(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        y, h, c = lstm(x, state["h"], state["c"], self.weights(), None)
        return y, {"h": h, "c": c}


class Untranslatable(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return super().run(torch.special.bessel_j0(x), state, step)


class TokenShift(Sound):
    """Can be exported: PyTorch only fears that one token fewer might be none."""

    def state_specs(self) -> list[StateSpec]:
        return [*super().state_specs(), StateSpec("last", ("batch", 32), "float32", "replace")]

    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        before = torch.cat([state.get("last", x[:, 0] * 0)[:, None], x[:, :-1]], 1)
        y, present = super().run(x + before, state, step)
        return y, {**present, "last": take_positions(x, (step.lengths - 1).long()[:, None])[:, 0]}


class Item(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return super().run(x * 2 if step.lengths.max().item() > 3 else x, state, step)


class Causal(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        seen = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)
        return super().run(seen[:, 0], state, step)


class Dropping(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        return super().run(F.dropout(x, 0.5), state, step)


class WrittenBuffer(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(32))

    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen += x.mean((0, 1))
        return super().run(x + self.seen, state, step)


class AssignedBuffer(WrittenBuffer):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen = self.seen + 1
        return Sound.run(self, x + self.seen, state, step)


class KeptTensor(Sound):
    def run(self, x: Tensor, state: State, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        self.kept = x.mean()
        return super().run(x, state, step)


class NoContext(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=61)  # type: ignore[assignment]


class LogitsOnly(Sound):
    def forward(self, tokens: Tensor, state: State | None = None, step: Step | None = None) -> Any:
        return super().forward(tokens, state, step)[0]


class EveryPosition(Sound):
    def forward(self, tokens: Tensor, state: State | None = None, step: Step | None = None) -> Any:
        step = step or Step.whole(tokens)
        y, present = self.run(self.embedding(tokens), state or {}, step)
        return self.head(y), present


class TwiceNamed(Sound):
    def state_specs(self) -> list[StateSpec]:
        return [*super().state_specs(), *super().state_specs()]


class NoVocabulary(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.config = object()  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TorchLSTM, "cell is an nn.LSTM, which PyTorch unrolls over the example's tokens; call edgellm.ops.lstm with"),
        (TorchGRUCell, "cell is an nn.GRUCell, which .* call edgellm.ops.gru with its weights as RecurrentWeights"),
        (Dropped, r"the model's forward gave no new state for \['c'\], which state_specs\(\) declares"),
        (Undeclared, r"the model's forward gave a state \['cache'\] that state_specs\(\) does not declare"),
        (Misshaped, r"present.h: the forward gives shape \(batch, time, 32\), but must give \(batch, 32\)"),
        (
            Branching,
            r"branches on a tensor's value, as by .item\(\) or if; compute both sides, choose with torch.where",
        ),
        (Item, r"branches on a tensor's value at test_bad_input_models.py:\d+ in run, as by .item\(\) or if; compute"),
        (Causal, r"is_causal=True\) sees the tokens of one step only, .*; call edgellm.ops.attention with keys"),
        (Dropping, "the forward drops values at random, which no graph does; give dropout self.training"),
        (
            WrittenBuffer,
            r"the forward writes to seen, but a graph keeps nothing on a module .* declare it in state_specs",
        ),
        (AssignedBuffer, "the forward writes to seen, but a graph keeps nothing on a module"),
        (KeptTensor, "the forward writes to kept, but a graph keeps nothing on a module"),
        (NoContext, "NoContext.config has no max_context; give it the most that one row holds, a whole number of at"),
        (
            Untranslatable,
            r"aten.special_bessel_j0; use other operators in its forward \(own_models.py:\d+, y, present",
        ),
        (LogitsOnly, r"the model's forward gave a \w*Tensor; it must give \(logits, state\)"),
        (EveryPosition, r"logits: the forward gives shape \(batch, time, 61\), but must give \(batch, count, 61\)"),
        (TwiceNamed, "declares what no graph can have: names in a signature must be unique"),
        (NoVocabulary, "vocab_size"),
        (lambda: nn.Linear(1, 1), r"Linear is not an nn.Module with config, state_specs\(\) and forward"),
        (lambda: "a string", "str is not an nn.Module"),
    ],
)
def test_model_that_cannot_be_one_graph(model: Any, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=message) as raised:
        capture(model())
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model", [AssignedBuffer, KeptTensor])
def test_what_a_refused_forward_put_on_the_model_is_taken_off(model: Any) -> None:
    refused = model()
    before = dict(refused.named_buffers())
    with pytest.raises(CaptureError):
        capture(refused)
    assert getattr(refused, "kept", None) is None
    assert all(buffer is before[name] for name, buffer in refused.named_buffers())


def test_plain_token_shift_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exported = export(TokenShift(), tmp_path / "out")
    assert exported.verification.ok
    assert exported.parity.logits < 1e-4


class Bigram(nn.Module):
    """Carries nothing from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.table = nn.Embedding(61, 61)

    def state_specs(self) -> list[StateSpec]:
        return []

    def forward(self, tokens: Tensor, state: State | None = None, step: Step | None = None) -> Any:
        step = step or Step.whole(tokens)
        return take_positions(self.table(tokens), step.logit_positions), {}


@pytest.mark.parametrize("target", ["onnx", "cpu"])
def test_a_model_without_state_is_exported_verified_and_run(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bigram()
    exported = export(model, tmp_path / "out", options=ExportOptions(target=target))
    assert exported.verification.ok
    wanted = [7]
    for _ in range(5):
        wanted.append(int(model.table.weight[wanted[-1]].argmax()))
    loaded = load(tmp_path / "out")
    assert [a.tokens for a in loaded.generate([[5, 6, 7], [7]], max_new_tokens=5)] == [tuple(wanted[1:])] * 2


def test_unequal_figures_are_named_once_with_what_to_do() -> None:
    checks = [
        held("logits", 0.5, 1e-4),
        held("logits", float("nan"), 1e-4),
        held("kl", 2.0, 1e-4),
        held("top1", 1, 0.9),
    ]
    said = unequal(checks, "float16", "none")
    assert said.count("logits") == said.count("kl") == 1
    assert "top1" not in said
    assert (
        "logits is nan, bound 0.0001; kl is 2, bound 0.0001; its numbers are beyond what float16 holds, so use" in said
    )
    assert "hold its steps against the whole in PyTorch" in unequal(checks[2:], "float32", "none")
    assert "try another --quantize; no bundle" in unequal(checks[2:], "float32", "int4")
    assert "give a smaller --max-kl, or leave the cache in int8 out" in unequal(checks[2:], "float32", "auto", "int8")


def test_forward_that_loops_over_tokens() -> None:
    class Loop(Sized):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(128, 32))
            self.b = nn.Parameter(torch.zeros(128))
            del self.cell

        def weights(self) -> RecurrentWeights:
            return RecurrentWeights(self.w, self.w, self.b, self.b)

    with pytest.raises(CaptureError, match="the forward fixes a size that must stay free; loop over no tokens"):
        capture(Loop())


def test_recurrence_that_would_read_padding(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"LSTM was called without lengths; pass step.lengths to edgellm.ops"):
        export(NoLengths(), tmp_path / "out")
    only(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_own_model_with_weights_that_are_not_numbers(tmp_path: Path, value: float) -> None:
    model = Sound()
    with torch.no_grad():
        model.head.weight[3, 3] = value
    with pytest.raises(CaptureError, match=r"head.weight holds NaN or infinite weights"):
        export(model, tmp_path / "out")
    only(tmp_path)


@pytest.mark.parametrize("model", [nn.Linear(1, 1), "a string", None])
def test_what_is_no_model(tmp_path: Path, model: Any) -> None:
    with pytest.raises(CaptureError, match=r"see docs/embedding.md"):
        export(model, tmp_path / "out")
    only(tmp_path)


def test_failed_export_leaves_the_model_in_training_mode(tmp_path: Path) -> None:
    model = Dropped().train()
    with pytest.raises(CaptureError):
        export(model, tmp_path / "out")
    assert model.training
    assert model.cell.training


def test_missing_onnxruntime_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="ONNX Runtime is not installed"):
        export(Sound(), tmp_path / "out")
    only(tmp_path)
