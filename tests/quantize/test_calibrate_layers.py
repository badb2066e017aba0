"""GPTQ some windows at a time and a layer at a time, against one batch of all windows."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, make
from general_models import build
from test_codes_on_disk import room_for
from torch import Tensor, nn

from edgellm.general.model import GeneralModel
from edgellm.streaming import OwnWeights
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.graph.layers import layer_modules
from edgellm_exporters.quantize import calibrate, calibrate_layers, curvature, gptq
from edgellm_exporters.quantize.calibrate import quantize_in_turn
from edgellm_exporters.quantize.calibrate_layers import calls_of
from edgellm_exporters.quantize.codes_on_disk import ChosenCodes
from edgellm_exporters.quantize.curvature import Curvature
from edgellm_exporters.quantize.plan import Codes, Scheme, joined
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_exporters.quantize.tuning.layer_stream import _room_for, shell_of
from edgellm_exporters.weights.scratch_file import ScratchFile

WINDOWS = np.random.default_rng(0).integers(0, VOCAB, (4, 24)).tolist()
SCHEME = Scheme(4, 16)
FAMILIES = (
    "decoder", "decoder untied with biases", "gated delta rule and attention", "state space, attention, MLP or experts",
)  # fmt: skip


def weights_of(model: nn.Module) -> list[str]:
    """Names of linear layers' weights; of one that is tied, the first."""
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m.in_features % SCHEME.block == 0}
    return [name for name, parameter in model.named_parameters() if id(parameter) in linears]


