"""The largest value so far, token after token."""

from __future__ import annotations

import torch
from torch import Tensor

from edgellm.ops.canonical import capturing

__all__ = ["running_max"]


def running_max(x: Tensor, first: Tensor) -> Tensor:
    """At each token, the largest of what came before the chunk and of the tokens up to its own.

    ONNX has no such operator: a captured graph holds all pairs of tokens, as a chunk's form of a memory does.

    Args:
        x: (batch, time, features).
        first: (batch, features).

    Returns:
        (batch, time, features).
    """
    if not capturing():
        return torch.maximum(x.cummax(1).values, first[:, None])
    places = torch.arange(x.shape[1], device=x.device)
    later = (places > places[:, None])[:, :, None]  # (time, time, 1)
    pairs = torch.where(later, first[:, None, None], x[:, None])  # (batch, time, time, features)
    return torch.maximum(pairs.amax(2), first[:, None])
