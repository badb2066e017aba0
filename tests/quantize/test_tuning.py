"""Tuned rounding: latent weights, layers passed one by one, and what a tuned plan gives."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from families import CONTEXT, VOCAB, make, planned
from general_models import build
from rich.progress import Progress
from source_models import bart_model
from torch import Tensor, nn

from edgellm.cli import progress as progress_module
from edgellm.cli.calibration import Calibration, tuning_of
from edgellm.cli.export import export as command
from edgellm.errors import CheckpointError
from edgellm.general.model import GeneralModel
from edgellm.streaming import OwnWeights
from edgellm_exporters.auto.automatic import Automatic
from edgellm_exporters.auto.budget import divide
from edgellm_exporters.auto.formats import candidates_of
from edgellm_exporters.errors import ExportError, QuantizeError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.layers import layer_modules
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.quantize.notes import quantization_notes
from edgellm_exporters.quantize.plan import Plan, Scheme
from edgellm_exporters.quantize.planning import Uses
from edgellm_exporters.quantize.quantized_model import quantized_model, quantized_stream
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_exporters.quantize.tuning import tune as tune_module
from edgellm_exporters.quantize.tuning.chosen import RememberedRows
from edgellm_exporters.quantize.tuning.latent import LatentWeight
from edgellm_exporters.quantize.tuning.layer_stream import LayerStream, layers_called, shell_of
from edgellm_exporters.quantize.tuning.tune import MIN_TUNING_TOKENS, MOST_TUNING_TOKENS, Tuning, tuned
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify

SCHEMES = [
    Scheme(2, 16),
    Scheme(4, 32),
    Scheme(4, 64, symmetric=False),
    Scheme(8, 32),
    Scheme(4, 32, False, scale_bits=8),
    Scheme(3, 64, symmetric=False),
    Scheme(3, 64, symmetric=False, scale_bits=8),
]


def tokens(count: int = MIN_TUNING_TOKENS) -> list[int]:
    """Words that follow each other by a rule, so that there is something to be nearer to."""
    draw = np.random.default_rng(0)
    found = [1]
    for jump in draw.integers(1, 7, count - 1):
        found.append((found[-1] * 3 + int(jump)) % VOCAB)
    return found


def tuning(**changes: Any) -> Tuning:
    return Tuning(**{"minutes": 60, "tokens": tokens(), "steps": 6, "distilling_steps": 3, "own_tokens": 0, **changes})


def plan_of(model: nn.Module, method: str = "4:32:asymmetric") -> Plan:
    plan: Plan = planned(model, "cpu", method)[1]
    return plan


def run(model: nn.Module, plan: Plan, options: Tuning, tell: Any = lambda what, share: None) -> Plan:
    return tuned(plan, model, OwnWeights(model), list(layer_modules(model)), [], options, tell)


def numbers(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    return dict(quantized_model(model, plan).named_parameters())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_latent_weight_begins_with_its_codes_and_ends_with_what_it_gave(scheme: Scheme) -> None:
    torch.manual_seed(0)
    weight, column, row = torch.randn(6, 128), torch.rand(128) + 0.5, torch.rand(6) + 0.5
    codes = round_to_nearest((weight * column * row[:, None]).numpy(), scheme)
    latent = LatentWeight(weight, codes, scheme, column, row, move_codes=True)
    torch.testing.assert_close(latent(), torch.from_numpy(codes.dequantize()) / column / row[:, None])
    np.testing.assert_array_equal(latent.codes().codes, codes.codes)
    np.testing.assert_array_equal(latent.codes().scales, codes.scales)
    with torch.no_grad():
        assert latent.latent is not None
        latent.latent.add_(torch.randn_like(latent.latent))
        latent.factor.mul_(1.1)
    latent.keep_in_range()
    found = latent.codes()
    assert found.codes.max() <= scheme.top and (np.sign(found.scales) == np.sign(codes.scales)).all()
    expected = torch.from_numpy(found.dequantize()) / column / row[:, None]
    tolerance = 1e-3 if scheme.scale_bits == 16 else 1e-2  # what scales are rounded by
    torch.testing.assert_close(latent(), expected, rtol=tolerance, atol=1e-4)


def test_gradients_of_a_latent_weight_are_those_of_a_product_that_rounds_nothing() -> None:
    torch.manual_seed(0)
    scheme, ones = Scheme(4, 16, symmetric=False), torch.ones(32)
    codes = round_to_nearest(torch.randn(3, 32).numpy(), scheme)
    latent = LatentWeight(torch.from_numpy(codes.dequantize()), codes, scheme, ones, torch.ones(3), move_codes=True)
    given = torch.randn(3, 32)
    (latent() * given).sum().backward()
    plain = torch.from_numpy(codes.codes).float().view(3, 2, 16).requires_grad_()
    scales = torch.from_numpy(codes.scales)[:, :, None].requires_grad_()
    wide = (plain - torch.from_numpy(codes.zeros)[:, :, None]) * scales
    (wide.view(3, 32) * given).sum().backward()
    assert latent.latent is not None
    torch.testing.assert_close(latent.latent.grad, plain.grad)
    torch.testing.assert_close(latent.factor.grad, scales.grad * scales.detach())


@pytest.mark.parametrize("family", ["decoder", "mixed", "llama"])
def test_passing_layer_after_layer_gives_the_models_own_logits(family: str, tmp_path: Path) -> None:
    model = GeneralModel(build(family)).eval() if family == "llama" else make(family)
    shell, weights = shell_of(model), OwnWeights(model)
    text = torch.tensor(tokens(16 * 24)).view(16, 24) % model.config.vocab_size
    order = layers_called(shell, weights, text[:8], list(layer_modules(model)))
    assert order == list(layer_modules(model))
    stream = LayerStream(shell, RememberedRows(weights), text, order, tmp_path / "x")
    for _ in order:
        stream.advance(stream.parameters(weights))
    with torch.no_grad():
        torch.testing.assert_close(stream.logits(range(8, 16)), model(text[8:16])[0], rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.iterdir())) <= 2  # of all the layers' outputs


@pytest.mark.parametrize(("family", "method"), [
    ("decoder", "3:64:asymmetric"), ("decoder", "3:64:asymmetric:scales8"), ("decoder", "4:32:asymmetric"),
    ("decoder", "2:16"), ("mixed", "int4"),
])  # fmt: skip
def test_tuned_codes_are_nearer_to_the_float_model_on_other_text(family: str, method: str) -> None:
    model = make(family)
    plan = plan_of(model, method)
    found = run(model, plan, tuning(steps=12, distilling_steps=4))
    unseen = torch.tensor(tokens(9000)[-2000:]).view(-1, 40)

    def divergence(of: Plan) -> float:
        with torch.no_grad():
            given, wanted = (m(unseen)[0].log_softmax(-1) for m in (quantized_model(model, of), model))
        return float(F.kl_div(given, wanted, reduction="none", log_target=True).sum(-1).mean())

    before, after = divergence(plan), divergence(found)
    assert after < before
    assert found.schemes == plan.schemes
    told = found.tuned
    assert all(layer["kept"] == (not layer["after"] < layer["before"]) for layer in told["layers"].values())
    assert any(not layer["kept"] for layer in told["layers"].values())


def test_the_same_seed_gives_the_same_codes_and_another_one_others() -> None:
    model = make("decoder")
    plan = plan_of(model)
    first, second, other = (numbers(model, run(model, plan, tuning(seed=seed))) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_run_that_was_interrupted_goes_on_to_the_same_codes(tmp_path: Path) -> None:
    model = make("decoder")
    plan, options = plan_of(model), tuning(directory=tmp_path / "b.tuning")
    whole = numbers(model, run(model, plan, dataclasses.replace(options, directory=None)))

    def interrupt(what: str, share: float) -> None:
        if what.startswith("tuning layers · 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, options, interrupt)
    left = sorted(path.name for path in (tmp_path / "b.tuning").iterdir())
    assert left == [f"{next(iter(layer_modules(model)))}.npz", "tuning.json"]
    steps: list[int] = []
    learned = tune_module.tuned_layer

    def counted(*given: Any, **named: Any) -> Any:
        steps.append(1)
        return learned(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_module, "tuned_layer", counted)
        found = numbers(model, run(model, plan, options))
    assert len(steps) == len(layer_modules(model)) - 1
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_text_that_the_model_wrote_before_an_interruption_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("decoder")
    plan, options = plan_of(model), tuning(own_tokens=1024, directory=tmp_path / "b.tuning")
    whole = numbers(model, run(model, plan, dataclasses.replace(options, directory=None)))

    def interrupt(what: str, share: float) -> None:
        if what.startswith("tuning layers"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, plan, options, interrupt)

    def again(*_: Any) -> Any:
        raise AssertionError("written again")

    monkeypatch.setattr(tune_module, "own_words", again)
    found = numbers(model, run(model, plan, options))
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_finished_layers_of_other_work_are_not_taken_over(tmp_path: Path) -> None:
    model, directory = make("decoder"), tmp_path / "b.tuning"
    run(model, plan_of(model), tuning(directory=directory))
    other = make("decoder", seed=1)
    fresh, found = (numbers(other, run(other, plan_of(other), tuning(directory=d))) for d in (None, directory))
    assert all(torch.equal(fresh[name], found[name]) for name in fresh)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    model = make("decoder")
    with pytest.raises(QuantizeError, match="something else than tuned layers"):
        run(model, plan_of(model), tuning(directory=tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_layer_that_got_worse_keeps_its_codes_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("decoder")
    plan = plan_of(model)
    worst = list(layer_modules(model))[1]
    learned = tune_module.tuned_layer

    def spoiled(stream: Any, path: str, *given: Any, **named: Any) -> Any:
        found = learned(stream, path, *given, **named)
        return dataclasses.replace(found, after=2 * found.before) if path == worst else found

    monkeypatch.setattr(tune_module, "tuned_layer", spoiled)
    found = run(model, plan, tuning(distilling_steps=0))
    before, after = numbers(model, plan), numbers(model, found)
    inside = [name for name in before if name.startswith(f"{worst}.")]
    assert all(torch.equal(before[name], after[name]) for name in inside)
    assert any(f"layer {worst} got no better" in note for note in quantization_notes({"tuning": found.tuned}))


def test_minutes_that_are_too_few_leave_what_was_not_reached_as_it_was() -> None:
    model = make("decoder")
    plan, ticks = plan_of(model), itertools.count()
    found = run(model, plan, tuning(minutes=1e-3, clock=lambda: float(next(ticks))))
    before, after = numbers(model, plan), numbers(model, found)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("not reached in the minutes" in note for note in quantization_notes({"tuning": found.tuned}))


def test_slow_first_steps_do_not_shorten_what_follows() -> None:
    times = iter([0.0, 20.0, 26.0, 50.0])  # at the beginning, after 2, 8 and 32 steps
    pace = tune_module._Pace(tuning(clock=lambda: next(times)), 100.0, 600)
    assert [pace(done) for done in (0, 1, 2, 7, 8, 31, 32)] == [600, 600, 10, 10, 82, 82, 82]


@pytest.mark.parametrize(("minutes", "count", "said"), [
    (1, MIN_TUNING_TOKENS - 1, f"needs {MIN_TUNING_TOKENS}"), (0, MIN_TUNING_TOKENS, "for 0 minutes"),
    (float("nan"), MIN_TUNING_TOKENS, "for nan minutes"),
])  # fmt: skip
def test_too_little_text_or_time_is_refused_before_any_work(minutes: float, count: int, said: str) -> None:
    with pytest.raises(QuantizeError, match=said):
        Tuning(minutes=minutes, tokens=tokens(count))


@pytest.mark.parametrize("quantize", ["none", "keep", "keep:scales8"])
def test_a_quantization_without_codes_of_its_own_is_refused(quantize: str) -> None:
    with pytest.raises(ExportError, match="no codes of its own to tune"):
        ExportOptions(quantize=quantize, tuning=tuning())


def test_a_model_that_is_no_stack_of_layers_is_refused_before_any_work(tmp_path: Path) -> None:
    said: list[str] = []
    options = ExportOptions(quantize="int4", tuning=tuning())
    with pytest.raises(QuantizeError, match="no stack of layers"):
        export(make("memory"), tmp_path / "b", options=options, progress=lambda what, share: said.append(what))
    with pytest.raises(QuantizeError, match="answers sources"):
        export(bart_model(), tmp_path / "b", options=options, progress=lambda what, share: said.append(what))
    assert said == [] and list(tmp_path.iterdir()) == []


class Skipping(nn.Module):
    """Reads the first layer again at the end, which no single layer's output holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(VOCAB, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        given: Sequence[Tensor] = [self.embedding(ids)]
        for layer in self.layers:
            given = [*given, layer(given[-1] + (given[1] if len(given) > 2 else 0))]
        return given[-1]


