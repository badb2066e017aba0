"""A fading memory and a short convolution against their definitions, one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgellm.models.layers import CausalConv
from edgellm.models.protocol import Step
from edgellm.ops import linear_attention, running_max

BATCH, HEADS, KEYS, VALUES = 2, 4, 5, 3


def memory(time: int, groups: int, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v, the memory before, and decays."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(BATCH, time, groups * KEYS, generator=g, dtype=torch.float64) for _ in range(2))
    v = torch.randn(BATCH, time, HEADS * VALUES, generator=g, dtype=torch.float64)
    past = torch.randn(BATCH, HEADS, KEYS, VALUES, generator=g, dtype=torch.float64)
    return q, k, v, past, -3 * torch.rand(BATCH, time, HEADS, generator=g, dtype=torch.float64)


def token_by_token(q: Tensor, k: Tensor, v: Tensor, s: Tensor, decay: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    shared, outputs = HEADS // groups, []
    for t in range(q.shape[1]):
        rows = []
        for head in range(HEADS):
            mine = slice(head // shared * KEYS, (head // shared + 1) * KEYS)
            new = k[:, t, mine, None] * v[:, t, None, head * VALUES : (head + 1) * VALUES]
            rows.append(decay[:, t, head, None, None].exp() * s[:, head] + new)
        s = torch.stack(rows, 1)
        outputs += [torch.cat([
            (q[:, t, None, h // shared * KEYS : (h // shared + 1) * KEYS] @ s[:, h])[:, 0] for h in range(HEADS)
        ], -1)]  # fmt: skip
    return torch.stack(outputs, 1), s


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 9, 140])
def test_linear_attention_is_its_recurrence(groups: int, time: int) -> None:
    q, k, v, past, decay = memory(time, groups)
    found = linear_attention(q, k, v, decay, past, num_heads=HEADS, num_groups=groups)
    for a, b in zip(found, token_by_token(q, k, v, past, decay, groups), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_linear_attention_without_a_memory_starts_from_zeros() -> None:
    q, k, v, past, decay = memory(7, 2)
    found = linear_attention(q, k, v, decay, None, num_heads=HEADS, num_groups=2)
    expected = linear_attention(q, k, v, decay, torch.zeros_like(past), num_heads=HEADS, num_groups=2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_linear_attention_is_learned_even_where_all_is_forgotten_at_once() -> None:
    q, k, v, past, decay = memory(4, 2)
    decay[:, 1] = -1e4
    inputs = [x.requires_grad_() for x in (q, k, v, decay, past)]
    call = torch.autograd.gradcheck(lambda *x: linear_attention(*x, num_heads=HEADS, num_groups=2), inputs)
    assert call


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 19)), padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_memory_read_in_pieces_with_padding_is_the_whole(cuts: set[int], padding: int, seed: int) -> None:
    q, k, v, past, decay = memory(20, 2, seed)
    whole, end = linear_attention(q, k, v, decay, past, num_heads=HEADS, num_groups=2)
    pieces, s = [], past
    for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), 20], strict=True):
        zeros = [torch.cat([x[:, start:stop], x[:, :padding] * 0], 1) for x in (k, v, decay)]
        asked = torch.cat([q[:, start:stop], q[:, :padding]], 1)
        y, s = linear_attention(asked, zeros[0], zeros[1], zeros[2], s, num_heads=HEADS, num_groups=2)
        pieces.append(y[:, : stop - start])
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(s, end, rtol=1e-10, atol=1e-10)


def read(conv: CausalConv, x: Tensor, state: dict[str, Tensor], lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    step = Step.whole(x[..., 0].long())._replace(lengths=torch.tensor(lengths, dtype=torch.int32))
    y, present = conv(x, state, "layer", step)
    return y, present


def fresh(conv: CausalConv, rows: int) -> dict[str, Tensor]:
    return {s.name: torch.zeros(s.resolve(rows, 1), dtype=torch.float64) for s in conv.state_specs("layer", "float64")}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_a_causal_convolution_is_a_padded_one_of_each_feature(taps: int, bias: bool) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Conv1d(6, 6, taps, groups=6, bias=bias, padding=taps - 1).double()
    ours = CausalConv(6, taps, bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = theirs(x.transpose(1, 2))[:, :, :9].transpose(1, 2)
    found, kept = read(ours, x, fresh(ours, 2), [9, 9])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(kept["layer.conv"], x[:, 10 - taps :])
    found, kept = read(ours, x, {}, [9, 9])
    torch.testing.assert_close(found, expected)
    assert kept == {}


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=2), first=st.integers(1, 6))
def test_a_convolution_goes_on_from_each_rows_last_valid_token(lengths: list[int], first: int) -> None:
    torch.manual_seed(0)
    conv, x = CausalConv(5, 4, bias=True).double(), torch.randn(2, 13, 5, dtype=torch.float64)
    whole, _ = read(conv, x, {}, [13, 13])
    _, state = read(conv, x[:, :first], fresh(conv, 2), [first, first])
    chunk = x[:, first : first + 6].clone()
    for row, n in enumerate(lengths):
        chunk[row, n:] = 77.0  # padding
    y, state = read(conv, chunk, state, lengths)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y[row, :n], whole[row, first : first + n])
        rest = {name: value[row : row + 1] for name, value in state.items()}
        following, _ = read(conv, x[row : row + 1, first + n :], rest, [1])
        torch.testing.assert_close(following[0], whole[row, first + n :])


def test_the_largest_so_far_is_the_same_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, first = torch.randn(2, 9, 3), torch.randn(2, 3)
    expected = torch.stack([torch.cat([first[:, None], x[:, : t + 1]], 1).amax(1) for t in range(9)], 1)
    assert torch.equal(running_max(x, first), expected)
    monkeypatch.setattr("edgellm.ops.running.capturing", lambda: True)
    assert torch.equal(running_max(x, first), expected)