def chosen(
    model: Any, monkeypatch: pytest.MonkeyPatch, directory: Path, *, group: int | None, **more: Any
) -> Mapping[str, Codes]:
    """Codes of all linear layers, with so many tokens at a time; None: all windows in one batch."""
    windows = [[token % model.config.vocab_size for token in window] for window in WINDOWS]
    monkeypatch.setattr(calibrate, "_WHOLE_BYTES", 1 << 60 if group is None else 0)
    monkeypatch.setattr(calibrate_layers, "GROUP_TOKENS", group or 1)
    schemes = dict.fromkeys(weights_of(model), SCHEME)
    columns = {name: np.full(model.get_parameter(name).shape[1], 0.5, np.float32) for name in list(schemes)[1::2]}
    rows = {name: np.full(model.get_parameter(name).shape[0], 2, np.float32) for name in list(schemes)[::3]}
    paths = list(layer_modules(model))
    return quantize_in_turn(model, windows, schemes, columns, rows, layers=paths, scratch=directory, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_at_a_time_chooses_the_codes_of_one_pass(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    model = make(family)
    assert calls_of(model, OwnWeights(model), 1, list(layer_modules(model)), weights_of(model)) is not None
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole, found = (chosen(model, monkeypatch, tmp_path, group=group) for group in (None, 1 << 20))
    assert set(found) == set(whole) and len(found) > 5
    for name in found:
        np.testing.assert_array_equal(found[name].codes, whole[name].codes)
        np.testing.assert_array_equal(found[name].scales, whole[name].scales)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_layers_of_the_general_road_are_run_by_themselves(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """Their attention serves the call that they were called in, which is over by then."""
    model = GeneralModel(build(kind)).eval()
    assert calls_of(model, OwnWeights(model), 1, list(layer_modules(model)), weights_of(model)) is not None
    whole, found = (chosen(model, monkeypatch, tmp_path, group=group) for group in (None, 1 << 20))
    assert set(found) == set(whole) and found
    for name in found:
        np.testing.assert_array_equal(found[name].codes, whole[name].codes)


def test_windows_a_few_at_a_time_leave_the_same_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sums of parts round otherwise than the whole sum, which may move a code that lies between two."""
    model = make("decoder untied with biases")
    whole, found = (chosen(model, monkeypatch, tmp_path, group=group) for group in (None, 24))
    with torch.no_grad():
        expected = model(torch.tensor(WINDOWS))[0]

    def error(codes: Mapping[str, Codes]) -> float:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for number, name in enumerate(weights_of(model)):
                weight = torch.from_numpy(codes[name].dequantize())
                other.get_parameter(name).copy_(weight / (0.5 if number % 2 else 1) / (2 if number % 3 == 0 else 1))
            return float((other(torch.tensor(WINDOWS))[0] - expected).square().mean())

    assert error(found) == pytest.approx(error(whole), rel=0.05)


def test_weights_that_are_read_one_by_one_get_the_same_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make("decoder")
    held = chosen(model, monkeypatch, tmp_path, group=48)
    read = chosen(shell_of(model), monkeypatch, tmp_path, group=48, weights=OwnWeights(model))
    assert set(held) == set(read)
    for name in held:
        np.testing.assert_array_equal(held[name].codes, read[name].codes)


@pytest.mark.parametrize("family", ["memory", "state space and shared attention"])
def test_what_is_called_twice_or_computed_is_passed_at_once(family: str) -> None:
    model = make(family)
    assert calls_of(model, OwnWeights(model), 1, list(layer_modules(model)), weights_of(model)) is None
    assert calls_of(make("decoder"), OwnWeights(model), 1, [], weights_of(model)) is None


class Remembering(nn.Module):
    """The last layer reads what the first one gave: as a list that the layers share, or as an argument."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.embedding, self.shared = nn.Embedding(VOCAB, 16), shared
        self.layers = nn.ModuleList(Remembered(16, last=number == 2) for number in range(3))
        self.head = nn.Linear(16, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, met = self.embedding(ids), list[Tensor]()
        for layer in self.layers:
            x = layer(x, met if self.shared else tuple(met))
            met += [] if self.shared else [x]
        return self.head(x), {}


class Remembered(nn.Module):
    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(width, width), last

    def forward(self, x: Tensor, met: Any) -> Tensor:
        y: Tensor = self.linear(x + (met[0] if self.last else 0))
        if isinstance(met, list):
            met.append(y)
        return y


@pytest.mark.parametrize("shared", [False, True])
def test_layers_that_read_more_than_the_one_before_them_are_passed_at_once(
    shared: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Remembering(shared)
    assert calls_of(model, OwnWeights(model), 1, list(layer_modules(model)), weights_of(model)) is None
    whole, found = (chosen(model, monkeypatch, tmp_path, group=group) for group in (None, 24))
    assert len(found) == 4
    for name in found:
        np.testing.assert_array_equal(found[name].codes, whole[name].codes)


@pytest.mark.parametrize("wrong", [float("nan"), 1e6])
@pytest.mark.parametrize("group", [None, 24])
def test_a_weight_that_no_scale_holds_is_refused_by_name(
    wrong: float, group: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make("decoder untied with biases")
    name = weights_of(model)[-1]  # nothing reads what it gives
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = wrong
    with pytest.raises(QuantizeError, match=f"{name} holds (NaN or infinite weights|weights of up to 1e)"):
        chosen(model, monkeypatch, tmp_path, group=group)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no room can be reserved here")
def test_outputs_have_their_room_on_disk_before_they_are_written(tmp_path: Path) -> None:
    """A full disk would end the process with a signal when a page is written."""
    found = _room_for(tmp_path / "x", (4, 128, 64))
    assert (tmp_path / "x").stat().st_blocks * 512 >= found.nbytes == 4 * 4 * 128 * 64
    with room_for(100_000), pytest.raises(OSError):
        _room_for(tmp_path / "x", (4, 128, 64))
    found[2] = 3
    assert not found[:2].any() and (found[2] == 3).all()


@pytest.mark.parametrize("held_bytes", [0, 1 << 30])
def test_the_factor_is_that_of_the_inverse_on_disk_as_in_memory(
    held_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    """LAPACK's factor of the inverse, as the paper has it, is the reference for the one that is made in place."""
    monkeypatch.setattr(curvature, "_HELD_BYTES", held_bytes)
    monkeypatch.setattr(curvature, "_STEP", 24)
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 7] = 0
    hessian = x.T @ x
    damped = hessian.clone()
    damped[7, 7] = 1
    damped.diagonal().add_(curvature._DAMPING * damped.diagonal().mean())
    found = Curvature(hessian, tmp_path)
    torch.testing.assert_close(found.damped(), damped.float())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for _ in range(2):
        torch.testing.assert_close(found.factor(), expected.float(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(QuantizeError, match="not finite or degenerate"):
        Curvature(torch.full((32, 32), wrong)).factor()


def test_a_weight_is_quantized_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 64, generator=generator), torch.randn(48, 64, generator=generator).numpy()
    whole = gptq.gptq(weight, x.T @ x, SCHEME)
    monkeypatch.setattr(gptq, "_ROWS_BYTES", 4 * 64 * 20)
    read: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> Any:
        read.append((start, stop))
        return weight[start:stop]

    found = joined(gptq.gptq_by_rows(rows, 48, Curvature(x.T @ x), SCHEME))
    assert read == [(0, 20), (20, 40), (40, 48)]
    assert (found.codes != whole.codes).mean() < 0.01  # products of fewer rows may be summed in another order
    assert found.codes.shape == whole.codes.shape


@pytest.mark.parametrize("full", [False, True])
def test_chosen_codes_are_read_whole_and_by_rows_from_disk_and_where_it_is_full(
    full: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    def no_room(*_: object) -> None:
        raise OSError("no space left")

    if full:
        monkeypatch.setattr(ScratchFile, "write", no_room)
    generator = np.random.default_rng(0)
    weights = {"large": generator.normal(size=(600, 512)), "small": generator.normal(size=(8, 32))}
    codes = {name: round_to_nearest(w.astype(np.float32), SCHEME) for name, w in weights.items()}
    kept = ChosenCodes(tmp_path)
    for name, each in codes.items():
        third = len(each.codes) // 3  # some parts are kept on disk, and a weight of few codes in memory
        kept.add(name, (each.of_rows(*rows) for rows in [(0, third), (third, len(each.codes))]), SCHEME.bits)
    assert list(kept) == ["large", "small"] and "other" not in kept
    for name, each in codes.items():
        np.testing.assert_array_equal(kept[name].dequantize(), each.dequantize())
        for start, stop in [(0, 2), (3, 7), (1, 8), (len(each.codes) // 3, len(each.codes))]:
            np.testing.assert_array_equal(kept.rows(name, start, stop).dequantize(), each.dequantize()[start:stop])
