"""Causal self-attention over a sliding window, whose keys and values lie in a ring of fixed size.

Each token sees itself and the ``window - 1`` tokens before it (Beltagy et al. 2020, arXiv:2004.05150, section 3.1, here
causal). Token ``i`` of a row lies in slot ``i % slots``, so the cache is as large as the window, however long the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm.ops.attention import attend, merge_heads, normed_heads, rotary, split_heads
from edgellm.ops.canonical import capturing
from edgellm.ops.schema import REQUIRED, Op

__all__ = ["WINDOW_ATTENTION", "window_attention"]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, past_lengths: Tensor,
    lengths: Tensor, cos: Tensor | None, sin: Tensor | None, *, num_heads: int, num_kv_heads: int, scale: float,
    window: int, q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Attend from each new token to itself and the ``window - 1`` tokens before it in its row.

    Arguments and results are those of :func:`edgellm.ops.attention` but for these.

    Args:
        past_k: (batch, num_kv_heads, slots, head_dim), a ring of at least ``window`` slots, or None: nothing came
            before and nothing is kept.
        past_v: as ``past_k``.
        past_lengths: (batch,) int32, how many tokens each row has read; the ring holds the last of them.
        window: how many tokens a token sees, itself among them.

    Returns:
        The attended values (batch, time, num_heads * head_dim), and the ring with the valid new tokens written round.

    Raises:
        ValueError: a window that the ring does not hold, one norm without the other, a negative cap, or captured
            without a ring.
    """
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm belong together: pass both or neither")
    slots = window if past_k is None else int(past_k.shape[2])
    if not 0 < window <= slots:
        raise ValueError(f"a window of {window} tokens over a ring of {slots} slots; give it as many slots, at least")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; give a positive one, or 0 for none")
    if capturing() and (past_k is None or past_v is None):
        raise ValueError("window_attention captured without a ring: pass the state that state_specs() declares")
    norms = {} if q_norm is None else {"q_norm": q_norm, "k_norm": k_norm, "epsilon": norm_eps}
    y, present_k, present_v = WINDOW_ATTENTION(
        q, k, v, past_k, past_v, past_lengths, lengths, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads,
        scale=scale, window=window, softcap=softcap, **norms,
    )  # fmt: skip
    return y, present_k, present_v


def window_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor | None, past_v: Tensor | None, past_lengths: Tensor,
    lengths: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, *, num_heads: int, num_kv_heads: int, scale: float, window: int,
    epsilon: float = 1e-6, softcap: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """See :func:`window_attention`; ``epsilon`` is its ``norm_eps``."""
    if q_norm is not None and k_norm is not None:
        q, k = normed_heads(q, q_norm, epsilon), normed_heads(k, k_norm, epsilon)
    q, k, v = split_heads(q, num_heads), split_heads(k, num_kv_heads), split_heads(v, num_kv_heads)
    past = past_lengths.long()[:, None]  # (batch, 1)
    positions = past + torch.arange(q.shape[2], device=q.device)  # (batch, time)
    if cos is not None and sin is not None:
        q, k = rotary(q, cos, sin, positions), rotary(k, cos, sin, positions)
    seen, keys, values = positions, k, v
    if past_k is not None and past_v is not None:
        keys, values = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)  # (batch, heads, slots + time, .)
        seen = torch.cat([_held(past, past_k.shape[2]), positions], dim=1)  # (batch, slots + time)
    distance = positions[:, :, None] - seen[:, None, :]  # (batch, time, slots + time)
    visible = (distance >= 0) & (distance < window) & (seen >= 0)[:, None, :]
    y = attend(q, keys, values, visible[:, None], scale, softcap)
    if past_k is None or past_v is None:
        return merge_heads(y), None, None
    slots = past_k.shape[2]
    new = _held(past + lengths.long()[:, None], slots) - past  # (batch, slots): which new token each slot holds now
    index = torch.where(new >= 0, slots + new, torch.arange(slots, device=q.device))[:, None, :, None]
    present_k, present_v = (x.gather(2, index.expand_as(old)) for x, old in ((keys, past_k), (values, past_v)))
    return merge_heads(y), present_k, present_v


def _held(total: Tensor, slots: int) -> Tensor:
    """Which token of a row of (batch, 1) tokens each slot of a ring holds, (batch, slots); negative for none yet."""
    return total - 1 - (total + (slots - 1 - torch.arange(slots, device=total.device))) % slots


WINDOW_ATTENTION = Op(
    name="WindowAttention",
    inputs=("q", "k", "v", "past_k", "past_v", "past_lengths", "lengths", "cos", "sin", "q_norm", "k_norm"),
    outputs=("y", "present_k", "present_v"),
    attributes={
        "num_heads": REQUIRED, "num_kv_heads": REQUIRED, "scale": REQUIRED, "window": REQUIRED, "epsilon": 1e-6,
        "softcap": 0.0,
    },
    states={"past_k": "present_k", "past_v": "present_v"},
    like=lambda q, past_k, past_v, **_: [q, past_k, past_v],
    reference=window_attention_reference,
)  # fmt: skip
