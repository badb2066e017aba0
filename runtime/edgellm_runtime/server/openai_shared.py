"""What OpenAI's interfaces have in common: usage, reasons, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgellm_runtime.generation.answer import FinishReason
from edgellm_runtime.generation.logprobs import TokenLogprobs
from edgellm_runtime.server.asking import Asked
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["chat_logprobs", "reason_of", "texts_of", "usage_of", "wants_usage"]


def wants_usage(fields: Fields, *, stream: bool) -> bool:
    """Whether a stream is to end with what it took."""
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise ApiError("'stream_options' is of streams only; set 'stream', or leave it out.", param="stream_options")
    wanted = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.done()
    return wanted


def texts_of(fields: Fields, name: str, most: int) -> list[Any]:
    """A text, token ids, or a list of either, as a list of at most so many."""
    given = fields.need(name)
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise fields.wrong(name, given, "a string, token ids or a list")
    texts = [given] if all(type(token) is int for token in given) else given
    if len(texts) > most or not all(isinstance(text, (str, list)) for text in texts):
        raise fields.wrong(name, given, f"at most {most} strings or lists of token ids")
    return texts


def usage_of(asked: Sequence[Asked], reasoning: int = 0) -> dict[str, Any]:
    """Tokens read and made.

    Args:
        asked: all that a request asked.
        reasoning: of those made, the thinking's.
    """
    prompt, made = sum(a.prompt_tokens for a in asked), sum(a.answer_tokens for a in asked)
    details = {"cached_tokens": sum(a.cached_tokens for a in asked)}
    return {
        "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
        "prompt_tokens_details": details, "completion_tokens_details": {"reasoning_tokens": reasoning},
    }  # fmt: skip


def reason_of(reason: FinishReason | None) -> str | None:
    """Why an answer ended, in OpenAI's words."""
    return None if reason is None else "length" if reason == "length" else "stop"


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    content = [
        {**entry(place.token, place.logprob), "top_logprobs": [entry(*each) for each in place.top]} for place in found
    ]
    return {"content": content, "refusal": None}