def test_a_layer_that_reads_more_than_the_one_before_it_is_refused_by_name(tmp_path: Path) -> None:
    model = Skipping()
    model.config = type("Config", (), {"vocab_size": VOCAB})()  # type: ignore[assignment]
    stream = LayerStream(
        shell_of(model), OwnWeights(model), torch.tensor(tokens(64)).view(8, 8), [f"layers.{i}" for i in range(3)],
        tmp_path / "x",
    )  # fmt: skip
    weights = OwnWeights(model)
    stream.advance(stream.parameters(weights))
    stream.advance(stream.parameters(weights))
    with pytest.raises(QuantizeError, match=r"layers\.2 reads NaN, or more"):
        stream.call(range(8))


def test_a_model_of_the_general_road_is_tuned(tmp_path: Path) -> None:
    model = GeneralModel(build("llama")).eval()
    text = [token % model.config.vocab_size for token in tokens()]
    options = ExportOptions(quantize="3:16:asymmetric", tuning=tuning(tokens=text))
    exported = export(model, tmp_path / "b", options=options)
    assert exported.verification.ok
    assert any("2 of 2 layers are tuned" in note for note in exported.notes)


def test_layers_without_caches_are_not_run_by_themselves(tmp_path: Path) -> None:
    model = GeneralModel(build("openai-gpt")).eval()
    text, weights = torch.tensor(tokens(64)).view(8, 8) % model.config.vocab_size, OwnWeights(model)
    stream = LayerStream(shell_of(model), weights, text, list(layer_modules(model)), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"tell no cache .* leave --tune out"):
        stream.advance(stream.parameters(weights))


