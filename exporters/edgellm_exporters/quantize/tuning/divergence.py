"""The KL divergence of distributions over a vocabulary, whose gradient takes the place of what it was compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["divergence"]

_CHUNK = 64  # tokens at a time: distributions of more are not held beside the logits


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, wanted: Tensor) -> Tensor:
        flat, theirs = given.reshape(-1, given.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
        found = torch.empty(len(flat))
        for start in range(0, len(flat), _CHUNK):
            some = slice(start, start + _CHUNK)
            ours, goal = torch.log_softmax(flat[some].float(), -1), torch.log_softmax(theirs[some].float(), -1)
            weight = goal.exp()
            found[some] = (goal.sub_(ours).mul_(weight)).sum(-1)
            theirs[some] = ours.exp_().sub_(weight)
        ctx.save_for_backward(theirs)
        ctx.shape = given.shape
        return found.view(given.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (theirs,) = ctx.saved_tensors
        return theirs.mul_(gradients[0].reshape(-1, 1)).view(ctx.shape), None


def divergence(given: Tensor, wanted: Tensor) -> Tensor:
    """From wanted logits to given ones, nats, (batch, time).

    Args:
        given: (batch, time, vocabulary).
        wanted: the same shape, of memory of its own: it is written over.
    """
    found: Tensor = _Divergence.apply(given, wanted)  # type: ignore[no-untyped-call]
    return found
