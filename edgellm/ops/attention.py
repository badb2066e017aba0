"""Causal self-attention over a key/value cache, with rotary positions and grouped queries.

softmax(QK^T / sqrt(d_k)) V, Vaswani et al. 2017, arXiv:1706.03762; rotary positions, Su et al. 2021, arXiv:2104.09864;
grouped queries, Ainslie et al. 2023, arXiv:2305.13245; norms of each head's query and key, Dehghani et al. 2023,
arXiv:2302.05442.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm.ops.canonical import capturing, emit

__all__ = ["attention", "merge_heads", "normed_heads", "rotary", "split_heads"]


def attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, past_lengths: Tensor,
    lengths: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_heads: int, num_kv_heads: int, scale: float,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6,
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

    Returns:
        The attended values (batch, time, num_heads * head_dim), and the cache with the new tokens written in.

    Raises:
        ValueError: one norm without the other; or captured without a cache.
    """
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm belong together: pass both or neither")
    if capturing():
        if past_k is None or past_v is None:
            raise ValueError("attention captured without a cache: pass the state that state_specs() declares")
        normed = q_norm is not None
        y, present_k, present_v = emit(
            "Attention",
            [q, k, v, past_k, past_v, past_lengths, lengths, cos, sin, *([q_norm, k_norm] if normed else [])],
            [(q.dtype, q.shape), (past_k.dtype, past_k.shape), (past_v.dtype, past_v.shape)],
            {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "scale": scale}
            | ({"epsilon": norm_eps} if normed else {}),
        )
        return y, present_k, present_v
    if q_norm is not None and k_norm is not None:
        q, k = normed_heads(q, q_norm, norm_eps), normed_heads(k, k_norm, norm_eps)
    return _reference(q, k, v, past_k, past_v, past_lengths, cos, sin, num_heads, num_kv_heads, scale)


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


def _reference(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, past_lengths: Tensor,
    cos: Tensor | None, sin: Tensor | None, num_heads: int, num_kv_heads: int, scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    time = q.shape[1]
    q, k, v = split_heads(q, num_heads), split_heads(k, num_kv_heads), split_heads(v, num_kv_heads)
    positions = past_lengths.long()[:, None] + torch.arange(time, device=q.device)  # (batch, time)
    if cos is not None and sin is not None:
        q, k = rotary(q, cos, sin, positions), rotary(k, cos, sin, positions)
    if past_k is None or past_v is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=num_heads != num_kv_heads)
        return merge_heads(y), None, None
    slots = positions[:, None, :, None].expand_as(k)
    present_k, present_v = past_k.scatter(2, slots, k), past_v.scatter(2, slots, v)
    total = int(positions.max()) + 1
    visible = torch.arange(total, device=q.device) <= positions[:, None, :, None]  # (batch, 1, time, total)
    y = F.scaled_dot_product_attention(
        q, present_k[:, :, :total], present_v[:, :, :total], attn_mask=visible, scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )  # fmt: skip
    return merge_heads(y), present_k, present_v


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, time, heads * head_dim) to (batch, heads, time, head_dim)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    """The inverse of :func:`split_heads`."""
    batch, heads, time, head_dim = y.shape
    return y.transpose(1, 2).reshape(batch, time, heads * head_dim)
