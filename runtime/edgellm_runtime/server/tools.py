"""Tools: what a request offers, how the model is told, and the calls that its answer makes.

The chat template tells the model of them, in its own way; what it answers in that way is taken apart again. Where a
call is required, a grammar leaves the model nothing else to say.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.arguments import shown
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted

__all__ = [
    "Tools", "arguments_of", "call_of", "function_of", "openai_tools", "required_of", "responses_tools", "tool_call",
    "tool_list", "with_calls",
]  # fmt: skip

_MOST = 128
_ANY = {"type": "object"}
_LONGEST_NAME = 128


@dataclass(frozen=True)
class Tools:
    """What a model may call.

    Args:
        offered: as templates want them: ``{"type": "function", "function": {"name", "description", "parameters"}}``.
        required: names of those of which one must be called; empty: none must.
        single: whether an answer may make one call only.
    """

    offered: Sequence[Mapping[str, Any]] = ()
    required: Sequence[str] = ()
    single: bool = False

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

    def one(own: Fields, where: str) -> dict[str, Any]:
        function = own.object("function")
        if own.need("type") != "function" or function is None:
            raise ApiError(f"'{where}' is no function; it must be of type function.", param=where)
        found = function_of(function, "parameters")
        own.done()
        return found

    return _tools(fields, one)


def responses_tools(fields: Fields) -> Tools:
    """Those of OpenAI's responses, whose functions lie a level higher.

    Raises:
        ApiError: likewise.
    """

    def one(own: Fields, where: str) -> dict[str, Any]:
        if (kind := own.need("type")) != "function":
            raise ApiError(f"'{where}' is of type {shown(kind)}; it must be of type function.", param=where)
        return function_of(own, "parameters")

    return _tools(fields, one)


def _tools(fields: Fields, one: Callable[[Fields, str], dict[str, Any]]) -> Tools:
    choice, single = fields.get("tool_choice"), fields.get("parallel_tool_calls") is not None
    single = single and not fields.flag("parallel_tool_calls")
    if not (offered := tool_list(fields, one)):
        if choice not in (None, "none", "auto"):
            raise ApiError("'tool_choice' needs 'tools'; name them, or leave it out.", param="tool_choice")
        return Tools()
    if choice == "none":
        return Tools()
    names = [tool["function"]["name"] for tool in offered]
    if choice in (None, "auto"):
        return Tools(offered, single=single)
    if choice == "required":
        return Tools(offered, names, single)
    named = choice.get("function", choice) if isinstance(choice, dict) else {}
    name = named.get("name") if isinstance(named, dict) else None
    return Tools(offered, required_of(fields, choice, name, names, "auto, none, required"), single)


def tool_list(fields: Fields, one: Callable[[Fields, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """The field ``tools``, as templates want it.

    Args:
        fields: that have it.
        one: reads one of them, of a name for messages.

    Raises:
        ApiError: no list, or something that is no function.
    """
    given = fields.get("tools")
    if not given:
        return []
    if not isinstance(given, list) or len(given) > _MOST:
        raise fields.wrong("tools", given, f"a list of at most {_MOST} functions")
    offered = []
    for i, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise ApiError(f"'tools[{i}]' is {shown(tool)}; it must be of type function.", param=f"tools[{i}]")
        own = Fields(tool, f"tools[{i}].")
        offered.append({"type": "function", "function": one(own, f"tools[{i}]")})
    return offered


def function_of(fields: Fields, parameters: str) -> dict[str, Any]:
    """A function that is offered.

    Args:
        fields: that describe it.
        parameters: the name of the field that has the schema of its arguments.

    Raises:
        ApiError: it has no name, or other fields.
    """
    name = fields.text("name")
    if not name or len(name) > _LONGEST_NAME:
        raise fields.wrong("name", name, f"a name of at most {_LONGEST_NAME} characters")
    fields.ignore("strict", "cache_control", "eager_input_streaming", "input_examples", "defer_loading")
    found: dict[str, Any] = {"name": name, "description": fields.text("description") or ""}
    schema = fields.object(parameters)
    found["parameters"] = {"type": "object", "properties": {}} if schema is None else schema.all()
    fields.done()
    return found


def required_of(fields: Fields, choice: Any, name: Any, names: Sequence[str], words: str) -> list[str]:
    """The one function that a choice names.

    Raises:
        ApiError: it is not offered.
    """
    if not isinstance(name, str) or name not in names:
        raise fields.wrong("tool_choice", choice, f"{words}, or one of {', '.join(names)}")
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
        name, arguments = str(function.need("name")), function.text("arguments") or "{}"
        found.append(call_of(str(own.get("id") or ""), name, arguments_of(function, arguments)))
    return found


def call_of(call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call as templates want it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_of(fields: Fields, text: str) -> dict[str, Any]:
    """A call's arguments, which are JSON in a text.

    Raises:
        ApiError: they are no object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise fields.wrong("arguments", text, "a JSON object, as a string")
    return values


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    """A call as OpenAI's interface has it."""
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": name, "arguments": arguments}}  # fmt: skip
