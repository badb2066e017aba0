"""OpenAI's ``/v1/responses``, for text. Nothing is kept: each request brings the whole conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from edgellm_runtime.arguments import shown
from edgellm_runtime.server.answering import completed, streamed
from edgellm_runtime.server.asking import Asked, ask
from edgellm_runtime.server.call import Call, JsonText, event
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.forms import grammar_for, wanted_schema
from edgellm_runtime.server.messages_fields import messages_of
from edgellm_runtime.server.sampling_fields import common_options

__all__ = ["responses"]

_ROLES = ("system", "developer", "user", "assistant")
_OF_ITEMS = ("type", "id", "status", "phase")  # what an item of an earlier response has besides its message


async def responses(call: Call) -> Response:
    """Answer an input: a text, or the items of a conversation."""
    fields = call.fields
    hosted = call.host.find(fields.need("model"))
    call.model = hosted.name
    _refuse(fields)
    options = common_options(fields, hosted, highest=2.0)
    most = fields.integer("max_output_tokens", 1, 2**31 - 1)
    options["max_new_tokens"] = most or hosted.scheduler.context
    instructions, given = fields.text("instructions"), _messages(fields.need("input"))
    if instructions is not None:
        given = [{"role": "system", "content": instructions}, *given]
    stream, schema = fields.flag("stream"), _schema(fields)
    fields.done()
    if schema is not None:
        options["grammar"] = await grammar_for(hosted, schema)
    template = hosted.model.chat_template
    asked = await ask(hosted, lambda: template.encode(given), timeout=call.options.timeout, options=options)
    call.asked.append(asked)
    made = _Made(asked, hosted.name, instructions, most, fields)
    if stream:
        return streamed(call, made.events(call))
    (answer,) = await completed(call)
    return JsonText(made.response("incomplete" if answer.finish_reason == "length" else "completed", answer.text))


def _schema(fields: Fields) -> Any:
    """The JSON schema that the answer is to be of; None: it is a text."""
    text = fields.object("text")
    if text is None:
        return None
    schema = wanted_schema(text.object("format"), "text.format")
    text.refuse(verbosity=())
    text.done()
    return schema


def _refuse(fields: Fields) -> None:
    fields.refuse(
        tools=([],), tool_choice=("none", "auto"), previous_response_id=(), conversation=(), background=(False,),
        include=([],), reasoning=({},), prompt=(), max_tool_calls=(), truncation=("disabled",), top_logprobs=(0,),
    )  # fmt: skip
    fields.ignore(
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "stream_options",
    )  # fmt: skip


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ApiError(f"Invalid value for 'input': {shown(given)}; it must be a string or a list of messages.",
                       param="input", code="invalid_value")  # fmt: skip
    for i, item in enumerate(given):
        if isinstance(item, dict) and item.get("type", "message") != "message":
            raise ApiError(f"'input[{i}]' is of type {shown(item['type'])}; this server takes messages only.",
                           param=f"input[{i}]", code="unsupported_content")  # fmt: skip
    plain = [
        {k: v for k, v in item.items() if k not in _OF_ITEMS} if isinstance(item, dict) else item for item in given
    ]
    return messages_of(plain, roles=_ROLES)


class _Made:
    """A response in the making.

    Args:
        asked: what answers.
        model: its name.
        instructions: of the request.
        most: tokens of the answer; None: no limit of its own.
        fields: of the request.
    """

    def __init__(self, asked: Asked, model: str, instructions: str | None, most: int | None, fields: Fields) -> None:
        self._asked, self._created = asked, int(time.time())
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._said = {
            "model": model, "instructions": instructions, "max_output_tokens": most,
            "temperature": fields.get("temperature"), "top_p": fields.get("top_p"),
            "metadata": fields.get("metadata") or {}, "text": fields.get("text") or {"format": {"type": "text"}},
        }  # fmt: skip

    def response(self, status: str, text: str | None) -> dict[str, Any]:
        """The whole response.

        Args:
            status: of it.
            text: its answer; None: none yet.
        """
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None, **self._said,
            "output": [] if text is None else [self._message(status, text)], "parallel_tool_calls": False,
            "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False,
            "tool_choice": "none", "tools": [], "truncation": "disabled",
            "usage": None if text is None else self._usage(),
        }  # fmt: skip

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _usage(self) -> dict[str, Any]:
        read, made = self._asked.prompt_tokens, self._asked.answer_tokens
        cached = {"cached_tokens": self._asked.cached_tokens, "cache_write_tokens": 0}
        return {
            "input_tokens": read, "input_tokens_details": cached,
            "output_tokens": made, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": read + made,
        }  # fmt: skip

    async def events(self, call: Call) -> AsyncIterator[bytes]:
        """The response as numbered events."""
        number = -1

        def made(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number, **fields}, kind)

        where = {"item_id": self._item, "output_index": 0, "content_index": 0}
        for kind in ("response.created", "response.in_progress"):
            yield made(kind, response=self.response("in_progress", None))
        yield made("response.output_item.added", output_index=0, item=self._message("in_progress", None))
        yield made("response.content_part.added", **where, part=self._part(""))
        async for _, chunk in self._asked.chunks():
            call.token_came()
            if chunk.text:
                yield made("response.output_text.delta", **where, delta=chunk.text, logprobs=[])
        (answer,) = self._asked.found
        status = "incomplete" if answer.finish_reason == "length" else "completed"
        yield made("response.output_text.done", **where, text=answer.text, logprobs=[])
        yield made("response.content_part.done", **where, part=self._part(answer.text))
        yield made("response.output_item.done", output_index=0, item=self._message(status, answer.text))
        yield made(f"response.{status}", response=self.response(status, answer.text))
