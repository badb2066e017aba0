"""What a drafter learns from: a model's own words after pieces of a text, with its hidden states and its choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm.errors import TrainingError
from edgellm.models.protocol import LanguageModel, Step, empty_state, with_hidden

__all__ = ["CHOICES", "DraftRows", "joined_rows", "own_words"]

CHOICES = 8  # of the likeliest tokens at each place


@dataclass(frozen=True)
class DraftRows:
    """Rows that a model has read and said.

    Args:
        tokens: (rows, time) int32, a piece of text and what the model says after it.
        hidden: (rows, time, features) float16, the last hidden state after each token.
        ids: (rows, time, CHOICES) int32, the likeliest tokens after each.
        chances: (rows, time, CHOICES) float16, their probabilities.
    """

    tokens: NDArray[np.int32]
    hidden: NDArray[np.float16]
    ids: NDArray[np.int32]
    chances: NDArray[np.float16]

    def save(self, file: Path) -> None:
        """Write them, whole or not at all."""
        pending = file.with_suffix(".tmp")
        with pending.open("wb") as stream:
            np.savez(stream, tokens=self.tokens, hidden=self.hidden, ids=self.ids, chances=self.chances)
        pending.replace(file)

    @classmethod
    def load(cls, file: Path) -> DraftRows:
        """Read what :meth:`save` wrote."""
        with np.load(file, allow_pickle=False) as found:
            return cls(**{name: found[name] for name in ("tokens", "hidden", "ids", "chances")})


def joined_rows(parts: Sequence[DraftRows]) -> DraftRows:
    """Rows of several as one."""
    names = ("tokens", "hidden", "ids", "chances")
    return DraftRows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@torch.inference_mode()
def own_words(model: LanguageModel, prompts: Tensor, count: int, *, sampled: int, seed: int) -> DraftRows:
    """What a model says after pieces of a text: of most the likeliest token each time, of some drawn ones.

    Args:
        model: in eval mode, with weights in memory.
        prompts: (rows, time) int64.
        count: tokens to say after each.
        sampled: of how many rows, the last ones, tokens are drawn.
        seed: of the drawing.

    Raises:
        TrainingError: the model does not show its last hidden state.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, time = prompts.shape
    state: Any = empty_state(model, rows, time + count)
    tokens, read = prompts, 0
    kept: list[tuple[Tensor, ...]] = []
    said = [prompts]
    for _ in range(count + 1):
        step = _step(tokens, read)
        (logits, state), hidden = with_hidden(model, tokens, state, step)
        if hidden is None:
            raise TrainingError("the model does not show its last hidden state; use take_positions in its forward")
        read += tokens.shape[1]
        chances, ids = logits.float().softmax(dim=-1).topk(min(CHOICES, logits.shape[-1]), dim=-1)
        kept.append((hidden.half(), ids.int(), chances.half()))
        tokens = ids[:, -1, :1]
        if sampled:
            drawn = torch.multinomial(logits[-sampled:, -1].float().softmax(dim=-1), 1, generator=generator)
            tokens = torch.cat([tokens[:-sampled], drawn])
        said.append(tokens)
    states, best, probable = (torch.cat(parts, dim=1).numpy() for parts in zip(*kept, strict=True))
    return DraftRows(torch.cat(said[:-1], dim=1).int().numpy(), states, best, probable)


def _step(tokens: Tensor, read: int) -> Step:
    """Every token is valid, and logits are wanted after each."""
    rows, time = tokens.shape
    lengths = torch.full((rows,), time, dtype=torch.int32)
    return Step(torch.full((rows,), read, dtype=torch.int32), lengths, torch.arange(time).expand(rows, time))
