"""Linear attention whose memory fades: one matrix a head that decays by a factor of the token's own.

S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t S_t: Yang et al. 2023 (GLA), arXiv:2312.06635; the same recurrence is the
state space of Mamba-2, Dao and Gu 2024, arXiv:2405.21060, whose dual form over a chunk is the one here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm.ops.canonical import capturing
from edgellm.ops.schema import REQUIRED, Op

__all__ = ["LINEAR_ATTENTION", "linear_attention", "linear_attention_reference"]

_CHUNK = 128  # tokens that meet each other in one matrix; what is longer goes in pieces


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, past: Tensor | None, *, num_heads: int, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Read from a fading memory and write to it, token after token.

    Args:
        q: (batch, time, num_groups * key_dim).
        k: (batch, time, num_groups * key_dim).
        v: (batch, time, num_heads * value_dim); zeros for padding, which then adds nothing.
        decay: (batch, time, num_heads), the logarithm of what is left of the memory at each token; zeros for padding,
            at which all is left.
        past: (batch, num_heads, key_dim, value_dim), what the tokens before left; None for zeros.
        num_heads: heads of the memory.
        num_groups: how many queries and keys there are, each shared by neighbouring heads; divides ``num_heads``.

    Returns:
        y (batch, time, num_heads * value_dim), and the memory after the last token.
    """
    if capturing():
        y, present = LINEAR_ATTENTION(q, k, v, decay, past, num_heads=num_heads, num_groups=num_groups)
        return y, present
    pieces: list[Tensor] = []
    for start in range(0, q.shape[1], _CHUNK):
        part = [x[:, start : start + _CHUNK] for x in (q, k, v, decay)]
        y, past = linear_attention_reference(
            part[0], part[1], part[2], part[3], past, num_heads=num_heads, num_groups=num_groups
        )
        pieces.append(y)
    assert past is not None
    return torch.cat(pieces, dim=1), past


def linear_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, past: Tensor | None = None, *, num_heads: int, num_groups: int
) -> tuple[Tensor, Tensor]:
    """:func:`linear_attention` with all tokens in one matrix: no loop, and for one token as cheap as a step."""
    batch, time = q.shape[:2]
    shared = num_heads // num_groups
    q, k = (x.reshape(batch, time, num_groups, 1, -1).permute(0, 2, 3, 1, 4) for x in (q, k))  # (.., 1, time, key_dim)
    v = v.reshape(batch, time, num_groups, shared, -1).permute(0, 2, 3, 1, 4)  # (.., shared, time, value_dim)
    total = decay.cumsum(1).reshape(batch, time, num_groups, shared).permute(0, 2, 3, 1)  # (.., shared, time)
    places = torch.arange(time, device=q.device)
    later = places > places[:, None]  # (time, time)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    y = ((q @ k.transpose(-1, -2)) * between) @ v
    end = total[..., -1:]
    s = k.transpose(-1, -2) @ (v * (end - total).exp()[..., None])  # (.., shared, key_dim, value_dim)
    if past is not None:
        before = past.reshape(batch, num_groups, shared, *past.shape[2:])
        y = y + total.exp()[..., None] * (q @ before)
        s = s + end.exp()[..., None] * before
    return y.permute(0, 3, 1, 2, 4).reshape(batch, time, -1), s.flatten(1, 2)


LINEAR_ATTENTION = Op(
    name="LinearAttention",
    inputs=("q", "k", "v", "decay", "past"),
    outputs=("y", "present"),
    attributes={"num_heads": REQUIRED, "num_groups": REQUIRED},
    states={"past": "present"},
    like=lambda q, v, num_heads, num_groups, **_: [
        v, (v.dtype, (v.shape[0], num_heads, q.shape[2] // num_groups, v.shape[2] // num_heads)),
    ],
    reference=linear_attention_reference,
)  # fmt: skip
