"""More minutes of tuning: more text of the model's own and more steps of each layer, the same on any machine."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from hypothesis import given
from hypothesis import strategies as st
from test_tuning import numbers, plan_of, run, tokens, tuning

from edgellm.streaming import OwnWeights
from edgellm_exporters.quantize.tuning import own_words as own_words_module
from edgellm_exporters.quantize.tuning import tune as tune_module
from edgellm_exporters.quantize.tuning.held import HeldWeights
from edgellm_exporters.quantize.tuning.layer import LayerResult
from edgellm_exporters.quantize.tuning.layer_stream import shell_of
from edgellm_exporters.quantize.tuning.own_words import own_words
from edgellm_exporters.quantize.tuning.schedule import Schedule, schedule_of
from edgellm_exporters.quantize.tuning.store import FinishedLayers
from edgellm_exporters.quantize.tuning.tune import Tuning


@given(st.floats(0.01, 1e6), st.floats(0.01, 1e6))
def test_more_minutes_never_mean_less(one: float, other: float) -> None:
    few, many = (dataclasses.astuple(schedule_of(minutes)) for minutes in sorted((one, other)))
    assert all(a <= b for a, b in zip(few, many, strict=True))
    assert all(isinstance(each, int) and each > 0 for each in few)


def test_a_schedule_is_of_the_minutes_and_what_is_asked_for_goes_before() -> None:
    assert schedule_of(1) == Schedule(steps=60, layer_windows=128, own_tokens=16_384)
    assert schedule_of(24) == Schedule(steps=144, layer_windows=384, own_tokens=24_576)
    assert schedule_of(1e9) == Schedule(steps=240, layer_windows=640, own_tokens=40_960)
    asked = Tuning(minutes=24, tokens=tokens(), steps=7, own_tokens=0).schedule
    assert asked == dataclasses.replace(schedule_of(24), steps=7, own_tokens=0)


@pytest.mark.parametrize("minutes", [4, 24])
def test_layers_learn_from_as_many_windows_and_in_as_many_steps_as_the_minutes_are_for(
    minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def looked_at(*given: Any, learn: int, steps: Any, **named: Any) -> LayerResult:
        seen.append((learn, steps(0)))
        return LayerResult({}, 1.0, 1.0, 0)

    def unlearned(shell: Any, held: Any, rows: int, time: int, *rest: Any, **named: Any) -> torch.Tensor:
        return torch.zeros(rows, time, dtype=torch.int64)

    monkeypatch.setattr(tune_module, "tuned_layer", looked_at)
    monkeypatch.setattr(tune_module, "own_words", unlearned)
    monkeypatch.setattr(tune_module, "WINDOW", 8)
    model = make("decoder")
    run(model, plan_of(model), tuning(
        minutes=minutes, steps=None, own_tokens=None, distilling_steps=0, clock=lambda: 0.0,
    ))  # fmt: skip
    asked = schedule_of(minutes)
    assert set(seen) == {(asked.layer_windows, asked.steps)}


def test_text_that_there_is_no_time_for_is_left_out_and_the_rest_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make("decoder")
    shell = shell_of(model)
    held, answers = HeldWeights(shell, OwnWeights(model)), iter([False, True])
    monkeypatch.setattr(own_words_module, "ROWS", 3)
    whole = own_words(shell, held, 9, 6, torch.Generator().manual_seed(0))
    less = own_words(shell, held, 9, 6, torch.Generator().manual_seed(0), enough=lambda: next(answers))
    assert whole.shape == (9, 6)
    assert torch.equal(less, whole[:6])


def test_a_run_that_goes_on_takes_over_the_text_that_there_was_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_words_module, "ROWS", 8)
    model, ticks = make("decoder"), itertools.count(step=100)  # seconds: a quarter of the minutes is over at once
    plan = plan_of(model)
    options = tuning(
        minutes=20, own_tokens=2048, distilling_steps=0, directory=tmp_path / "b", clock=lambda: float(next(ticks))
    )
    first = run(model, plan, options)
    assert 0 < first.tuned["own_tokens"] < 2048
    kept = FinishedLayers(tmp_path / "b", (tmp_path / "b" / "tuning.json").read_text())
    assert kept.load_words(2048 // 64, 64) is not None
    second = run(model, plan, dataclasses.replace(options, clock=lambda: 0.0))
    assert second.tuned["own_tokens"] == first.tuned["own_tokens"]
    before, after = numbers(model, first), numbers(model, second)
    assert all(torch.equal(before[name], after[name]) for name in before)
