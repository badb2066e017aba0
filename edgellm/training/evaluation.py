"""What a model that has learned nothing scores, and the precision that a forward pass runs in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from edgellm.errors import TrainingError
from edgellm.training.tokens import TokenData, Tokens

__all__ = ["autocast", "unigram_entropy"]

CHUNK = 1 << 22  # tokens counted at once


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
