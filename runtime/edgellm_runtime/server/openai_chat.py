"""OpenAI's ``/v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from edgellm_runtime.generation.answer import Chunk, Generation
from edgellm_runtime.generation.options import OptionKeywords
from edgellm_runtime.server.answering import completed, streamed
from edgellm_runtime.server.asking import Asked, ask
from edgellm_runtime.server.call import Call, Frames, JsonText, event
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.forms import grammar_for, wanted_schema
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.messages_fields import messages_of
from edgellm_runtime.server.openai_shared import chat_logprobs, reason_of, usage_of, wants_usage
from edgellm_runtime.server.parts import Sorting, chat_prompt, thinking_variables
from edgellm_runtime.server.sampling_fields import openai_options
from edgellm_runtime.server.tools import Tools, openai_tools, tool_call
from edgellm_runtime.text.answer_parts import AnswerParts

__all__ = ["chat"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_TOP = 20  # most probable tokens beside each


@dataclass(frozen=True)
class _Wanted:
    """What a request asks for."""

    messages: list[dict[str, Any]]
    variables: dict[str, Any] | None
    options: OptionKeywords
    answers: int
    stream: bool
    usage: bool
    tools: Tools
    schema: Any


async def chat(call: Call) -> Response:
    """Answer messages."""
    hosted = call.host.find(call.fields.need("model"))
    call.model = hosted.name
    wanted = _wanted(call.fields, hosted)
    form, tools = wanted.schema is not None, wanted.tools
    if form:
        wanted.options["grammar"] = await grammar_for(hosted, wanted.schema)
    sorting = Sorting(hosted, tools, form=form)

    def prompt() -> list[int]:
        return chat_prompt(hosted, wanted.messages, tools, wanted.variables, form=form)

    asked = await ask(hosted, prompt, answers=wanted.answers, timeout=call.options.timeout,
                      options={**wanted.options, **sorting.options})  # fmt: skip
    call.asked.append(asked)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": hosted.name,
        "system_fingerprint": hosted.fingerprint,
    }  # fmt: skip
    if wanted.stream:
        return streamed(call, _events(call, asked, hosted, head, sorting, usage=wanted.usage))
    answers = await completed(call)
    choices = [
        {
            "index": i,
            "message": _said(parts),
            "logprobs": _logprobs(hosted, a),
            "finish_reason": "tool_calls" if parts.tool_calls else reason_of(a.finish_reason),
        }
        for i, a in enumerate(answers) for parts in [sorting.parts(asked, a)]
    ]  # fmt: skip
    usage = usage_of([asked], sorting.reasoning_tokens(asked))
    return JsonText({**head, "object": "chat.completion", "choices": choices, "usage": usage})


def _said(parts: AnswerParts) -> dict[str, Any]:
    """The assistant's message."""
    said: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
    if parts.reasoning:
        said["reasoning_content"] = parts.reasoning
    if parts.tool_calls:
        said["content"] = parts.content or None
        said["tool_calls"] = [tool_call(c.name, c.json_arguments) for c in parts.tool_calls]
    return said


def _wanted(fields: Fields, hosted: Hosted) -> _Wanted:
    tools, schema = openai_tools(fields), wanted_schema(fields.object("response_format"), "response_format")
    if tools.required:
        schema = tools.schema
    fields.refuse(
        functions=([],),
        function_call=("none", "auto"),
        audio=(),
        modalities=(["text"],),
        prediction=(),
        web_search_options=(),
        verbosity=(),
        moderation=(),
    )
    fields.ignore(
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prompt_cache_options",
    )  # fmt: skip
    options = openai_options(fields, hosted)
    most = fields.integer("max_completion_tokens", 1, 2**31 - 1)
    older = fields.integer("max_tokens", 1, 2**31 - 1)
    options["max_new_tokens"] = most or older or hosted.scheduler.context
    top = fields.integer("top_logprobs", 0, _MOST_TOP)
    if fields.flag("logprobs"):
        options["logprobs"] = top or 0
    elif top is not None:
        raise ApiError("'top_logprobs' needs 'logprobs'; set it to true.", param="top_logprobs")
    given = fields.object("chat_template_kwargs")
    effort = thinking_variables(fields, "reasoning_effort", fields.get("reasoning_effort"), hosted)
    variables = effort if given is None else {**effort, **given.all()}
    stream = fields.flag("stream")
    wanted = _Wanted(
        messages=messages_of(fields.need("messages"), roles=_ROLES),
        variables=variables or None,
        options=options,
        answers=fields.integer("n", 1, hosted.scheduler.options.rows) or 1,
        stream=stream,
        usage=wants_usage(fields, stream=stream),
        tools=tools,
        schema=schema,
    )
    fields.done()
    return wanted


def _logprobs(hosted: Hosted, answer: Generation) -> dict[str, Any] | None:
    if answer.logprobs is None or hosted.model.tokenizer is None:
        return None
    ended = answer.finish_reason == "eos"  # the end token is no part of the content
    return chat_logprobs(hosted.model.tokenizer, answer.logprobs[:-1] if ended else answer.logprobs)


async def _events(
    call: Call, asked: Asked, hosted: Hosted, head: dict[str, Any], sorting: Sorting, *, usage: bool
) -> AsyncIterator[bytes]:
    """The answers as events; choices take turns as they come."""
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if usage else {})}
    frames = Frames(head, "choices")

    def choice(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> bytes:
        return frames.event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    started, calls = set[int](), dict[int, int]()
    async for found in sorting.pieces(call, asked):
        index, logprobs = found.answer, _chunk_logprobs(hosted, found.chunk)
        if index not in started:
            started.add(index)
            yield choice(index, {"role": "assistant", "content": "", "refusal": None})
        for piece in found.pieces:
            if piece.kind == "call":
                calls[index] = calls.get(index, -1) + 1
                yield choice(index, {"tool_calls": [{"index": calls[index], **tool_call(piece.text, "")}]})
            elif piece.kind == "arguments":
                more = {"index": calls[index], "function": {"arguments": piece.text}}
                yield choice(index, {"tool_calls": [more]})
            else:
                name = "content" if piece.kind == "content" else "reasoning_content"
                yield choice(index, {name: piece.text}, None, logprobs)
                logprobs = None
        if logprobs:
            yield choice(index, {"content": ""}, None, logprobs)
        if (parts := found.parts) is not None:
            called = parts.tool_calls and not found.unfinished
            yield choice(index, {}, "tool_calls" if called else reason_of(found.chunk.finish_reason))
    if usage:
        yield event({**head, "choices": [], "usage": usage_of([asked], sorting.reasoning_tokens(asked))})
    yield event("[DONE]")


def _chunk_logprobs(hosted: Hosted, chunk: Chunk) -> dict[str, Any] | None:
    if chunk.logprobs is None or chunk.finish_reason == "eos" or hosted.model.tokenizer is None:
        return None
    return chat_logprobs(hosted.model.tokenizer, [chunk.logprobs])
