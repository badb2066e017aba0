"""One expert of a mixture, added to a sum: the feed-forward layer of those tokens that have chosen it.

A mixture is a chain of these, one for each expert. The reference computes every token and multiplies by the token's
share, 0 where it has not chosen the expert; a target that can takes the tokens with a share alone, and skips an expert
that no token has chosen.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgellm.ops.activations import ACTIVATIONS
from edgellm.ops.schema import Op

__all__ = ["EXPERT", "between", "expert_reference"]


def between(
    hidden: Tensor, gate: Tensor | None, *, activation: str, packed: bool, slope: float, offset: float, limit: float
) -> Tensor:
    """What stands between an expert's matrices.

    Args:
        hidden: (..., features), what its first matrix gives; both halves if ``packed``, the gate's first.
        gate: (..., features), what its gate gives; None if there is none, or if it is packed.
        activation: one of :data:`ACTIVATIONS`.
        packed: whether the first matrix holds the gate's rows and then its own.
        slope: what the activation's argument is multiplied by, and its result divided by.
        offset: added to what the gate multiplies.
        limit: the gate is cut off above it, what it multiplies on both sides; 0 for none.
    """
    if packed:
        gate, hidden = hidden.chunk(2, dim=-1)
    made = ACTIVATIONS[activation]
    if gate is None:
        return made(hidden)
    if limit:
        gate, hidden = gate.clamp(max=limit), hidden.clamp(-limit, limit)
    gate = made(gate) if slope == 1 else made(gate * slope) / slope
    return gate * (hidden + offset if offset else hidden)


def expert_reference(
    total: Tensor, x: Tensor, share: Tensor, up: Tensor, down: Tensor, gate: Tensor | None = None,
    up_bias: Tensor | None = None, down_bias: Tensor | None = None, gate_bias: Tensor | None = None, *,
    activation: str = "silu", packed: bool = False, slope: float = 1.0, offset: float = 0.0, limit: float = 0.0,
) -> Tensor:  # fmt: skip
    """A sum and one expert's part of it.

    Args:
        total: (batch, time, width), the sum so far.
        x: (batch, time, width).
        share: (batch, time, 1), what the expert counts for; 0 where a token has not chosen it.
        up: (features, width), its first matrix, or (2 features, width) if ``packed``.
        down: (width, features), its last.
        gate: (features, width); None if it has none, or if it is packed.
        up_bias: (features,), or (2 features,).
        down_bias: (width,).
        gate_bias: (features,).
        activation: as :func:`between`, and so the rest.
    """
    gates = None if gate is None else F.linear(x, gate, gate_bias)
    hidden = between(
        F.linear(x, up, up_bias), gates, activation=activation, packed=packed, slope=slope, offset=offset, limit=limit
    )
    y: Tensor = total + F.linear(hidden, down, down_bias) * share
    return y


EXPERT = Op(
    name="Expert",
    inputs=("total", "x", "share", "up", "down", "gate", "up_bias", "down_bias", "gate_bias"),
    outputs=("sum",),
    attributes={"activation": "silu", "packed": False, "slope": 1.0, "offset": 0.0, "limit": 0.0},
    matrices=("up", "down", "gate"),
    products={"up": "x", "gate": "x"},
    like=lambda total, **_: [total],
    reference=expert_reference,
)
