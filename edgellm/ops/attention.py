"""Causal self-attention over a key/value cache, with rotary positions and grouped queries.

softmax(QK^T / sqrt(d_k)) V, Vaswani et al. 2017, arXiv:1706.03762; rotary positions, Su et al. 2021, arXiv:2104.09864;
grouped queries, Ainslie et al. 2023, arXiv:2305.13245; norms of each head's query and key, Dehghani et al. 2023,
arXiv:2302.05442; windows, Beltagy et al. 2020, arXiv:2004.05150; soft caps of scores, Gemma 2, arXiv:2408.00118;
sinks, gpt-oss, arXiv:2508.10925.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm.ops.canonical import capturing
from edgellm.ops.schema import REQUIRED, Op

__all__ = [
    "ATTENTION", "attend", "attention", "attention_over", "merge_heads", "normed_heads", "rotary", "split_heads",
]  # fmt: skip


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, past_lengths: Tensor,
    lengths: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, sinks: Tensor | None = None, distances: Tensor | None = None, *, num_heads: int,
    num_kv_heads: int, scale: float, epsilon: float = 1e-6, softcap: float = 0.0, window: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`attention`; ``epsilon`` is its ``norm_eps``."""
    return attention_over(
        q, k, v, past_k, past_v, past_lengths, lengths, cos, sin, q_norm, k_norm, sinks, distances,
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, epsilon=epsilon, softcap=softcap, window=window,
    )  # fmt: skip


