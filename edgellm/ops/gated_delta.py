"""The gated delta rule: a memory that fades, and that is told by how much what it holds of a key was wrong.

S_t = exp(g_t) S_{t-1} + b_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T, y_t = q_t S_t: Yang et al. 2024, arXiv:2412.06464.
What each token writes, u_t = b_t (v_t - ...), solves a triangular system over the tokens of a chunk; with it the rest
is the fading memory of :mod:`edgellm.ops.linear_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm.ops.canonical import capturing
from edgellm.ops.linear_attention import linear_attention_reference
from edgellm.ops.schema import REQUIRED, Op
from edgellm.ops.token_by_token import token_by_token

__all__ = ["GATED_DELTA", "gated_delta", "gated_delta_reference"]

_CHUNK = 64  # tokens of one system; what is longer goes in pieces


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, past: Tensor | None, *, num_heads: int,
    num_groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Read from a memory and correct it, token after token.

    Args:
        q: (batch, time, num_groups * key_dim).
        k: (batch, time, num_groups * key_dim), each key of length 1.
        v: (batch, time, num_heads * value_dim).
        decay: (batch, time, num_heads), the logarithm of what is left of the memory at each token; zeros for padding,
            at which all is left.
        beta: (batch, time, num_heads), the share of what was wrong that is corrected; zeros for padding, which then
            changes nothing.
        past: (batch, num_heads, key_dim, value_dim), what the tokens before left; None for zeros.
        num_heads: heads of the memory.
        num_groups: how many queries and keys there are, each shared by neighbouring heads; divides ``num_heads``.

    Returns:
        y (batch, time, num_heads * value_dim), and the memory after the last token.
    """
    if capturing():
        y, present = GATED_DELTA(q, k, v, decay, beta, past, num_heads=num_heads, num_groups=num_groups)
        return y, present
    pieces: list[Tensor] = []
    for start in range(0, q.shape[1], _CHUNK):
        part = [x[:, start : start + _CHUNK] for x in (q, k, v, decay, beta)]
        u = _written(part[1], part[2], part[3], part[4], past, num_heads, num_groups)
        y, past = linear_attention_reference(
            part[0], part[1], u, part[3], past, num_heads=num_heads, num_groups=num_groups
        )
        pieces.append(y)
    assert past is not None
    return torch.cat(pieces, dim=1), past


def _written(
    k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, past: Tensor | None, num_heads: int, num_groups: int
) -> Tensor:
    """What each token of a chunk adds to the memory under its key, (batch, time, num_heads * value_dim)."""
    batch, time = k.shape[:2]
    k = _per_head(k, num_heads, num_groups)  # (batch, heads, time, key_dim)
    wrong = v.reshape(batch, time, num_heads, -1).transpose(1, 2)
    total, beta = decay.cumsum(1).transpose(1, 2), beta.transpose(1, 2)  # (batch, heads, time)
    if past is not None:
        wrong = wrong - total.exp()[..., None] * (k @ past)
    before = torch.ones(time, time, dtype=torch.bool, device=k.device).tril(-1)
    fades = (total[..., :, None] - total[..., None, :]).masked_fill(~before, -torch.inf).exp()
    system = beta[..., None] * (k @ k.transpose(-1, -2)) * fades  # (batch, heads, time, time), zeros on the diagonal
    u: Tensor = torch.linalg.solve_triangular(system, beta[..., None] * wrong, upper=False, unitriangular=True)
    return u.transpose(1, 2).flatten(2)


def _per_head(x: Tensor, num_heads: int, num_groups: int) -> Tensor:
    """(batch, time, num_groups * dim) to (batch, num_heads, time, dim)."""
    heads = x.reshape(*x.shape[:2], num_groups, -1).transpose(1, 2)
    return heads.repeat_interleave(num_heads // num_groups, dim=1)


def gated_delta_reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, past: Tensor | None = None, *, num_heads: int,
    num_groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`gated_delta` as it is defined, one token after the other."""
    q, k = (_per_head(x, num_heads, num_groups).transpose(1, 2) for x in (q, k))  # (batch, time, heads, key_dim)
    v = v.reshape(*v.shape[:2], num_heads, -1)  # (batch, time, heads, value_dim)
    if past is None:
        past = v.new_zeros(v.shape[0], num_heads, k.shape[3], v.shape[3])
    s, y = token_by_token(_step, [past], [q, k, v, decay.exp()[..., None], beta[..., None]])
    return y.flatten(2), s


def _step(s: Tensor, q: Tensor, k: Tensor, v: Tensor, left: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The memory is (batch, heads, key_dim, value_dim); q, k, v (batch, heads, dim); the others (batch, heads, 1)."""
    s = left[..., None] * s
    held = (k[..., None, :] @ s).squeeze(-2)  # (batch, heads, value_dim)
    s = s + k[..., None] * (beta * (v - held))[..., None, :]
    return s, (q[..., None, :] @ s).squeeze(-2)


GATED_DELTA = Op(
    name="GatedDelta",
    inputs=("q", "k", "v", "decay", "beta", "past"),
    outputs=("y", "present"),
    attributes={"num_heads": REQUIRED, "num_groups": REQUIRED},
    states={"past": "present"},
    like=lambda q, v, num_heads, num_groups, **_: [
        v, (v.dtype, (v.shape[0], num_heads, q.shape[2] // num_groups, v.shape[2] // num_heads)),
    ],
    reference=gated_delta_reference,
)  # fmt: skip
