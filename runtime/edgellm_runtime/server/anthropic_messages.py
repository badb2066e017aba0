"""Anthropic's ``/v1/messages``, and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.generation.options import OptionKeywords
from edgellm_runtime.server.answering import completed, streamed
from edgellm_runtime.server.asking import Asked, ask
from edgellm_runtime.server.call import Call, JsonText, event
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.messages_fields import messages_of, text_of
from edgellm_runtime.server.sampling_fields import common_options

__all__ = ["count_tokens", "messages"]

_MOST_STOPS = 16
_ROLES = ("user", "assistant")


async def messages(call: Call) -> Response:
    """Answer messages; where the last is the assistant's, the answer goes on with it."""
    fields = call.fields
    hosted = call.host.find(fields.need("model"))
    call.model = hosted.name
    given = _messages(fields)
    options = common_options(fields, hosted, highest=1.0)
    fields.need("max_tokens")
    options["max_new_tokens"] = fields.integer("max_tokens", 1, 2**31 - 1) or 1
    stops = fields.texts("stop_sequences", _MOST_STOPS)
    options["stop"] = stops
    stream = fields.flag("stream")
    fields.done()
    asked = await _asked(call, hosted, given, options)
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": hosted.name}
    if stream:
        return streamed(call, _events(call, asked, hosted, head, stops))
    (answer,) = await completed(call)
    reason, stopped = _reason(hosted, asked, answer, stops)
    content = [{"type": "text", "text": answer.text}]
    return JsonText(
        {**head, "content": content, "stop_reason": reason, "stop_sequence": stopped, "usage": _usage(asked)}
    )


async def count_tokens(call: Call) -> Response:
    """How many tokens a prompt has; nothing is asked of the model."""
    fields = call.fields
    hosted = call.host.find(fields.need("model"))
    call.model = hosted.name
    given = _messages(fields)
    fields.done()
    tokens = await asyncio.to_thread(_encode, hosted, given)
    return JsonText({"input_tokens": len(tokens)})


async def _asked(call: Call, hosted: Hosted, given: list[dict[str, Any]], options: OptionKeywords) -> Asked:
    asked = await ask(hosted, lambda: _encode(hosted, given), timeout=call.options.timeout, options=options)
    call.asked.append(asked)
    return asked


def _encode(hosted: Hosted, given: list[dict[str, Any]]) -> list[int]:
    """The prompt; what the assistant has begun to say comes after the opening of its turn."""
    template = hosted.model.chat_template
    if given[-1]["role"] != "assistant":
        return template.encode(given)
    if len(given) == 1:
        raise ApiError("'messages' has the assistant's beginning only; begin with what the user says.",
                       param="messages")  # fmt: skip
    assert hosted.model.tokenizer is not None  # since it has a template
    return [*template.encode(given[:-1]), *hosted.model.tokenizer.encode(given[-1]["content"])]


def _messages(fields: Fields) -> list[dict[str, Any]]:
    fields.refuse(
        tools=([],), tool_choice=({"type": "auto"}, {"type": "none"}), thinking=({"type": "disabled"},),
        mcp_servers=([],), container=(), context_management=(), output_config=(), output_format=(), diagnostics=(),
        speed=("standard",),
    )  # fmt: skip
    fields.ignore("metadata", "service_tier", "cache_control", "inference_geo", "user_profile_id", "workspace_id")
    system = fields.get("system")
    found = messages_of(fields.need("messages"), roles=_ROLES)
    return found if system is None else [{"role": "system", "content": text_of(system, "system")}, *found]


def _usage(asked: Asked) -> dict[str, Any]:
    return {"input_tokens": asked.prompt_tokens, "output_tokens": asked.answer_tokens}  # those read before among them


def _reason(hosted: Hosted, asked: Asked, answer: Generation, stops: Sequence[str]) -> tuple[str, str | None]:
    """Why an answer ended, and the stop text that ended it."""
    if answer.finish_reason == "length":
        return "max_tokens", None
    if answer.finish_reason == "eos" or hosted.model.tokenizer is None:
        return "end_turn", None
    whole = hosted.model.tokenizer.decode(answer.tokens, after=asked.prompt)
    stopped = next((stop for stop in stops if whole.startswith(stop, len(answer.text))), None)
    return "stop_sequence", stopped


async def _events(
    call: Call, asked: Asked, hosted: Hosted, head: dict[str, Any], stops: Sequence[str]
) -> AsyncIterator[bytes]:
    def made(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    begun = {"input_tokens": asked.prompt_tokens, "output_tokens": 0}
    yield made("message_start", message={**head, "content": [], "stop_reason": None, "stop_sequence": None,
                                         "usage": begun})  # fmt: skip
    yield made("content_block_start", index=0, content_block={"type": "text", "text": ""})
    async for _, chunk in asked.chunks():
        call.token_came()
        if chunk.text:
            yield made("content_block_delta", index=0, delta={"type": "text_delta", "text": chunk.text})
    reason, stopped = _reason(hosted, asked, asked.found[0], stops)
    yield made("content_block_stop", index=0)
    yield made("message_delta", delta={"stop_reason": reason, "stop_sequence": stopped},
               usage={"output_tokens": asked.answer_tokens})  # fmt: skip
    yield made("message_stop")