def attention_over(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, past_lengths: Tensor,
    lengths: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, sinks: Tensor | None = None, distances: Tensor | None = None, *, num_heads: int,
    num_kv_heads: int, scale: float, epsilon: float = 1e-6, softcap: float = 0.0, window: int = 0,
    kept: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda k, v: (k, v),
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The reference, with what the cache keeps of new keys and values (batch, num_kv_heads, time, head_dim)."""
    if q_norm is not None and k_norm is not None:
        q, k = normed_heads(q, q_norm, epsilon), normed_heads(k, k_norm, epsilon)
    time = q.shape[1]
    q, k, v = split_heads(q, num_heads), split_heads(k, num_kv_heads), split_heads(v, num_kv_heads)
    positions = past_lengths.long()[:, None] + torch.arange(time, device=q.device)  # (batch, time)
    if cos is not None and sin is not None:
        q, k = rotary(q, cos, sin, positions), rotary(k, cos, sin, positions)
    if past_k is None or past_v is None:
        steps = torch.arange(time, device=q.device)[None]
        seen = _visible(steps, time, window) if window or distances is not None else None
        y = attend(q, k, v, seen, scale, softcap, sinks, _by_distance(steps, time, distances))
        return merge_heads(y), None, None
    k, v = kept(k, v)
    slots = positions[:, None, :, None].expand_as(k)
    present_k, present_v = past_k.scatter(2, slots, k), past_v.scatter(2, slots, v)
    total = int(positions.max()) + 1
    visible = _visible(positions, total, window)
    bias = _by_distance(positions, total, distances)
    y = attend(q, present_k[:, :, :total], present_v[:, :, :total], visible, scale, softcap, sinks, bias)
    return merge_heads(y), present_k, present_v


ATTENTION = Op(
    name="Attention",
    inputs=(
        "q", "k", "v", "past_k", "past_v", "past_lengths", "lengths", "cos", "sin", "q_norm", "k_norm", "sinks",
        "distances",
    ),
    outputs=("y", "present_k", "present_v"),
    attributes={
        "num_heads": REQUIRED, "num_kv_heads": REQUIRED, "scale": REQUIRED, "epsilon": 1e-6, "softcap": 0.0,
        "window": 0,
    },
    caches={"past_k": "present_k", "past_v": "present_v"},
    like=lambda q, past_k, past_v, **_: [q, past_k, past_v],
    reference=attention_reference,
)  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, past_lengths: Tensor,
    lengths: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_heads: int, num_kv_heads: int, scale: float,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6, softcap: float = 0.0,
    window: int = 0, sinks: Tensor | None = None, distances: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Attend from each new token to itself and everything before it in its row.

    Args:
        q: (batch, time, num_heads * head_dim), before norm and rotation.
        k: (batch, time, num_kv_heads * head_dim), before norm and rotation.
        v: (batch, time, num_kv_heads * head_dim).
        past_k: (batch, num_kv_heads, capacity, head_dim), or None: nothing came before and nothing is kept.
        past_v: as ``past_k``. Every row needs ``past_lengths + time <= capacity``.
        past_lengths: (batch,) int32, slots each row has filled.
        lengths: (batch,) int32, how many of the new tokens are valid; the rest is padding at the end.
        cos: (positions, head_dim / 2), or None for no rotation.
        sin: as ``cos``.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides ``num_heads``.
        scale: factor on the scores, 1 / sqrt(head_dim) in the usual form.
        q_norm: (head_dim,), gains of an RMS norm of each head's query before its rotation, or None for no norm.
        k_norm: as ``q_norm``, of each head's key; both are given or neither.
        norm_eps: added to the mean square in these norms.
        softcap: a bound that scaled scores approach, softcap * tanh(scores / softcap); 0 for none.
        window: how many positions a token sees, its own and those just before it; 0 for all.
        sinks: (num_heads,), for each head the score of something that every token sees beside the keys and that has no
            value, or None for no such thing.
        distances: (n, num_heads), what is added to a head's score of a key so many positions back, those further back
            than n - 1 counting as that; or None for nothing. T5's relative positions, Raffel et al. 2020,
            arXiv:1910.10683.

    Returns:
        The attended values (batch, time, num_heads * head_dim), and the cache with the new tokens written in.

    Raises:
        ValueError: one norm without the other, a negative cap or window, or captured without a cache.
    """
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm belong together: pass both or neither")
    if softcap < 0 or window < 0:
        raise ValueError(f"softcap is {softcap} and window {window}; give positive ones, or 0 for none")
    if capturing() and (past_k is None or past_v is None):
        raise ValueError("attention captured without a cache: pass the state that state_specs() declares")
    norms = {} if q_norm is None else {"q_norm": q_norm, "k_norm": k_norm, "epsilon": norm_eps}
    y, present_k, present_v = ATTENTION(
        q, k, v, past_k, past_v, past_lengths, lengths, cos, sin, sinks=sinks, distances=distances,
        num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale, softcap=softcap, window=window, **norms,
    )  # fmt: skip
    return y, present_k, present_v


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Rotate the two halves of each head by its position's angles.

    Args:
        x: (batch, heads, time, head_dim).
        cos: (positions, head_dim / 2).
        sin: (positions, head_dim / 2).
        positions: (batch, time) int64.
    """
    positions = positions.clamp(max=cos.shape[0] - 1)  # padding may point past the table; its result is not used
    c, s = cos[positions].unsqueeze(1).to(x.dtype), sin[positions].unsqueeze(1).to(x.dtype)  # (batch, 1, time, half)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def normed_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An RMS norm of each head of x (batch, time, heads * head_dim), computed as precisely as its weight is."""
    heads = x.view(*x.shape[:-1], -1, weight.shape[0]).to(weight.dtype)  # (batch, time, heads, head_dim)
    return F.rms_norm(heads, weight.shape, weight, eps).to(x.dtype).flatten(-2)


def _visible(positions: Tensor, total: int, window: int) -> Tensor:
    """Which of the first slots each new token sees, (batch, 1, time, total), from its position (batch, time)."""
    slots, own = torch.arange(total, device=positions.device), positions[:, None, :, None]
    visible = slots <= own
    return visible & (slots > own - window) if window else visible


def _by_distance(positions: Tensor, total: int, distances: Tensor | None) -> Tensor | None:
    """The bias of each new token's score of each slot, (batch, heads, time, total), from a table by distance."""
    if distances is None:
        return None
    back = positions[:, :, None] - torch.arange(total, device=positions.device)  # (batch, time, total)
    return distances[back.clamp(0, len(distances) - 1)].permute(0, 3, 1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float,
    sinks: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Q (batch, heads, time, head_dim) over k and v (batch, kv_heads, slots, head_dim); no mask is the causal one.

    A bias (batch, heads, time, slots) comes with a mask, and is added to scores that no soft cap bounds.
    """
    group = q.shape[1] // k.shape[1]
    if bias is not None and visible is not None:
        bias = bias.to(q.dtype).masked_fill(~visible, -torch.inf)
        if not softcap and sinks is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=group > 1)
        raise ValueError("a bias by distance beside a soft cap or sinks, which no model here has; leave one out")
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=group > 1
        )
    if visible is None:
        visible = _visible(torch.arange(q.shape[2], device=q.device)[None], k.shape[2], 0)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * scale  # (batch, heads, time, slots)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        return scores.softmax(-1) @ v
    sink = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] @ v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * head_dim) to (batch, heads, time, head_dim)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    """The inverse of :func:`split_heads`."""
    batch, heads, time, head_dim = y.shape
    return y.transpose(1, 2).reshape(batch, time, heads * head_dim)
