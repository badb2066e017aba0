"""The messages of a chat, from either interface's form to what a chat template is given."""

from __future__ import annotations

from typing import Any

from edgellm_runtime.arguments import shown
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.tools import with_calls

__all__ = ["MOST_MESSAGES", "messages_of", "text_of"]

_SYSTEM = ("system", "developer")
_KNOWN = {"role", "content", "name", "refusal", "annotations", "reasoning_content", "reasoning", "tool_calls",
          "tool_call_id", "function_call", "audio"}  # fmt: skip
MOST_MESSAGES = 4096  # messages, or parts of one


def messages_of(given: Any, *, roles: tuple[str, ...]) -> list[dict[str, Any]]:
    """Messages with plain texts.

    Args:
        given: the request's.
        roles: those that there may be.

    Raises:
        ApiError: another form, an unknown role, or parts that are no text.
    """
    if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
        raise ApiError(f"Invalid value for 'messages': {shown(given)}; it must be a list of at least one message.",
                       param="messages", code="invalid_value")  # fmt: skip
    found = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ApiError(f"Invalid value for '{where}': {shown(message)}; it must be an object.", param=where)
        role = message.get("role")
        if role not in roles:
            raise ApiError(f"Invalid value for '{where}.role': {shown(role)}; it must be one of {', '.join(roles)}.",
                           param=f"{where}.role", code="invalid_value")  # fmt: skip
        for name in ("function_call", "audio"):
            if message.get(name):
                raise ApiError(f"'{where}.{name}' is not supported by this server.", param=f"{where}.{name}",
                               code="unsupported_parameter")  # fmt: skip
        if unknown := sorted(message.keys() - _KNOWN):
            raise ApiError(f"Unrecognized request argument supplied: {where}.{unknown[0][:100]}",
                           param=where, code="unknown_parameter")  # fmt: skip
        found.append(_message(message, "system" if role in _SYSTEM else role, where))
    return found


def _message(message: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    made = _said(message, role, where)
    thought = message.get("reasoning_content", message.get("reasoning"))
    if role == "assistant" and thought is not None:
        if not isinstance(thought, str):
            raise ApiError(f"'{where}.reasoning_content' is {shown(thought)}; it must be a string.", param=where)
        made["reasoning_content"] = thought
    return made


def _said(message: dict[str, Any], role: str, where: str) -> dict[str, Any]:
    if role == "assistant" and message.get("tool_calls"):
        content = message.get("content")
        text = text_of(content, f"{where}.content") if content else ""
        return {"role": role, "content": text, "tool_calls": with_calls(message, where)}
    if message.get("tool_calls"):
        raise ApiError(f"'{where}.tool_calls' is for the assistant's messages.", param=f"{where}.tool_calls")
    made: dict[str, Any] = {"role": role, "content": text_of(message.get("content"), f"{where}.content")}
    if role == "tool":
        made["tool_call_id"] = str(message.get("tool_call_id") or "")
        if message.get("name"):
            made["name"] = str(message["name"])
    return made


def text_of(content: Any, where: str) -> str:
    """The text of a content that is one, or a list of parts.

    Raises:
        ApiError: there is none, or a part is no text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not 0 < len(content) <= MOST_MESSAGES:
        raise ApiError(f"Invalid value for '{where}': {shown(content)}; it must be a string or a list of text parts.",
                       param=where, code="invalid_value")  # fmt: skip
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise ApiError(
                f"'{where}[{i}]' is {shown(kind)}; this server takes parts of type 'text' with a text only.",
                param=f"{where}[{i}]", code="unsupported_content",
            )  # fmt: skip
        parts.append(part["text"])
    return "".join(parts)
