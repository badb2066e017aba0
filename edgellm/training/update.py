"""One update: forward and backward passes over the step's batches, then the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from edgellm.training.batches import Batch
from edgellm.training.distributed import World
from edgellm.training.evaluation import autocast
from edgellm.training.forward import Forward
from edgellm.training.loss import batch_loss
from edgellm.training.optimization import make_optimizer
from edgellm.training.options import TrainOptions
from edgellm.training.windows import step_seed

__all__ = ["Updater"]


class Updater:
    """The model as it trains, with its optimizer.

    Args:
        model: on the world's device.
        options: how to train.
        world: the processes.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, world: World) -> None:
        self.model, self.options, self.world = model, options, world
        self.optimizer = make_optimizer(model, options, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "float16")
        self._wrapped = world.wrap(Forward(model))

    def backward(self, batches: Sequence[Batch], step: int, *, stop: bool) -> tuple[float, bool]:
        """Gradients of the step's batches.

        Args:
            batches: this process's part of them.
            step: updates done before.
            stop: whether this process was asked to stop.

        Returns:
            The mean loss over all batches of all processes, and whether any process was asked to stop.
        """
        options, world = self.options, self.world
        torch.manual_seed(step_seed(options.seed, step, world.rank))
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(2, device=world.device)  # loss, requests to stop
        totals[1] += stop
        for number, batch in enumerate(batches, start=1):
            totals[0] += self._backward(batch, len(batches), last=number == len(batches))
        loss, requests = world.sum(totals).tolist()
        return loss / world.size, requests > 0

    def _backward(self, batch: Batch, count: int, *, last: bool) -> torch.Tensor:
        options, wrapped = self.options, self._wrapped
        # the processes exchange gradients once an update, in its last backward pass
        parallel = wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else None
        with nullcontext() if parallel is None or last else parallel.no_sync():
            with autocast(options.precision, self.world.device):
                logits = wrapped(*batch.given)
            loss = batch_loss(logits, batch, options.label_smoothing) / count
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's stubs lack it
        return loss.detach()

    def apply(self, lr: float) -> float | None:
        """Clip the gradients and step the optimizer.

        Args:
            lr: the learning rate.

        Returns:
            The gradient's norm before clipping; None, and no step, where it is not finite. With float16 that happens
            now and then, and the scaler answers with a smaller scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        limit = self.options.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], limit))
        if math.isfinite(norm) or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # which itself leaves out a step with infinite gradients
            self.scaler.update()
        return norm if math.isfinite(norm) else None
