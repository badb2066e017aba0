"""A mixture of experts: feed-forward layers, of which each token has a few (Shazeer et al. 2017, arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from edgellm.models.layers.mlp import GatedMLP, PackedMLP
from edgellm.ops import EXPERT
from edgellm.ops.canonical import capturing

__all__ = ["Expert", "Experts", "mixture"]


class Experts(nn.Module):
    """The sum of the chosen experts, weighted by a softmax over all of them; a shared one besides.

    See :func:`mixture` for what is computed.

    Args:
        width: features of its input and output.
        hidden: features within an expert.
        num_experts: experts.
        num_chosen: how many of them a token has.
        normalised: whether the weights of the chosen ones sum to 1.
        shared_hidden: features within the expert that every token has; 0 for none.
        shared_gated: whether that one is behind a gate.
        packed: whether an expert's gate and up projections are one.
        activation: of the experts.
    """

    def __init__(
        self, width: int, hidden: int, num_experts: int, num_chosen: int, *, normalised: bool = True,
        shared_hidden: int = 0, shared_gated: bool = True, packed: bool = False, activation: str = "silu",
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_chosen, self.normalised = num_chosen, normalised
        self.router = nn.Linear(width, num_experts, bias=False)
        kind = PackedMLP if packed else GatedMLP
        self.experts = nn.ModuleList(kind(width, hidden, activation=activation) for _ in range(num_experts))
        self.shared = kind(width, shared_hidden, activation=activation) if shared_hidden else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_hidden and shared_gated else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        shares = torch.softmax(self.router(x), dim=-1)  # (batch, time, num_experts)
        best, which = shares.topk(self.num_chosen, dim=-1)
        if self.normalised:
            best = best / best.sum(-1, keepdim=True)
        shares = torch.zeros_like(shares).scatter(-1, which, best)
        y = mixture(self.experts, x, shares)
        if self.shared is None:
            return y
        every: Tensor = self.shared(x)
        return y + (every if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * every)


class Expert(Protocol):
    """A feed-forward layer that can be one of a mixture."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        ...

    def parts(self) -> dict[str, Any]:
        """The weights and attributes of :data:`edgellm.ops.EXPERT` that it is."""
        ...


def mixture(experts: Iterable[nn.Module], x: Tensor, shares: Tensor) -> Tensor:
    """What every expert makes of x, times its share, summed.

    In a graph an expert computes those tokens that have a share of it, as far as the target can; in training too. In
    PyTorch, where numbers are only held against a graph's, it computes all: what calibrates sees every input.

    Args:
        experts: follow :class:`Expert`.
        x: (batch, time, width).
        shares: (batch, time, experts), 0 where one is not chosen.
    """
    total = torch.zeros_like(x)
    for module, share in zip(experts, torch.split(shares, 1, dim=-1), strict=True):
        expert = cast(Expert, module)
        if capturing():
            total = EXPERT(total, x, share, **expert.parts())
        elif torch.is_grad_enabled():
            total = _with_chosen(expert, total, x, share[..., 0])
        else:
            total = total + expert(x) * share
    return total


def _with_chosen(expert: Expert, total: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """The sum with what an expert makes of the tokens that have a share (batch, time) of it."""
    chosen = share.nonzero(as_tuple=True)
    if not len(chosen[0]):
        return total
    return total.index_put(chosen, expert(x[chosen]) * share[chosen][:, None], accumulate=True)
