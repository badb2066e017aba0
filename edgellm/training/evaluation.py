"""Validation: the model's loss over fixed windows, and the loss of knowing only how common each token is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm.errors import TrainingError
from edgellm.training.distributed import World
from edgellm.training.options import TrainOptions
from edgellm.training.tokens import TokenData, Tokens
from edgellm.training.windows import even_offsets, windows

__all__ = ["next_token_loss", "unigram_entropy", "validation_loss"]

CHUNK = 1 << 22  # tokens counted at once


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32, of logits (batch, time, vocab) for targets (batch, time)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def validation_loss(model: nn.Module, data: TokenData, options: TrainOptions, world: World) -> float:
    """Mean cross-entropy in nats a token over the same evenly spread windows every time.

    Args:
        model: not wrapped for several processes; each process takes its share of the windows.
        data: the validation part is read.
        options: context, batch size, and how many windows.
        world: the processes.
    """
    count = options.eval_batches * options.batch_size * options.accumulation * world.size
    starts = even_offsets(count, len(data.validation), options.context)[world.rank :: world.size]
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, windows
    training = model.training
    model.eval()
    with torch.no_grad():
        for first in range(0, len(starts), options.batch_size):
            chosen = starts[first : first + options.batch_size]
            inputs, targets = windows(data.validation, chosen, options.context, world.device)
            with autocast(options.precision, world.device):
                logits, _ = model(inputs)
            total += torch.tensor([next_token_loss(logits, targets).item() * len(chosen), len(chosen)])
    model.train(training)
    summed, count = world.sum(total).tolist()
    return float(summed / count)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward pass runs in that precision."""
    dtype = torch.bfloat16 if precision == "float32" else getattr(torch, precision)  # unused when not enabled
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "float32")


def unigram_entropy(data: TokenData) -> float:
    """Cross-entropy of the validation tokens under the training tokens' frequencies, in nats a token.

    Frequencies are smoothed by adding one to every token's count. A model that has learned nothing but how common
    each token is scores this.
    """
    train, validation = _counts(data.train, data.vocab_size), _counts(data.validation, data.vocab_size)
    log_frequency = np.log(train + 1) - np.log(train.sum() + data.vocab_size)
    return float(-(validation * log_frequency).sum() / validation.sum())


def _counts(tokens: Tokens, vocab_size: int) -> npt.NDArray[np.int64]:
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(tokens), CHUNK):
        found = np.bincount(tokens[start : start + CHUNK], minlength=vocab_size)
        if len(found) > vocab_size:
            raise TrainingError(
                f"the data has a token {len(found) - 1} and vocab_size is {vocab_size}; encode it again"
            )
        counts += found
    return counts
