"""What end-to-end tuning is made of: weights that use their gradients up, divergence, and a model's own words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import CONTEXT, VOCAB, make
from test_tuning import plan_of, run, tokens, tuning
from torch import Tensor

from edgellm.streaming import OwnWeights
from edgellm_exporters.quantize.plan import Scheme
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_exporters.quantize.tuning import own_words as own_words_module
from edgellm_exporters.quantize.tuning import tune as tune_module
from edgellm_exporters.quantize.tuning.distill import _Model
from edgellm_exporters.quantize.tuning.divergence import divergence
from edgellm_exporters.quantize.tuning.held import HeldWeights
from edgellm_exporters.quantize.tuning.layer_stream import shell_of
from edgellm_exporters.quantize.tuning.learned import LearnedWeight, product, whole
from edgellm_exporters.quantize.tuning.own_words import own_words
from edgellm_exporters.quantize.tuning.reading import Reading, fast_products

SCHEME = Scheme(4, 16, symmetric=False)


def learned(rows: int = 6, columns: int = 64) -> tuple[LearnedWeight, Tensor]:
    """A weight with factors, and what its codes stand for."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw)
    column, row = torch.rand(columns, generator=draw) + 0.5, torch.rand(rows, generator=draw) + 0.5
    codes = round_to_nearest((weight * column * row[:, None]).numpy(), SCHEME)
    return LearnedWeight(codes, SCHEME, column, row), torch.from_numpy(codes.dequantize()) / column / row[:, None]


def test_a_product_with_a_learned_weight_is_that_with_what_its_codes_stand_for() -> None:
    weight, wide = learned()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    taken: list[Tensor] = []
    weight.take = taken.append  # type: ignore[method-assign]
    anchor = torch.zeros((), requires_grad=True)
    y = product(x, anchor, weight, torch.float32)
    plain_x, plain = x.detach().clone().requires_grad_(), wide.clone().requires_grad_()
    expected = F.linear(plain_x, plain)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert plain.grad is not None
    torch.testing.assert_close(x.grad, plain_x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(taken[0], plain.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole(anchor, weight), wide)


def test_gradients_of_one_step_are_added_before_anything_moves() -> None:
    (once, _), (twice, _) = learned(), learned()
    gradient = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    once.take(gradient)
    twice.take(0.25 * gradient)
    before = twice.whole(torch.float32)
    twice.take(0.75 * gradient)
    torch.testing.assert_close(twice.whole(torch.float32), before, rtol=0, atol=0)
    torch.testing.assert_close(twice._momentum, once._momentum, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(twice._of_factor, once._of_factor)


def test_steps_bring_a_learned_weight_nearer_to_what_is_wanted() -> None:
    weight, wide = learned()
    start = weight.codes()
    wanted = wide * 1.02 + 0.3 * torch.randn(wide.shape, generator=torch.Generator().manual_seed(3)) * wide.std()
    errors = []
    for _ in range(60):
        error = weight.whole(torch.float32) - wanted
        errors.append(float(error.square().mean()))
        weight.take(2 * error)
        weight.step(codes=0.05, scales=1e-3)
    found = weight.codes()
    assert errors[-1] < 0.6 * errors[0]
    assert (found.codes != start.codes).any() and found.codes.max() <= SCHEME.top
    assert (np.sign(found.scales) == np.sign(start.scales)).all()


def test_rows_whose_gradient_is_next_to_nothing_do_not_drift_with_the_others() -> None:
    weight, wide = learned()
    gradient = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    gradient[3:] *= 1e-4  # words that are never met
    for _ in range(20):
        weight.take(gradient)
        weight.step(codes=0.01, scales=1e-3)
    moved = (weight.whole(torch.float32) - wide).abs().mean(-1)
    assert (moved[:3] > 0.005 * wide.abs().mean()).all()
    assert (moved[3:] < 1e-3 * moved[:3].mean()).all()


def test_the_divergence_and_its_gradient_are_pytorchs() -> None:
    draw = torch.Generator().manual_seed(4)
    given, wanted = (torch.randn(2, 70, 33, generator=draw) for _ in range(2))
    ours, plain = given.clone().requires_grad_(), given.clone().requires_grad_()
    found = divergence(ours, wanted.clone())
    expected = F.kl_div(
        F.log_softmax(plain, -1), F.log_softmax(wanted, -1), reduction="none", log_target=True
    ).sum(-1)  # fmt: skip
    torch.testing.assert_close(found, expected)
    (found.mean() * 3).backward()
    (expected.mean() * 3).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("family", ["decoder", "mixed"])
def test_own_words_are_drawn_from_the_models_distributions_and_the_seed_alone(family: str) -> None:
    model: Any = make(family)
    shell = shell_of(model)
    held = HeldWeights(shell, OwnWeights(model))
    held._dtype = torch.float32
    first, again, other = (own_words(shell, held, 8, 12, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (8, 12) and int(first.min()) >= 0 and int(first.max()) < VOCAB
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first != other).any()
    with torch.no_grad():
        likeliest = model(first)[0].argmax(-1)
    torch.testing.assert_close(first[:, 1:4], likeliest[:, :3], rtol=0, atol=0)  # before anything is drawn
    assert (first[:, 4:] != likeliest[:, 3:-1]).any()


def test_own_words_are_written_by_few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make("decoder")
    shell = shell_of(model)
    held, at_once, told = HeldWeights(shell, OwnWeights(model)), list[int](), list[float]()
    shell.register_forward_pre_hook(lambda _, given: at_once.append(len(given[0])))
    monkeypatch.setattr(own_words_module, "ROWS", 3)
    found = own_words(shell, held, 8, 6, torch.Generator().manual_seed(0), told.append)
    assert found.shape == (8, 6)
    assert at_once == [3] * 5 + [3] * 5 + [2] * 5
    assert told == sorted(told) and told[-1] <= 1


@pytest.mark.parametrize("family", ["decoder", "mixed"])
def test_a_shell_with_weights_held_apart_gives_the_models_own_logits(family: str) -> None:
    model: Any = make(family)
    shell = shell_of(model)
    held = HeldWeights(shell, OwnWeights(model))
    held._dtype = torch.float32
    text = torch.tensor(tokens(48)).view(2, 24)
    with torch.no_grad(), Reading(held):
        found = shell(text)[0]
    torch.testing.assert_close(found, model(text)[0].detach(), rtol=1e-4, atol=1e-4)


def test_text_of_the_models_own_is_learned_from_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("decoder")
    read: list[int] = []
    distill = tune_module.distilled

    def counted(*given: Any, **named: Any) -> Any:
        read.append(named["learn"])
        return distill(*given, **named)

    monkeypatch.setattr(tune_module, "distilled", counted)
    with_own = run(model, plan_of(model), tuning(own_tokens=1024, distilling_steps=2))
    without = run(model, plan_of(model), tuning(own_tokens=0, distilling_steps=2))
    assert 0 < read[0] - read[1] == with_own.tuned["own_tokens"] // CONTEXT
    assert without.tuned["own_tokens"] == 0


def test_rows_of_a_table_without_codes_have_no_gradient() -> None:
    model: Any = make("decoder")
    found = _Model(shell_of(model), OwnWeights(model), {}, (), ()).rows("embedding.weight", torch.tensor([3, 1]))
    assert not found.requires_grad
    torch.testing.assert_close(found, model.embedding.weight[[3, 1]].detach(), rtol=0, atol=0)


def test_the_precision_of_products_is_put_back() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with pytest.raises(KeyError), fast_products():
        raise KeyError
    assert matmul.fp32_precision == before