def test_a_tuned_bundle_holds_its_checks_and_says_what_was_done(tmp_path: Path) -> None:
    model, kept = make("decoder"), tmp_path / "b.tuning"
    options = ExportOptions(quantize="4:32:asymmetric", tuning=tuning(directory=kept))
    exported = export(model, tmp_path / "b", options=options)
    assert not kept.exists()
    checks = verify(Bundle(tmp_path / "b"), open_session(Bundle(tmp_path / "b"))).checks
    assert all(check.ok for check in checks)
    assert any(check.name.startswith("exact") for check in checks)  # the same numbers in PyTorch
    told = exported.bundle.manifest.quantization["tuning"]
    assert set(told["layers"]) == set(layer_modules(model)) and told["seed"] == 0
    assert any("layers are tuned" in note for note in exported.notes)


def test_ctrl_c_leaves_finished_layers_and_no_half_bundle(tmp_path: Path) -> None:
    model = make("decoder")

    def interrupt(what: str, share: float) -> None:
        if what.startswith("tuning layers · 2"):
            raise KeyboardInterrupt

    options = ExportOptions(quantize="4:32:asymmetric", tuning=tuning(directory=tmp_path / "b.tuning"))
    with pytest.raises(KeyboardInterrupt):
        export(model, tmp_path / "b", options=options, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tuning"]


def test_gains_of_norms_are_the_same_in_the_graph_and_in_both_references() -> None:
    model = make("decoder")
    graph, plan = planned(model, "cpu", "4:32:asymmetric")
    gains = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    before = {name: graph.graph.initializers[name].const_value.numpy().copy() for name in gains}
    paths, weights = list(layer_modules(model)), OwnWeights(model)
    found = tuned(plan, model, weights, paths, [graph], tuning(steps=1, distilling_steps=8))
    assert found.vectors.keys() == gains.keys()
    shell = shell_of(model)
    streamed = quantized_stream(shell, weights, found)[1]
    whole = numbers(model, found)
    for name, gain in gains.items():
        factor = found.vectors[name]
        assert (factor != 1).any()
        np.testing.assert_array_equal(graph.graph.initializers[name].const_value.numpy(), before[name] * factor)
        np.testing.assert_array_equal(whole[name].detach().numpy(), gain.detach().numpy() * factor)
        np.testing.assert_array_equal(streamed.read(name).numpy(), gain.detach().numpy() * factor)


def test_auto_tunes_what_it_builds_and_may_take_two_bits_then(tmp_path: Path) -> None:
    model = make("decoder")
    windows, held_out = divide(tokens(8192), CONTEXT, 2048)
    job = Automatic(
        model=model, weights=OwnWeights(model), target=find_target("cpu"), calibration=windows, held_out=held_out,
        tuning=tuning(steps=2, distilling_steps=1),
    )  # fmt: skip
    uses = Uses(job.graph())
    offered = candidates_of(uses, integer_products=False, tuned=True)
    schemes = {c.name: min(c.schemes, key=lambda s: s.bits) for c in offered}
    assert {s.bits for s in schemes.values()} == {2, 3}  # tables have 3 at the least
    assert all(s.bits > 2 for c in candidates_of(uses, integer_products=False) for s in c.schemes)
    weighed = job.weigh(schemes, tmp_path)
    assert list(tmp_path.iterdir()) == []
    built = job.build(schemes, {}, tmp_path, lambda what, share: None)
    assert set(built.plan.tuned["layers"]) == set(layer_modules(model))
    assert weighed == pytest.approx(built.nbytes, abs=64)


def test_text_that_is_held_out_is_not_learned_from(tmp_path: Path) -> None:
    held = [list(range(1000)), list(range(1000))]
    read = Calibration(tokens=list(range(9000)), windows=[], held_out=held)
    found = tuning_of(1, read, tmp_path / "b")
    assert list(found.tokens) == list(range(7000)) and found.directory == tmp_path / "b.tuning"
    assert len(tuning_of(1, dataclasses.replace(read, tokens=[0] * 90_000), tmp_path).tokens) == MOST_TUNING_TOKENS
    with pytest.raises(QuantizeError, match="has 500 tokens"):
        tuning_of(1, dataclasses.replace(read, tokens=[0] * 2500), tmp_path)


def test_tuning_without_a_text_is_refused_with_the_option_that_gives_one(tmp_path: Path) -> None:
    asked = [str(tmp_path / "x"), "-o", str(tmp_path / "b"), "--quantize", "int4", "--tune", "1"]
    result = CliRunner().invoke(command, asked)
    assert result.exit_code == 2 and "add --calibrate FILE" in result.output


def test_a_bar_shows_how_a_stage_is_getting_on_in_the_stages_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    monkeypatch.setattr(progress_module, "error_is_terminal", lambda: True)
    with progress_module.stages() as tell:
        tell("tuning layers · 1 of 2", 0.0)
        tell("tuning layers · 2 of 2, error 0.5 of what it was", 0.5)
        tell("writing", 0.0)
        bars = next(cell.cell_contents for cell in tell.__closure__ or () if isinstance(cell.cell_contents, Progress))
        shown.append([task.description for task in bars.tasks])
    assert shown == [["tuning layers · 2 of 2, error 0.5 of what it was", "writing"]]
