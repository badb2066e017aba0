"""The chunk form of a selective scan equals the loop that defines it, and its state carries over."""

from __future__ import annotations

import pytest
import torch

from edgellm.ops.selective_scan import selective_scan, selective_scan_reference

WIDTH, STATE = 6, 5


def inputs(time: int) -> list[torch.Tensor]:
    """x, dt, a, b, c and what came before."""
    torch.manual_seed(time)
    shapes = ((2, time, WIDTH), (2, time, WIDTH), (WIDTH, STATE), (2, time, STATE), (2, time, STATE), (2, WIDTH, STATE))
    x, dt, a, b, c, past = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, dt.abs(), -a.abs(), b, c, past]


@pytest.mark.parametrize("time", [1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize("before", [True, False])
def test_a_chunk_in_rounds_equals_token_after_token(time: int, before: bool) -> None:
    *given, past = inputs(time)
    found = selective_scan(*given, past if before else None)
    expected = selective_scan_reference(*given, past if before else None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_both_forms_have_one_gradient() -> None:
    *given, past = inputs(9)
    given = [x.requires_grad_() for x in given]
    found, expected = (
        torch.autograd.grad(sum((y**2).sum() for y in form(*given, past)), given)
        for form in (selective_scan, selective_scan_reference)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_decays_of_thousands_leave_nothing_and_no_faults() -> None:
    """Sums of logarithms are never turned round, so that nothing overflows."""
    x, dt, a, b, c, past = inputs(20)
    y, present = selective_scan(x, 1000 * dt, a, b, c, past)
    assert y.isfinite().all()
    torch.testing.assert_close(present, selective_scan_reference(x, 1000 * dt, a, b, c, past)[1])


def test_a_step_of_nothing_leaves_the_state_as_it_was() -> None:
    x, dt, a, b, c, past = inputs(8)
    dt[:, 3:] = 0
    _, padded = selective_scan(x, dt, a, b, c, past)
    _, short = selective_scan(x[:, :3], dt[:, :3], a, b[:, :3], c[:, :3], past)
    torch.testing.assert_close(padded, short)
