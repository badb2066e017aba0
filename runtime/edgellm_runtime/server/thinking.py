"""Thinking that a prompt has opened, and a budget for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.text.answer_parts import THINKING_MARKS
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["ThinkingBudget", "closing_tokens", "opens_thinking"]

_OPEN, _CLOSE = THINKING_MARKS
_TAIL = 8  # tokens of a prompt, at whose end thinking may have been opened


def opens_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends within the thinking, as some templates open it."""
    return tokenizer.decode(prompt[-_TAIL:], skip_special=False).rstrip().endswith(_OPEN)


def closing_tokens(tokenizer: Tokenizer) -> list[int]:
    """What ends the thinking, written as models were taught to."""
    return tokenizer.encode(f"\n{_CLOSE}\n\n", special=True)


class ThinkingBudget:
    """A logits processor of one answer: after so many tokens of thinking, the only next ones are those that end it.

    Args:
        tokenizer: the model's.
        budget: tokens of thinking, what opens it among them where the model writes that itself.
    """

    def __init__(self, tokenizer: Tokenizer, budget: int) -> None:
        self._tokenizer, self._budget, self._closing = tokenizer, budget, closing_tokens(tokenizer)
        self._stream: Any = None
        self._begin = self._read = 0
        self._text, self._closed, self._opened = "", False, False
        self._left: list[int] = []  # of what ends it, once that has begun

    def __call__(self, tokens: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :data:`edgellm_runtime.LogitsProcessor`."""
        self._follow(tokens.tolist())
        if not self._left and self._thinks and self._read - self._begin >= self._budget:
            self._left, self._closed = list(self._closing), True
        if self._left:
            token = self._left.pop(0)
            value = logits[token] if np.isfinite(logits[token]) else np.float32(0)
            logits[:] = -np.inf
            logits[token] = value
        return logits

    @property
    def _thinks(self) -> bool:
        return not self._closed and (self._opened or self._text.lstrip().startswith(_OPEN))

    def _follow(self, tokens: Sequence[int]) -> None:
        """Read what is new of the answer; the first call has the prompt alone."""
        if self._stream is None:
            self._stream = self._tokenizer.stream(after=tokens, skip_special=False)
            self._opened, self._begin, self._read = opens_thinking(self._tokenizer, tokens), len(tokens), len(tokens)
        for token in tokens[self._read :]:
            if not self._closed:
                self._text += self._stream.push(token)
                self._closed = _CLOSE in self._text
        self._read = len(tokens)
