"""The fused kernels that training uses equal the loops that define the ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgellm.ops import recurrence
from edgellm.ops.attention import attention
from edgellm.ops.recurrence import RecurrentWeights

BATCH, TIME, FEATURES, HIDDEN = 3, 7, 5, 6


def weights(gates: int) -> RecurrentWeights:
    shapes = ((gates * HIDDEN, FEATURES), (gates * HIDDEN, HIDDEN), (gates * HIDDEN,), (gates * HIDDEN,))
    return RecurrentWeights(*(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes))


def arguments(name: str) -> tuple[list[torch.Tensor], dict[str, str]]:
    x = torch.randn(BATCH, TIME, FEATURES, dtype=torch.float64)
    states = [torch.randn(BATCH, HIDDEN, dtype=torch.float64) for _ in range(2 if name == "lstm" else 1)]
    return [x, *states], {}


@pytest.mark.parametrize(
    ("name", "gates", "options"),
    [("elman", 1, {"activation": "tanh"}), ("elman", 1, {"activation": "relu"}), ("lstm", 4, {}), ("gru", 3, {})],
)
def test_fused_recurrence_equals_its_loop_in_value_and_gradient(name: str, gates: int, options: dict[str, str]) -> None:
    torch.manual_seed(0)
    w, (inputs, _) = weights(gates), arguments(name)
    found = getattr(recurrence, name)(*inputs, w, None, **options)
    expected = getattr(recurrence, f"{name}_reference")(*inputs, w, None, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(sum((o**2).sum() for o in out), list(w)) for out in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "gates"), [("lstm", 4), ("gru", 3)])
def test_a_ragged_row_keeps_the_state_of_its_last_valid_token(name: str, gates: int) -> None:
    torch.manual_seed(0)
    w, (inputs, _) = weights(gates), arguments(name)
    lengths = torch.tensor([7, 2, 4], dtype=torch.int32)
    _, *found = getattr(recurrence, name)(*inputs, w, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = [inputs[0][row : row + 1, :n], *(s[row : row + 1] for s in inputs[1:])]
        _, *expected = getattr(recurrence, name)(*alone, w, None)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-12, atol=1e-12)


def normed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **norms: torch.Tensor) -> torch.Tensor:
    """Four heads of 8 features over two of keys and values, turned by position, five tokens a row."""
    half, none = torch.arange(4, dtype=q.dtype), torch.zeros(2, dtype=torch.int32)
    angles = torch.arange(5, dtype=q.dtype)[:, None] * 100 ** (-half / 4)
    y, _, _ = attention(
        q, k, v, None, None, none, none + 5, angles.cos(), angles.sin(), num_heads=4, num_kv_heads=2, scale=8**-0.5,
        norm_eps=0.1, **norms,
    )  # fmt: skip
    return y


def heads_and_gains(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, heads * 8, dtype=dtype) for heads in (4, 2, 2))
    return q, k, v, torch.randn(8, dtype=dtype), torch.randn(8, dtype=dtype)


def test_norms_of_queries_and_keys_are_of_each_head_before_its_rotation() -> None:
    """Against x / sqrt(mean(x^2) + eps) * gain written out, one head at a time."""
    q, k, v, q_gain, k_gain = heads_and_gains()

    def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return torch.cat([h / (h.square().mean(-1, keepdim=True) + 0.1).sqrt() * gain for h in x.split(8, -1)], -1)

    found = normed_attention(q, k, v, q_norm=q_gain, k_norm=k_gain)
    torch.testing.assert_close(found, normed_attention(normed(q, q_gain), normed(k, k_gain), v))
    assert (found - normed_attention(q, k, v)).abs().max() > 0.1


def test_norms_of_queries_and_keys_are_learned() -> None:
    inputs = [x.requires_grad_() for x in heads_and_gains()]
    assert torch.autograd.gradcheck(lambda q, k, v, a, b: normed_attention(q, k, v, q_norm=a, k_norm=b), inputs)


def test_norms_in_training_at_16_bits_give_16_bits_and_are_computed_in_32() -> None:
    *narrow, q_gain, k_gain = heads_and_gains(torch.float32)
    q, k, v = (x.bfloat16() for x in narrow)
    found = normed_attention(q, k, v, q_norm=q_gain, k_norm=k_gain)
    expected = normed_attention(q.float(), k.float(), v.float(), q_norm=q_gain, k_norm=k_gain)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.03


def test_one_norm_without_the_other_is_refused() -> None:
    q, k, v, gain, _ = heads_and_gains()
    with pytest.raises(ValueError, match="pass both or neither"):
        normed_attention(q, k, v, q_norm=gain)


@pytest.mark.parametrize("sinking", [False, True])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (0.7, 0), (0.0, 3), (0.7, 1)])
def test_attention_is_softmax_of_scaled_scores_times_values(softcap: float, window: int, sinking: bool) -> None:
    """Against softmax(QK^T / sqrt(d_k)) V written out, one head and one row at a time."""
    torch.manual_seed(0)
    heads, kv_heads, dim = 4, 2, 8
    q = torch.randn(2, 5, heads * dim, dtype=torch.float64)
    k, v = (torch.randn(2, 5, kv_heads * dim, dtype=torch.float64) for _ in range(2))
    sinks = torch.randn(heads, dtype=torch.float64) if sinking else None
    none = torch.zeros(2, dtype=torch.int32)
    y, _, _ = attention(
        q, k, v, None, None, none, none + 5, None, None, num_heads=heads, num_kv_heads=kv_heads, scale=dim**-0.5,
        softcap=softcap, window=window, sinks=sinks,
    )  # fmt: skip
    for row in range(2):
        for head in range(heads):
            mine, shared = slice(head * dim, (head + 1) * dim), head // (heads // kv_heads)
            theirs = slice(shared * dim, (shared + 1) * dim)
            scores = q[row, :, mine] @ k[row, :, theirs].T / dim**0.5
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            hidden = torch.ones(5, 5).triu(1) + torch.ones(5, 5).tril(-window if window else -5)
            scores = scores.masked_fill(hidden.bool(), -torch.inf)
            powers = scores.exp()
            total = powers.sum(-1, keepdim=True) + (0 if sinks is None else sinks[head].exp())
            torch.testing.assert_close(y[row, :, mine], powers / total @ v[row, :, theirs])


@pytest.mark.parametrize(
    ("softcap", "window", "sinking"), [(0.0, 3, False), (0.7, 0, False), (0.7, 3, False), (0.0, 3, True)]
)
def test_attention_over_a_cache_step_by_step_equals_the_whole(softcap: float, window: int, sinking: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads * 8, dtype=torch.float64) for heads in (4, 2, 2))
    options: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "scale": 0.5, "softcap": softcap, "window": window}
    options["sinks"] = torch.randn(4, dtype=torch.float64) if sinking else None
    none = torch.zeros(2, dtype=torch.int32)
    whole, _, _ = attention(q, k, v, None, None, none, none + 7, None, None, **options)
    past_k, past_v = (torch.zeros(2, 2, 9, 8, dtype=torch.float64) for _ in "kv")
    parts = []
    for start, end in ((0, 2), (2, 3), (3, 7)):
        part = [x[:, start:end] for x in (q, k, v)]
        y, past_k, past_v = attention(*part, past_k, past_v, none + start, none + end - start, None, None, **options)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("wrong", [{"softcap": -1.0}, {"window": -2}])
def test_a_negative_cap_or_window_is_refused(wrong: dict[str, float]) -> None:
    q, k, v, _, _ = heads_and_gains()
    none = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="give positive ones, or 0 for none"):
        attention(q, k, v, None, None, none, none, None, None, num_heads=4, num_kv_heads=2, scale=1.0, **wrong)
