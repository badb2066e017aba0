"""Attention over a ring is attention over all tokens under a window, however the tokens come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgellm.errors import ConfigError
from edgellm.models.hybrid import HybridConfig
from edgellm.ops import window_attention

HEADS, KV_HEADS, DIM, MOST = 4, 2, 6, 40
SIZES = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": DIM**-0.5}


def projected(seed: int, batch: int, time: int = MOST) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, time, heads * DIM, dtype=torch.float64, generator=rng)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def angles() -> tuple[Tensor, Tensor]:
    turned = torch.arange(MOST, dtype=torch.float64)[:, None] * 100 ** (-torch.arange(DIM // 2) / (DIM // 2))
    return turned.cos(), turned.sin()


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One row, one head, one token at a time, over lists: turned by position, then softmax(QK^T) V of the window."""
    cos, sin = angles()

    def head(x: Tensor, at: int, number: int) -> Tensor:
        first, second = x[at, number * DIM : (number + 1) * DIM].chunk(2)
        return torch.cat([first * cos[at] - second * sin[at], second * cos[at] + first * sin[at]])

    out = torch.zeros_like(q)
    for at in range(len(q)):
        for number in range(HEADS):
            shared, first = number // (HEADS // KV_HEADS), max(0, at - window + 1)
            keys = torch.stack([head(k, p, shared) for p in range(first, at + 1)])
            values = v[first : at + 1, shared * DIM : (shared + 1) * DIM]
            shares = (keys @ head(q, at, number) * SIZES["scale"]).softmax(0)
            out[at, number * DIM : (number + 1) * DIM] = shares @ values
    return out


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), window=st.integers(1, 9), more=st.integers(0, 5), batch=st.integers(1, 3), seed=st.integers(0, 99)
)
@torch.no_grad()
def test_any_chunks_of_ragged_rows_attend_as_the_definition_says(
    data: st.DataObject, window: int, more: int, batch: int, seed: int
) -> None:
    """Chunks shorter and longer than the ring, rows at different positions, padding that would show."""
    q, k, v = projected(seed, batch)
    expected = torch.stack([by_definition(q[row], k[row], v[row], window) for row in range(batch)])
    cos, sin = angles()
    ring = torch.full((batch, KV_HEADS, window + more, DIM), 7.0, dtype=torch.float64)
    past, past_k, past_v = torch.zeros(batch, dtype=torch.int32), ring, ring
    for _ in range(data.draw(st.integers(1, 5))):
        room = MOST - int(past.max())
        if room < 1:
            break
        lengths = data.draw(st.lists(st.integers(1, min(room, 18)), min_size=batch, max_size=batch))
        time = min(max(lengths) + data.draw(st.integers(0, 3)), room)
        pieces = [torch.full((batch, time, x.shape[2]), -50.0, dtype=torch.float64) for x in (q, k, v)]
        for row, n in enumerate(lengths):
            start = int(past[row])
            for piece, x in zip(pieces, (q, k, v), strict=True):
                piece[row, :n] = x[row, start : start + n]
        valid = torch.tensor(lengths, dtype=torch.int32)
        y, past_k, past_v = window_attention(*pieces, past_k, past_v, past, valid, cos, sin, window=window, **SIZES)
        for row, n in enumerate(lengths):
            start = int(past[row])
            torch.testing.assert_close(y[row, :n], expected[row, start : start + n], rtol=1e-9, atol=1e-9)
        past = past + valid
    slots = window + more
    for row in range(batch):  # each slot holds the values of the last token that belongs there, or what it held before
        total = int(past[row])
        for slot in range(slots):
            owner = max((p for p in range(total) if p % slots == slot), default=None)
            held = torch.full((KV_HEADS * DIM,), 7.0, dtype=torch.float64) if owner is None else v[row, owner]
            torch.testing.assert_close(past_v[row, :, slot].reshape(-1), held)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3, 12, 50])
def test_the_training_form_is_the_definition(window: int) -> None:
    q, k, v = projected(3, 2, 12)
    none = torch.zeros(2, dtype=torch.int32)
    y, *kept = window_attention(q, k, v, None, None, none, none + 12, *angles(), window=window, **SIZES)
    assert kept == [None, None]
    for row in range(2):
        torch.testing.assert_close(y[row], by_definition(q[row], k[row], v[row], window))


def test_a_window_is_learned_through() -> None:
    inputs = [x[:, :5].requires_grad_() for x in projected(1, 1, 5)]
    none = torch.zeros(1, dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, None, None, none, none + 5, *angles(), window=3, **SIZES)[0]

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("window", [0, 5, -1])
def test_a_window_that_the_ring_does_not_hold_is_refused(window: int) -> None:
    q, k, v = projected(0, 1, 2)
    ring, none = torch.zeros(1, KV_HEADS, 4, DIM, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"a window of {window} tokens over a ring of 4 slots"):
        window_attention(q, k, v, ring, ring, none, none + 2, None, None, window=window, **SIZES)


@pytest.mark.parametrize("window", [0, -1, 2.5, True])
def test_an_impossible_window_of_a_model_is_refused_by_name(window: object) -> None:
    with pytest.raises(ConfigError, match=f"window is {window!r}; it must be a positive whole number"):
        HybridConfig(vocab_size=8, pattern=("local",), window=window)  # type: ignore[arg-type]


def test_a_ring_is_as_large_as_its_window_whatever_the_context() -> None:
    from edgellm.models.hybrid import Hybrid

    model = Hybrid(HybridConfig(vocab_size=8, width=32, pattern=("local",), window=16, num_heads=2, num_kv_heads=1))
    assert [spec.update for spec in model.state_specs()] == ["ring", "ring"]
    assert {spec.nbytes(1, 64) for spec in model.state_specs()} == {
        spec.nbytes(1, 2048) for spec in model.state_specs()
    }
    assert np.prod(model.state_specs()[0].shape[1:]) == 16 * 16
