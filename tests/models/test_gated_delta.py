"""The gated delta rule over whole chunks against its definition, one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgellm.ops import gated_delta
from edgellm.ops.gated_delta import gated_delta_reference

BATCH, HEADS, KEYS, VALUES = 2, 4, 5, 3


def memory(time: int, groups: int, seed: int = 0) -> list[Tensor]:
    """q, k, v, decays, shares of what is corrected, and the memory before."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(BATCH, time, groups, KEYS, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(BATCH, time, HEADS * VALUES, generator=g, dtype=torch.float64)
    past = torch.randn(BATCH, HEADS, KEYS, VALUES, generator=g, dtype=torch.float64)
    fades, beta = (torch.rand(BATCH, time, HEADS, generator=g, dtype=torch.float64) for _ in range(2))
    return [q.flatten(2), F.normalize(k, dim=-1).flatten(2), v, -2 * fades, beta, past]


def naive(given: list[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Head by head and token by token."""
    q, k, v, decay, beta, past = given
    s, outputs = past.clone(), torch.zeros_like(v)
    for t in range(q.shape[1]):
        for head in range(HEADS):
            mine = slice(head * groups // HEADS * KEYS, (head * groups // HEADS + 1) * KEYS)
            value = slice(head * VALUES, (head + 1) * VALUES)
            for row in range(BATCH):
                faded = decay[row, t, head].exp() * s[row, head]
                wrong = v[row, t, value] - k[row, t, mine] @ faded
                s[row, head] = faded + beta[row, t, head] * torch.outer(k[row, t, mine], wrong)
                outputs[row, t, value] = q[row, t, mine] @ s[row, head]
    return outputs, s


@pytest.mark.parametrize("form", [gated_delta, gated_delta_reference])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 9, 70])
def test_every_form_is_the_recurrence(time: int, groups: int, form: type) -> None:
    given = memory(time, groups)
    found = form(*given, num_heads=HEADS, num_groups=groups)
    for a, b in zip(found, naive(given, groups), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_key_again_and_again_loses_no_digits() -> None:
    """Where a text repeats itself, powers of the triangular system would grow beyond what floats hold."""
    q, k, v, decay, beta, past = memory(64, 2)
    k = k[:, :1].expand_as(k)
    given = [q, k, v, decay * 0, beta * 0 + 0.95, past]
    single = [x.float() for x in given]
    expected, _ = gated_delta_reference(*given, num_heads=HEADS, num_groups=2)
    found, _ = gated_delta(*single, num_heads=HEADS, num_groups=2)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_without_a_memory_it_starts_from_zeros() -> None:
    *given, past = memory(7, 2)
    for form in (gated_delta, gated_delta_reference):
        found = form(*given, None, num_heads=HEADS, num_groups=2)
        expected = form(*given, torch.zeros_like(past), num_heads=HEADS, num_groups=2)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_it_is_learned() -> None:
    given = [x.requires_grad_() for x in memory(4, 2)]
    assert torch.autograd.gradcheck(lambda *x: gated_delta(*x, num_heads=HEADS, num_groups=2), given)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 19)), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_memory_read_in_pieces_with_padding_is_the_whole(cuts: set[int], padding: int, seed: int) -> None:
    *given, past = memory(20, 2, seed)
    whole, end = gated_delta(*given, past, num_heads=HEADS, num_groups=2)
    pieces, s = [], past
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 20], strict=True):
        q, k, v, decay, beta = (torch.cat([x[:, start:stop], x[:, :padding]], 1) for x in given)
        decay[:, stop - start :], beta[:, stop - start :] = 0.0, 0.0
        y, s = gated_delta(q, k, v, decay, beta, s, num_heads=HEADS, num_groups=2)
        pieces.append(y[:, : stop - start])
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s, end, rtol=1e-9, atol=1e-9)
