"""What a generating method gives: an answer, whole or token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from edgellm_runtime.arguments import shown

if TYPE_CHECKING:
    from edgellm_runtime.generation.logprobs import TokenLogprobs
    from edgellm_runtime.generation.speculation import Speculation
    from edgellm_runtime.generation.text_state import TextState

__all__ = ["Chunk", "FinishReason", "Generation", "Timings"]

FinishReason = Literal["eos", "stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of one answer went; in a batch, shared work counts in full for every row.

    Args:
        prefill_s: reading the prompt; in a conversation only the part that was not read before.
        decode_s: every token after the first; what a stream's reader does in between is not counted.
        ttft_ms: time to first token: making the state, reading the prompt, choosing the token.
        prefill_tokens_per_s: prompt tokens read, over ``prefill_s``.
        decode_tokens_per_s: tokens after the first, over ``decode_s``; 0 when there were none.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_ms: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True, repr=False)
class Generation:
    """A whole answer.

    Args:
        text: what the answer adds to the prompt's text; without the end token and without the stop string.
        tokens: every token the model chose, the end token and a stop string's included.
        prompt_tokens: how many tokens the prompt has.
        finish_reason: ``eos``, ``stop``, ``length`` (also when the context is full); ``cancelled`` or ``deadline`` for
            what there is of an answer that was ended from outside.
        timings: where the time went.
        logprobs: one for each token, where they were asked for.
        state: the text with its answer, to go on from; None where no state was given.
        cached_tokens: of the prompt, those that a prefix cache had.
        speculation: what drafts were worth, where they were asked for.
        prompt_logprobs: one for each token of the prompt after its first, where a scheduler was asked for them.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None
    state: TextState | None = field(default=None, repr=False, compare=False)
    cached_tokens: int = 0
    speculation: Speculation | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None

    def __repr__(self) -> str:
        speed = f"{self.timings.decode_tokens_per_s:.1f} tokens/s"
        return f"<Generation {shown(self.text)}, {len(self.tokens)} tokens, {self.finish_reason}, {speed}>"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON's types, without what was not asked for, and without the state, which has its own file."""
        found = asdict(replace(self, state=None))
        unasked = ("logprobs", "speculation", "prompt_logprobs")
        return {k: v for k, v in found.items() if k != "state" and not (k in unasked and v is None)}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One token of an answer.

    Args:
        text: what the token completed; empty while a character is incomplete or a stop string may be under way.
        token_ids: the token; none for the prompt's text, and where a last chunk chooses none.
        finish_reason: set on the last chunk.
        logprobs: of the token, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    logprobs: TokenLogprobs | None = None
