"""Anthropic's ``/v1/messages``, and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response

from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.server.answering import completed, streamed
from edgellm_runtime.server.anthropic_fields import anthropic_thinking, anthropic_tools, anthropic_turns
from edgellm_runtime.server.asking import Asked, ask
from edgellm_runtime.server.call import Call, JsonText, event
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.forms import grammar_for
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.parts import Sorting, chat_prompt
from edgellm_runtime.server.sampling_fields import common_options
from edgellm_runtime.server.thinking import ThinkingBudget
from edgellm_runtime.server.tools import Tools
from edgellm_runtime.text.answer_parts import AnswerParts
from edgellm_runtime.text.part_stream import Piece

__all__ = ["count_tokens", "messages"]

_MOST_STOPS = 16
_NO_THOUGHT = {"type": "thinking", "thinking": "", "signature": ""}


@dataclass(frozen=True)
class _Wanted:
    """What a request asks for, of a model and its template."""

    turns: list[dict[str, Any]]
    tools: Tools
    variables: dict[str, Any]
    budget: int | None  # tokens of thinking


async def messages(call: Call) -> Response:
    """Answer messages; where the last is the assistant's, the answer goes on with it."""
    fields = call.fields
    hosted = call.host.find(fields.need("model"))
    call.model = hosted.name
    wanted = _wanted(fields, hosted)
    options = common_options(fields, hosted, highest=1.0)
    fields.need("max_tokens")
    options["max_new_tokens"] = fields.integer("max_tokens", 1, 2**31 - 1) or 1
    stops = fields.texts("stop_sequences", _MOST_STOPS)
    options["stop"] = stops
    stream = fields.flag("stream")
    fields.done()
    form = bool(wanted.tools.required)
    if form:
        options["grammar"] = await grammar_for(hosted, wanted.tools.schema)
    elif wanted.budget is not None and hosted.model.tokenizer is not None:
        options["logits_processors"] = [ThinkingBudget(hosted.model.tokenizer, wanted.budget)]
    sorting = Sorting(hosted, wanted.tools, form=form)
    asked = await ask(hosted, lambda: _encode(hosted, wanted, form=form), timeout=call.options.timeout,
                      options={**options, **sorting.options})  # fmt: skip
    call.asked.append(asked)
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": hosted.name}
    ending = _Ending(hosted, asked, stops, sorting)
    if stream:
        return streamed(call, _events(call, asked, head, ending))
    (answer,) = await completed(call)
    parts = sorting.parts(asked, answer)
    reason, stopped = ending.reason(answer, parts)
    return JsonText({**head, "content": _content(parts), "stop_reason": reason, "stop_sequence": stopped,
                     "usage": ending.usage()})  # fmt: skip


def _content(parts: AnswerParts) -> list[dict[str, Any]]:
    """The blocks of a whole answer."""
    found: list[dict[str, Any]] = []
    if parts.reasoning:
        found.append({"type": "thinking", "thinking": parts.reasoning, "signature": ""})
    if parts.content or not parts.tool_calls:
        found.append({"type": "text", "text": parts.content})
    return [*found, *({**_tool_use(c.name), "input": c.arguments} for c in parts.tool_calls)]


def _tool_use(name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}


async def count_tokens(call: Call) -> Response:
    """How many tokens a prompt has; nothing is asked of the model."""
    fields = call.fields
    hosted = call.host.find(fields.need("model"))
    call.model = hosted.name
    wanted = _wanted(fields, hosted)
    fields.done()
    tokens = await asyncio.to_thread(_encode, hosted, wanted, form=bool(wanted.tools.required))
    return JsonText({"input_tokens": len(tokens)})


def _encode(hosted: Hosted, wanted: _Wanted, *, form: bool) -> list[int]:
    """The prompt; what the assistant has begun to say comes after the opening of its turn."""
    given, begun = wanted.turns, ""
    if given[-1]["role"] == "assistant" and "tool_calls" not in given[-1]:
        if len(given) == 1:
            raise ApiError("'messages' has the assistant's beginning only; begin with what the user says.",
                           param="messages")  # fmt: skip
        given, begun = given[:-1], given[-1]["content"]
    prompt = chat_prompt(hosted, given, wanted.tools, wanted.variables or None, form=form)
    assert hosted.model.tokenizer is not None  # since it has a template
    return [*prompt, *hosted.model.tokenizer.encode(begun)] if begun else prompt


