"""What a chat template is given, checked: messages, tools, documents and variables, as plain JSON.

A template is untrusted, so that nothing with methods of its own reaches it: everything is copied into JSON's types.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgellm_runtime.arguments import check_list, is_sequence, shown
from edgellm_runtime.errors import OptionError

__all__ = ["ROLES", "Message", "check_inputs", "check_messages", "texts_of"]

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that a message's reasoning goes by
_DEEPEST = 50


def check_messages(messages: Sequence[Message], *, source: str = "") -> list[dict[str, Any]]:
    """The messages as plain dicts; what is None is left out, as the field's renderers do.

    Args:
        messages: each has a ``role``, and a ``content`` that is a text or a list of parts, ``{"type": "text", "text":
            ...}``; a message with ``tool_calls`` may have none. Other keys are the template's own.
        source: of the template; a role that it names is a role too.

    Raises:
        OptionError: none at all, an unknown role, a content of another kind, or what is no JSON.
    """
    if not is_sequence(messages) or not len(messages):
        raise OptionError(f"messages is {shown(messages)}; pass a list of at least one {{'role': ..., 'content': ...}}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise OptionError(f"message {i} is {shown(message)}; it must have the keys 'role' and 'content'")
        found = {key: value for key, value in _plain(f"message {i}", message).items() if value is not None}
        role, content = found.get("role"), found.get("content")
        if not isinstance(role, str) or not (role in ROLES or f"'{role}'" in source or f'"{role}"' in source):
            raise OptionError(f"message {i} has role {shown(role)}; use one of {', '.join(ROLES)}")
        if content is None and not found.get("tool_calls"):
            raise OptionError(f"message {i} is {shown(message)}; it must have the keys 'role' and 'content'")
        if isinstance(content, (list, tuple)):
            check_list(f"the content of message {i}", content, "parts", _check_part)
        elif content is not None and not isinstance(content, str):
            raise OptionError(f"message {i} has content {shown(content)}; it must be a text or a list of parts")
        checked.append(_with_reasoning(found))
    return checked


def check_inputs(
    tools: Sequence[Mapping[str, Any]] | None, documents: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """What a template is given besides messages, by the names that it has for them.

    Args:
        tools: JSON schemas of functions, or None.
        documents: ``{"title": ..., "text": ...}`` each, or None.
        variables: the template's own, such as ``{"enable_thinking": False}``.

    Raises:
        OptionError: of another kind, no JSON, or a variable with a name that is taken.
    """
    given: dict[str, Any] = {}
    for name, value in (("tools", tools), ("documents", documents)):
        given[name] = None if value is None else check_list(name, value, "JSON objects", _check_object)
    if variables is None:
        return given
    if not isinstance(variables, Mapping):
        raise OptionError(
            f"template_variables is {shown(variables)}; it must be a dict of the template's own variables"
        )
    for name, value in variables.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _RESERVED:
            raise OptionError(f"template_variables names {shown(name)}; use a name of the template's own variables")
        given[name] = _plain(name, value)
    return given


def texts_of(value: Any) -> Iterator[str]:
    """Every text in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)


def _check_part(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise OptionError(f"{name} is {shown(value)}; it must be a part such as {{'type': 'text', 'text': ...}}")


def _check_object(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise OptionError(f"{name} is {shown(value)}; it must be a JSON object")
    return _plain(name, value)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates look for it by."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """A copy of JSON's types and nothing else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth < _DEEPEST and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str.__str__(key): _plain(f"{name}.{key}", item, depth + 1) for key, item in value.items()}
    if depth < _DEEPEST and isinstance(value, (list, tuple)):
        items = [_plain(f"{name}[{i}]", item, depth + 1) for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise OptionError(f"{name} is {shown(value)}; it must be JSON: texts, finite numbers, lists, dicts of names")
