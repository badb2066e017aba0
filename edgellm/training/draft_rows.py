"""What a drafter learns from: a model's own words after pieces of a text, with its hidden states and its choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edgellm.errors import TrainingError
from edgellm.models.protocol import LanguageModel, Step, empty_state, with_hidden

__all__ = ["DraftRows", "ModelReader", "Reader", "joined_rows", "own_words"]

_PIECE = 16  # tokens of the text that are read at once: logits of all of them are looked at
_NAMES = ("tokens", "hidden", "best")


class Reader(Protocol):
    """A model that reads rows of tokens, a piece after another."""

    def begin(self, rows: int, capacity: int) -> None:
        """Forget what was read, and make room for so many rows of so many tokens."""
        ...

    def read(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The next tokens (rows, time): logits (rows, time, vocab) and last hidden states (rows, time, features)."""
        ...


class ModelReader:
    """Reads with PyTorch.

    Args:
        model: in eval mode, with weights in memory.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._state, self._read = model, dict[str, Any](), 0

    def begin(self, rows: int, capacity: int) -> None:
        """See :class:`Reader`."""
        self._state, self._read = empty_state(self._model, rows, capacity), 0

    @torch.inference_mode()
    def read(self, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See :class:`Reader`.

        Raises:
            TrainingError: the model does not show its last hidden state.
        """
        rows, time = tokens.shape
        step = Step(
            torch.full((rows,), self._read, dtype=torch.int32), torch.full((rows,), time, dtype=torch.int32),
            torch.arange(time).expand(rows, time),
        )  # fmt: skip
        (logits, self._state), hidden = with_hidden(self._model, torch.from_numpy(tokens), self._state, step)
        if hidden is None:
            raise TrainingError("the model does not show its last hidden state; use take_positions in its forward")
        self._read += time
        return logits.float().numpy(), hidden.float().numpy()


@dataclass(frozen=True)
class DraftRows:
    """Rows that a model has read and said.

    Args:
        tokens: (rows, time) int32, a piece of text and what the model says after it.
        hidden: (rows, time, features) float16, the last hidden state after each token.
        best: (rows, time) int32, the likeliest token after each.
    """

    tokens: NDArray[np.int32]
    hidden: NDArray[np.float16]
    best: NDArray[np.int32]

    def save(self, file: Path) -> None:
        """Write them, whole or not at all."""
        pending = file.with_suffix(".tmp")
        with pending.open("wb") as stream:
            np.savez(stream, **{name: getattr(self, name) for name in _NAMES})
        pending.replace(file)

    @classmethod
    def load(cls, file: Path) -> DraftRows:
        """Read what :meth:`save` wrote."""
        with np.load(file, allow_pickle=False) as found:
            return cls(**{name: found[name] for name in _NAMES})


def joined_rows(parts: Sequence[DraftRows]) -> DraftRows:
    """Rows of several as one."""
    return DraftRows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _NAMES})


def own_words(reader: Reader, prompts: NDArray[np.int64], count: int, *, sampled: int, seed: int) -> DraftRows:
    """What a model says after pieces of a text: of most the likeliest token each time, of some drawn ones.

    Args:
        reader: of the model.
        prompts: (rows, time).
        count: tokens to say after each.
        sampled: of how many rows, the last ones, tokens are drawn.
        seed: of the drawing.
    """
    generator, (rows, time) = np.random.default_rng(seed), prompts.shape
    reader.begin(rows, time + count)
    states, best, said = list[NDArray[np.float16]](), list[NDArray[np.int32]](), [prompts.astype(np.int32)]

    def read(tokens: NDArray[Any]) -> NDArray[np.float32]:
        logits, hidden = reader.read(tokens.astype(np.int64))
        states.append(hidden.astype(np.float16))
        best.append(logits.argmax(axis=-1).astype(np.int32))
        return logits[:, -1].copy()

    for start in range(0, time, _PIECE):
        logits = read(prompts[:, start : start + _PIECE])
    for _ in range(count):
        tokens = best[-1][:, -1:].copy()
        if sampled:
            noise = generator.gumbel(size=(sampled, logits.shape[-1]))
            tokens[-sampled:, 0] = (logits[-sampled:] + noise).argmax(axis=-1)
        said.append(tokens)
        logits = read(tokens)
    return DraftRows(np.concatenate(said, axis=1), np.concatenate(states, axis=1), np.concatenate(best, axis=1))
