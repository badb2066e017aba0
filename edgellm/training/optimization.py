"""The optimizer, which parameters decay, and the learning rate of each step.

AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101. Cosine decay: Loshchilov and Hutter 2017, arXiv:1608.03983.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from edgellm.training.options import TrainOptions

__all__ = ["budget_spent", "learning_rate", "make_optimizer"]


def learning_rate(step: int, options: TrainOptions, seconds: float = 0.0) -> float:
    """Linear warm-up, then a cosine down to ``min_lr_fraction`` of the peak.

    Args:
        step: updates done before this one.
        options: the peak, the warm-up, the total and the budget of time.
        seconds: spent on updates before this one; they count where there is a budget.
    """
    if step < options.warmup and options.lr_from:
        return options.lr_from * float((options.lr / options.lr_from) ** ((step + 1) / options.warmup))
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    by_steps = (step - options.warmup) / max(1, options.steps - options.warmup)
    progress = min(1.0, max(by_steps, budget_spent(options, seconds)))
    low = options.lr * options.min_lr_fraction
    return low + (options.lr - low) * 0.5 * (1 + math.cos(math.pi * progress))


def budget_spent(options: TrainOptions, seconds: float) -> float:
    """The part of the budget of time that is used up; 0 without one."""
    return seconds / (60 * options.minutes) if options.minutes else 0.0


def make_optimizer(model: nn.Module, options: TrainOptions, device: torch.device) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves embeddings, norms and biases alone."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=options.betas, weight_decay=0.0, fused=device.type in ("cpu", "cuda")
    )
