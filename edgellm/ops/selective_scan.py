"""A selective scan: a state of its own for every feature, in which each number fades by a factor of the token's own.

h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t: Gu and Dao 2023, arXiv:2312.00752. Unlike in
:mod:`edgellm.ops.linear_attention`, no two numbers of the state share a decay, so no product of matrices stands for all
pairs of tokens; a chunk is summed in rounds, each of twice the reach (Hillis and Steele 1986).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm.ops.canonical import capturing
from edgellm.ops.schema import Op
from edgellm.ops.token_by_token import token_by_token

__all__ = ["SELECTIVE_SCAN", "selective_scan", "selective_scan_reference"]

_CHUNK = 64  # tokens that are summed in rounds; what is longer goes in pieces


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Let every feature's state take in its token and fade, token after token.

    Args:
        x: (batch, time, width).
        dt: (batch, time, width), how large a step is; zeros for padding, which then adds and fades nothing.
        a: (width, state), negative: how fast each number fades.
        b: (batch, time, state), how a token enters the state.
        c: (batch, time, state), how it is read.
        past: (batch, width, state), what the tokens before left; None for zeros.

    Returns:
        y (batch, time, width), and the state after the last token.
    """
    if capturing():
        y, present = SELECTIVE_SCAN(x, dt, a, b, c, past)
        return y, present
    pieces: list[Tensor] = []
    for start in range(0, x.shape[1], _CHUNK):
        part = [t[:, start : start + _CHUNK] for t in (x, dt, b, c)]
        y, past = _chunk(part[0], part[1], a, part[2], part[3], past)
        pieces.append(y)
    assert past is not None
    return torch.cat(pieces, dim=1), past


def _chunk(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` in as many rounds as the number of tokens has binary digits."""
    fades = dt[..., None] * a  # (batch, time, width, state): logarithms of what is left
    h = (dt * x)[..., None] * b[:, :, None]
    if past is not None:
        h = torch.cat([h[:, :1] + fades[:, :1].exp() * past[:, None], h[:, 1:]], dim=1)
    reach = 1  # h holds what came with so many tokens, and fades what they leave of what was before
    while reach < x.shape[1]:
        further = h[:, reach:] + fades[:, reach:].exp() * h[:, :-reach]
        h = torch.cat([h[:, :reach], further], dim=1)
        fades = torch.cat([fades[:, :reach], fades[:, reach:] + fades[:, :-reach]], dim=1)
        reach *= 2
    return (h @ c[..., None]).squeeze(-1), h[:, -1]


def selective_scan_reference(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan`, one token after the other."""
    if past is None:
        past = x.new_zeros(x.shape[0], *a.shape)
    present, y = token_by_token(_step, [past], [dt, dt * x, b, c], [a])
    return y, present


def _step(h: Tensor, dt: Tensor, added: Tensor, b: Tensor, c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The state is (batch, width, state); dt and what is added (batch, width); b and c (batch, state)."""
    h = (dt[..., None] * a).exp() * h + added[..., None] * b[:, None]
    return h, (h @ c[..., None]).squeeze(-1)


SELECTIVE_SCAN = Op(
    name="SelectiveScan",
    inputs=("x", "dt", "a", "b", "c", "past"),
    outputs=("y", "present"),
    states={"past": "present"},
    like=lambda x, a, **_: [x, (x.dtype, (x.shape[0], *a.shape))],
    reference=selective_scan_reference,
)