def _wanted(fields: Fields, hosted: Hosted) -> _Wanted:
    fields.refuse(
        mcp_servers=([],), container=(), context_management=(), output_config=(), output_format=(), diagnostics=(),
        speed=("standard",),
    )  # fmt: skip
    fields.ignore("metadata", "service_tier", "cache_control", "inference_geo", "user_profile_id", "workspace_id")
    return _Wanted(anthropic_turns(fields), anthropic_tools(fields), *anthropic_thinking(fields, hosted))


class _Ending:
    """How an answer ended, and what it took.

    Args:
        hosted: whose it is.
        asked: what was asked.
        stops: texts that end it.
        sorting: takes it apart.
    """

    def __init__(self, hosted: Hosted, asked: Asked, stops: Sequence[str], sorting: Sorting) -> None:
        self._hosted, self._asked, self._stops, self.sorting = hosted, asked, stops, sorting

    def usage(self) -> dict[str, Any]:
        """Tokens read, those read before among them, and made."""
        return {"input_tokens": self._asked.prompt_tokens, "output_tokens": self._asked.answer_tokens}

    def reason(self, answer: Generation, parts: AnswerParts) -> tuple[str, str | None]:
        """Why the answer ended, and the stop text that ended it."""
        if parts.tool_calls:
            return "tool_use", None
        if answer.finish_reason == "length":
            return "max_tokens", None
        tokenizer = self._hosted.model.tokenizer
        if answer.finish_reason == "eos" or tokenizer is None:
            return "end_turn", None
        stream = tokenizer.stream(after=self._asked.prompt, shown=self.sorting.options["shown_tokens"])
        whole = "".join(map(stream.push, answer.tokens)) + stream.finish()
        stopped = next((stop for stop in self._stops if whole.startswith(stop, len(answer.text))), None)
        return "stop_sequence", stopped


class _Blocks:
    """The blocks of a stream, one after another."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def piece(self, piece: Piece) -> Iterator[bytes]:
        """Some of a text, of thinking or of a call, in a block of its own."""
        if piece.kind == "call":
            yield from self.end()
            yield self._begin("tool_use", _tool_use(piece.text))
            return
        if piece.kind == "arguments":
            yield self._delta({"type": "input_json_delta", "partial_json": piece.text})
            return
        kind = "text" if piece.kind == "content" else "thinking"
        if self._kind != kind:
            yield from self.end()
            empty = {"type": "text", "text": ""} if kind == "text" else _NO_THOUGHT
            yield self._begin(kind, empty)
        yield self._delta({"type": f"{kind}_delta", kind: piece.text})

    def end(self) -> Iterator[bytes]:
        """End the block that goes on."""
        if self._kind == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._kind:
            yield _made("content_block_stop", index=self._index)
        self._kind = ""

    @property
    def none(self) -> bool:
        """Whether there was none with a text or a call."""
        return self._index < 0 or (self._index == 0 and self._kind == "thinking")

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        self._index, self._kind = self._index + 1, kind
        return _made("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _made("content_block_delta", index=self._index, delta=delta)


def _made(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


async def _events(call: Call, asked: Asked, head: dict[str, Any], ending: _Ending) -> AsyncIterator[bytes]:
    begun = {"input_tokens": asked.prompt_tokens, "output_tokens": 0}
    yield _made("message_start", message={**head, "content": [], "stop_reason": None, "stop_sequence": None,
                                          "usage": begun})  # fmt: skip
    blocks, parts = _Blocks(), AnswerParts("")
    async for found in ending.sorting.pieces(call, asked):
        for piece in found.pieces:
            for each in blocks.piece(piece):
                yield each
        if found.parts is not None:
            parts = replace(found.parts, tool_calls=()) if found.unfinished else found.parts
    if blocks.none:
        for each in blocks.piece(Piece("content", "")):
            yield each
    for each in blocks.end():
        yield each
    reason, stopped = ending.reason(asked.found[0], parts)
    yield _made("message_delta", delta={"stop_reason": reason, "stop_sequence": stopped},
                usage={"output_tokens": asked.answer_tokens})  # fmt: skip
    yield _made("message_stop")
