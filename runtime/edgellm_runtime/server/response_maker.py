"""A response of ``/v1/responses`` in the making: its items, whole or as numbered events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.server.asking import Asked
from edgellm_runtime.server.call import Call, event
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.parts import Sorting
from edgellm_runtime.text.answer_parts import AnswerParts
from edgellm_runtime.text.part_stream import Piece

__all__ = ["ResponseMaker"]

_NAMES = {
    "content": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}


class ResponseMaker:
    """Makes one response.

    Args:
        asked: what answers.
        sorting: takes the answer apart.
        model: its name.
        fields: of the request, which the response repeats.
    """

    def __init__(self, asked: Asked, sorting: Sorting, model: str, fields: Fields) -> None:
        self._asked, self._sorting, self._created = asked, sorting, int(time.time())
        self._id, self._number, self._items = f"resp_{uuid.uuid4().hex}", -1, list[dict[str, Any]]()
        self._open: Item | CallItem | None = None
        repeated = ("instructions", "max_output_tokens", "temperature", "top_p")
        self._said = {
            "model": model, **{name: fields.get(name) for name in repeated}, "metadata": fields.get("metadata") or {},
            "text": fields.get("text") or {"format": {"type": "text"}}, "tools": fields.get("tools") or [],
            "tool_choice": fields.get("tool_choice") or "auto", "parallel_tool_calls": fields.get("parallel_tool_calls")
            in (None, True), "reasoning": {"effort": None, "summary": None, **(fields.get("reasoning") or {})},
        }  # fmt: skip

    def whole(self, answer: Generation) -> dict[str, Any]:
        """The response to a whole answer."""
        parts, status = self._sorting.parts(self._asked, answer), _status(answer)
        if parts.reasoning:
            self._items.append(Item("reasoning", parts.reasoning).json("completed"))
        if parts.content or not parts.tool_calls:
            self._items.append(Item("content", parts.content).json(status))
        self._items += [CallItem(call.name, call.json_arguments).json("completed") for call in parts.tool_calls]
        return self._response(status, ended=True)

    async def events(self, call: Call) -> AsyncIterator[bytes]:
        """The response as events."""
        for kind in ("response.created", "response.in_progress"):
            yield self._made(kind, response=self._response("in_progress", ended=False))
        parts = AnswerParts("")
        async for found in self._sorting.pieces(call, self._asked):
            for piece in found.pieces:
                for each in self._piece(piece):
                    yield each
            parts = found.parts or parts
        (answer,) = self._asked.found
        for each in self._rest(parts, _status(answer)):
            yield each
        yield self._made(f"response.{_status(answer)}", response=self._response(_status(answer), ended=True))

    def _piece(self, piece: Piece) -> Iterator[bytes]:
        if piece.kind == "arguments":
            assert self._open is not None, "a call begins with its name"
            self._open.text += piece.text
            yield self._made("response.function_call_arguments.delta", **self._place, delta=piece.text)
            return
        if piece.kind == "call":
            yield from self._end("completed")
            self._open = CallItem(piece.text)
            yield self._added(self._open)
            return
        if self._open is None or self._open.kind != piece.kind:
            yield from self._end("completed")
            self._open = Item(piece.kind)
            yield self._added(self._open)
            part_kind, _ = _NAMES[piece.kind]
            yield self._made("response.content_part.added", **self._where, part=_part(part_kind, ""))
        self._open.text += piece.text
        yield self._made(f"{_NAMES[piece.kind][1]}.delta", **self._where, delta=piece.text, **_logprobs(piece.kind))

    def _added(self, item: Item | CallItem) -> bytes:
        return self._made("response.output_item.added", output_index=len(self._items),
                          item=item.json("in_progress", begun=True))  # fmt: skip

    def _rest(self, parts: AnswerParts, status: str) -> Iterator[bytes]:
        """What comes after the last piece: the end of its item."""
        if not parts.content and not parts.tool_calls:
            yield from self._piece(Piece("content", ""))
        yield from self._end(status if not parts.tool_calls else "completed")

    def _end(self, status: str) -> Iterator[bytes]:
        if self._open is None:
            return
        if isinstance(self._open, CallItem):
            status = "completed" if self._open.whole else "incomplete"
        text, item = self._open.text, self._open.json(status)
        if isinstance(self._open, CallItem):
            yield self._made("response.function_call_arguments.done", **self._place, arguments=text,
                             name=self._open.name)  # fmt: skip
        else:
            part_kind, name = _NAMES[self._open.kind]
            yield self._made(f"{name}.done", **self._where, text=text, **_logprobs(self._open.kind))
            yield self._made("response.content_part.done", **self._where, part=_part(part_kind, text))
        yield self._made("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None

    @property
    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": len(self._items)}

    @property
    def _where(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}

    def _made(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)

    def _response(self, status: str, *, ended: bool) -> dict[str, Any]:
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None, **self._said,
            "output": list(self._items), "previous_response_id": None, "store": False, "truncation": "disabled",
            "usage": self._usage() if ended else None,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        read, made = self._asked.prompt_tokens, self._asked.answer_tokens
        cached = {"cached_tokens": self._asked.cached_tokens, "cache_write_tokens": 0}
        thought = {"reasoning_tokens": self._sorting.reasoning_tokens(self._asked)}
        return {
            "input_tokens": read, "input_tokens_details": cached,
            "output_tokens": made, "output_tokens_details": thought, "total_tokens": read + made,
        }  # fmt: skip


class Item:
    """A message, or reasoning.

    Args:
        kind: which part of an answer it is.
        text: of it, so far.
    """

    def __init__(self, kind: str, text: str = "") -> None:
        self.kind, self.text = kind, text
        self.id = f"{'msg' if kind == 'content' else 'rs'}_{uuid.uuid4().hex}"

    def json(self, status: str, *, begun: bool = False) -> dict[str, Any]:
        """As clients read it; one that has just begun has no part yet."""
        content = [] if begun else [_part(_NAMES[self.kind][0], self.text)]
        if self.kind == "content":
            return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}
        return {"id": self.id, "type": "reasoning", "summary": [], "status": status, "content": content}


class CallItem:
    """A call.

    Args:
        name: of the tool.
        text: its arguments as JSON, so far.
    """

    kind = "call"

    def __init__(self, name: str, text: str = "") -> None:
        self.name, self.text = name, text
        self.id, self._call_id = f"fc_{uuid.uuid4().hex}", f"call_{uuid.uuid4().hex[:24]}"

    @property
    def whole(self) -> bool:
        """Whether the answer makes the call: the arguments of another are never JSON."""
        try:
            json.loads(self.text)
        except (ValueError, RecursionError):
            return False
        return True

    def json(self, status: str, *, begun: bool = False) -> dict[str, Any]:
        """As clients read it; one that has just begun has no arguments yet."""
        return {
            "id": self.id, "type": "function_call", "status": status, "name": self.name, "call_id": self._call_id,
            "arguments": "" if begun else self.text,
        }  # fmt: skip


def _status(answer: Generation) -> str:
    return "incomplete" if answer.finish_reason == "length" else "completed"


def _part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "content" else {}
