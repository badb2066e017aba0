"""The loss of a batch: cross-entropy in nats, in float32, whatever the forward pass was computed in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgellm.training.batches import Batch

__all__ = ["batch_loss"]


def batch_loss(logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over a batch's targets, by their weights.

    Args:
        logits: (rows, time, width).
        batch: the targets.
        label_smoothing: the part of a target's probability that is spread over all (Szegedy et al. 2016,
            arXiv:1512.00567).
    """
    flat, targets = logits.float().flatten(0, 1), batch.targets.flatten()
    if batch.weights is None:
        return F.cross_entropy(flat, targets, label_smoothing=label_smoothing)
    weights = batch.weights.flatten()
    counted = weights > 0  # the softmax of positions that do not count is not worth computing
    losses = F.cross_entropy(flat[counted], targets[counted], reduction="none", label_smoothing=label_smoothing)
    return torch.dot(losses, weights[counted]) / weights.sum()
