"""Tools: what a request offers, how the model is told, and the calls that its answer makes.

The chat template tells the model of them, in its own way; what it answers in that way is taken apart again. Where a
call is required, a grammar leaves the model nothing else to say.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.arguments import shown
from edgellm_runtime.generation.answer import Generation
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.text.answer_parts import AnswerParts, answer_parts

__all__ = ["Held", "Tools", "openai_tools", "parts_of", "tool_call", "with_calls"]

_MOST = 128
_ANY = {"type": "object"}
_MARKS = "<[{"  # with one of these each way of writing a call begins


@dataclass(frozen=True)
class Tools:
    """What a model may call.

    Args:
        offered: as templates want them: ``{"type": "function", "function": {"name", "description", "parameters"}}``.
        required: names of those of which one must be called; empty: none must.
    """

    offered: Sequence[Mapping[str, Any]] = ()
    required: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """Of all that are offered."""
        return [tool["function"]["name"] for tool in self.offered]

    @property
    def schema(self) -> dict[str, Any]:
        """What an answer that must be a call is."""
        forms = [
            {
                "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
                "properties": {"name": {"const": f["name"]}, "arguments": f.get("parameters") or _ANY},
            }
            for f in (tool["function"] for tool in self.offered) if f["name"] in self.required
        ]  # fmt: skip
        return forms[0] if len(forms) == 1 else {"anyOf": forms}

    def check_template(self, hosted: Hosted) -> None:
        """Make sure that the template tells the model of tools.

        Raises:
            ApiError: it says the same with and without them.
        """
        template, asked = hosted.model.chat_template, [{"role": "user", "content": "a"}]
        if self.offered and template.render(asked, tools=list(self.offered)) == template.render(asked):
            raise ApiError("'tools' is not supported by this model, whose chat template does not mention them.",
                           param="tools", code="unsupported_parameter")  # fmt: skip


def openai_tools(fields: Fields) -> Tools:
    """The tools of OpenAI's chats.

    Raises:
        ApiError: something that is no function, or a choice of one that is not offered.
    """
    given = fields.get("tools")
    choice = fields.get("tool_choice")
    if not given:
        if choice not in (None, "none", "auto"):
            raise ApiError("'tool_choice' needs 'tools'; name them, or leave it out.", param="tool_choice")
        return Tools()
    if not isinstance(given, list) or len(given) > _MOST:
        raise fields.wrong("tools", given, f"a list of at most {_MOST} functions")
    offered: list[dict[str, Any]] = []
    for i, tool in enumerate(given):
        own = Fields(tool if isinstance(tool, dict) else {}, f"tools[{i}].")
        function = own.object("function")
        if own.need("type") != "function" or function is None:
            raise ApiError(f"'tools[{i}]' is {shown(tool)}; it must be of type function.", param=f"tools[{i}]")
        offered.append({"type": "function", "function": _function(function)})
        own.done()
    if choice == "none":
        return Tools()
    return Tools(offered, _required(fields, choice, [tool["function"]["name"] for tool in offered]))


def _function(fields: Fields) -> dict[str, Any]:
    name = fields.text("name")
    if not name or len(name) > 64:
        raise fields.wrong("name", name, "a name of at most 64 characters")
    fields.ignore("strict")
    found: dict[str, Any] = {"name": name, "description": fields.text("description") or ""}
    parameters = fields.object("parameters")
    found["parameters"] = {"type": "object", "properties": {}} if parameters is None else parameters.all()
    fields.done()
    return found


def _required(fields: Fields, choice: Any, names: Sequence[str]) -> Sequence[str]:
    if choice in (None, "auto"):
        return ()
    if choice == "required":
        return names
    named = choice.get("function", {}) if isinstance(choice, dict) else {}
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or name not in names:
        raise fields.wrong("tool_choice", choice, f"auto, none, required, or one of {', '.join(names)}")
    return [name]


def with_calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Calls in a message of the assistant's, with their arguments as templates want them: as objects.

    Raises:
        ApiError: something that is no call.
    """
    given, found = message.get("tool_calls"), []
    if not isinstance(given, list) or len(given) > _MOST:
        raise ApiError(
            f"Invalid value for '{where}.tool_calls': {shown(given)}; it must be a list of calls.", param=where
        )
    for i, call in enumerate(given):
        own = Fields(call if isinstance(call, dict) else {}, f"{where}.tool_calls[{i}].")
        function = own.object("function")
        if function is None or own.get("type") not in (None, "function"):
            raise ApiError(
                f"'{where}.tool_calls[{i}]' is {shown(call)}; it must be the call of a function.", param=where
            )
        arguments = function.text("arguments") or "{}"
        try:
            values = json.loads(arguments)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise function.wrong("arguments", arguments, "a JSON object, as a string")
        named = {"name": str(function.need("name")), "arguments": values}
        found.append({"id": str(own.get("id") or ""), "type": "function", "function": named})
    return found


def parts_of(hosted: Hosted, answer: Generation, tools: Tools) -> AnswerParts:
    """An answer taken apart; its special tokens count, for some models mark calls with them."""
    tokenizer = hosted.model.tokenizer
    if not tools.offered or tokenizer is None:
        return AnswerParts(answer.text)
    tokens = [token for token in answer.tokens if token not in tokenizer.eos_token_ids]
    parts = answer_parts(tokenizer.decode(tokens, skip_special=False), tools=tools.names)
    return parts if parts.tool_calls else AnswerParts(answer.text)


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    """A call as OpenAI's interface has it."""
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": name, "arguments": arguments}}  # fmt: skip


class Held:
    """Text of a stream, held back from where a call may begin."""

    def __init__(self) -> None:
        self._holds, self._sent = False, ""

    def push(self, text: str) -> str:
        """What of it can go out."""
        if self._holds:
            return ""
        at = min((i for i in map(text.find, _MARKS) if i >= 0), default=len(text))
        self._holds = at < len(text)
        self._sent += text[:at]
        return text[:at]

    def rest(self, parts: AnswerParts) -> str:
        """What of the content has not gone out when all of it is known."""
        return parts.content.removeprefix(self._sent.strip() if parts.tool_calls else self._sent)
