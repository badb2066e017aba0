"""Validation: the model's loss over the same batches every time."""

from __future__ import annotations

import torch
from torch import nn

from edgellm.training.batches import Batches
from edgellm.training.distributed import World
from edgellm.training.evaluation import autocast
from edgellm.training.forward import Forward
from edgellm.training.loss import batch_loss
from edgellm.training.options import TrainOptions

__all__ = ["validation_loss"]


def validation_loss(model: nn.Module, data: Batches, options: TrainOptions, world: World) -> float:
    """Mean cross-entropy in nats a target.

    Args:
        model: not wrapped for several processes; each process takes its share of the batches.
        data: the validation part is read.
        options: how many batches.
        world: the processes.
    """
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, weight
    training, forward = model.training, Forward(model)
    model.eval()
    with torch.no_grad():
        for batch in data.validation(options, world):
            with autocast(options.precision, world.device):
                logits = forward(*batch.given)
            total += torch.tensor([batch_loss(logits, batch).item() * batch.weight, batch.weight])
    model.train(training)
    summed, weight = world.sum(total).tolist()
    return float(summed / weight)
