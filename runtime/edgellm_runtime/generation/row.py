"""One answer in the making: its tokens, its text, and what ends it. It knows no model."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm_runtime.generation.answer import Chunk, FinishReason
from edgellm_runtime.generation.logprobs import TokenLogprobs
from edgellm_runtime.generation.options import GenerationOptions
from edgellm_runtime.generation.stops import StopMatcher
from edgellm_runtime.state import State
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["Row"]


class Row:
    """One answer in the making.

    Args:
        prompt: its tokens.
        tokenizer: turns tokens into text; None gives an answer without text.
        options: when to end.
        room: tokens that the context holds after the prompt.
    """

    def __init__(
        self, prompt: Sequence[int], tokenizer: Tokenizer | None, options: GenerationOptions, room: int
    ) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.finish_reason: FinishReason | None = None
        self.decode_s = 0.0
        self.state: State | None = None  # once it has ended, if anyone will ask for it
        self._limit = min(options.max_new_tokens, room)
        self.room = len(prompt) + self._limit  # tokens the state will hold at most
        self._tokenizer, self._hides = tokenizer, options.skip_special_tokens
        shown = options.shown_tokens
        self._decoder = tokenizer.stream(after=prompt, skip_special=self._hides, shown=shown) if tokenizer else None
        self._eos = frozenset[int]() if options.ignore_eos or not tokenizer else tokenizer.eos_token_ids
        self._stop_tokens = frozenset(options.stop_tokens)
        self.ends = self._eos | self._stop_tokens
        self._stops = StopMatcher(options.stop)
        self._wants_logprobs = options.logprobs is not None
        self.logprobs: list[TokenLogprobs] = []
        if self._limit == 0:
            self.finish_reason = "length"

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self._limit - len(self.tokens)

    def echo(self) -> Chunk:
        """The prompt's text, which the answer's is to begin with."""
        assert self._tokenizer is not None
        text = self._tokenizer.decode(self.prompt, skip_special=self._hides)
        self.texts.append(text)
        return Chunk(text, (), None)

    def push(self, token: int) -> Chunk:
        """Take the next token."""
        self.tokens.append(token)
        text, stopped = "", False
        ended = token in self.ends
        if self._decoder and (not ended or (token in self._eos and not self._hides)):
            text, stopped = self._stops.push(self._decoder.push(token))
        if stopped:
            self.finish_reason = "stop"
        elif ended or len(self.tokens) >= self._limit:
            rest, stopped = self._rest()
            text += rest
            reason: FinishReason = "eos" if token in self._eos else "stop" if ended else "length"
            self.finish_reason = "stop" if stopped else reason
        self.texts.append(text)
        return Chunk(text, (token,), self.finish_reason, self.logprobs[-1] if self._wants_logprobs else None)

    def end(self, reason: FinishReason) -> Chunk:
        """End here: what was held back for a stop text goes out, an incomplete character does not."""
        self.finish_reason, text = reason, self._stops.finish()
        self.texts.append(text)
        return Chunk(text, (), reason)

    def _rest(self) -> tuple[str, bool]:
        if not self._decoder:
            return "", False
        text, stopped = self._stops.push(self._decoder.finish())
        return text if stopped else text + self._stops.finish(), stopped
