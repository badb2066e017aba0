"""What Anthropic's requests say, in the form that a chat template is given: turns of blocks, and tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgellm_runtime.arguments import shown
from edgellm_runtime.server.faults import ApiError
from edgellm_runtime.server.fields import Fields
from edgellm_runtime.server.host import Hosted
from edgellm_runtime.server.messages_fields import MOST_MESSAGES, text_of
from edgellm_runtime.server.parts import thinking_variables
from edgellm_runtime.server.tools import Tools, call_of, function_of, required_of, tool_list

__all__ = ["anthropic_thinking", "anthropic_tools", "anthropic_turns"]

_ROLES = ("user", "assistant")
_LEAST_BUDGET = 1


def anthropic_turns(fields: Fields) -> list[dict[str, Any]]:
    """System and messages. A turn of the user's that has results of tools becomes several messages.

    Raises:
        ApiError: another form, an unknown role, or blocks that are not taken.
    """
    given, system = fields.need("messages"), fields.get("system")
    if not isinstance(given, list) or not 0 < len(given) <= MOST_MESSAGES:
        raise fields.wrong("messages", given, "a list of at least one message")
    found = [] if system is None else [{"role": "system", "content": text_of(system, "system")}]
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ApiError(f"Invalid value for '{where}': {shown(message)}; it must be an object.", param=where)
        own = Fields(message, f"{where}.")
        role, content = own.need("role"), own.need("content")
        own.done()
        if role not in _ROLES:
            raise own.wrong("role", role, f"one of {', '.join(_ROLES)}")
        if isinstance(content, str):
            found.append({"role": role, "content": content})
            continue
        blocks = _blocks(content, f"{where}.content")
        found += _user(blocks) if role == "user" else [_assistant(blocks)]
    return found


def _blocks(content: Any, where: str) -> list[Fields]:
    if not isinstance(content, list) or not 0 < len(content) <= MOST_MESSAGES:
        raise ApiError(f"Invalid value for '{where}': {shown(content)}; it must be a string or a list of blocks.",
                       param=where, code="invalid_value")  # fmt: skip
    found = []
    for i, block in enumerate(content):
        if not isinstance(block, dict):
            raise ApiError(f"'{where}[{i}]' is {shown(block)}; it must be a block.", param=f"{where}[{i}]")
        found.append(Fields(block, f"{where}[{i}]."))
    return found


def _user(blocks: Sequence[Fields]) -> list[dict[str, Any]]:
    """Results of tools, in their order, and then what is said."""
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for block in blocks:
        kind = block.need("type")
        block.ignore("cache_control", "citations")
        if kind == "text":
            texts.append(_needed_text(block, "text"))
        elif kind == "tool_result":
            call_id, content = _needed_text(block, "tool_use_id"), block.get("content")
            text = "" if content is None or content == [] else text_of(content, block.name("content"))
            if block.flag("is_error"):
                text = f"Error: {text}"
            results.append({"role": "tool", "tool_call_id": call_id, "content": text})
        else:
            raise _not_taken(block, kind, "text and tool_result")
        block.done()
    return [*results, {"role": "user", "content": "".join(texts)}] if texts else results


def _assistant(blocks: Sequence[Fields]) -> dict[str, Any]:
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for block in blocks:
        kind = block.need("type")
        block.ignore("cache_control", "citations", "signature", "caller", "toolset_name")
        if kind == "text":
            texts.append(_needed_text(block, "text"))
        elif kind == "thinking":
            thoughts.append(_needed_text(block, "thinking"))
        elif kind == "tool_use":
            arguments = block.object("input")
            calls.append(call_of(_needed_text(block, "id"), _needed_text(block, "name"),
                                 {} if arguments is None else arguments.all()))  # fmt: skip
        else:
            raise _not_taken(block, kind, "text, thinking and tool_use")
        block.done()
    said: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    return {**said, "tool_calls": calls} if calls else said


def _needed_text(block: Fields, name: str) -> str:
    block.need(name)
    return block.text(name) or ""


def _not_taken(block: Fields, kind: Any, taken: str) -> ApiError:
    return ApiError(f"'{block.name('type')}' is {shown(kind)}; this server takes blocks of {taken} here.",
                    param=block.name("type"), code="unsupported_content")  # fmt: skip


def anthropic_tools(fields: Fields) -> Tools:
    """The tools of a request.

    Raises:
        ApiError: one that the client does not run itself, or a choice of one that is not offered.
    """

    def one(own: Fields, where: str) -> dict[str, Any]:
        if (kind := own.get("type")) not in (None, "custom"):
            raise ApiError(f"'{where}' is of type {shown(kind)}; this server has no tools of its own.",
                           param=f"{where}.type", code="unsupported_parameter")  # fmt: skip
        own.need("input_schema")
        return function_of(own, "input_schema")

    choice = fields.object("tool_choice")
    kind = None if choice is None else choice.need("type")
    name = None if choice is None else choice.text("name")
    single = choice is not None and choice.flag("disable_parallel_tool_use")
    if choice is not None:
        choice.done()
    offered = tool_list(fields, one)
    if not offered:
        if kind not in (None, "auto", "none"):
            raise ApiError("'tool_choice' needs 'tools'; name them, or leave it out.", param="tool_choice")
        return Tools()
    if kind == "none":
        return Tools()
    if kind in (None, "auto"):
        return Tools(offered, single=single)
    names = [tool["function"]["name"] for tool in offered]
    if kind == "any":
        return Tools(offered, names, single)
    wanted = name if kind == "tool" else None
    return Tools(offered, required_of(fields, fields.get("tool_choice"), wanted, names, "auto, any, none"), single)


def anthropic_thinking(fields: Fields, hosted: Hosted) -> tuple[dict[str, Any], int | None]:
    """What the template is told of thinking, and the most tokens that it may have; None: any number.

    Raises:
        ApiError: an unknown type, a budget that leaves no token for the answer, or a model whose template cannot be
            told.
    """
    own = fields.object("thinking")
    if own is None:
        return {}, None
    kind = own.need("type")
    budget = own.integer("budget_tokens", _LEAST_BUDGET, 2**31 - 1)
    own.ignore("display")
    own.done()
    if kind == "enabled":
        if budget is None:
            own.need("budget_tokens")
        most = fields.get("max_tokens")
        if type(most) is int and budget is not None and budget >= most:
            raise ApiError(f"'{own.name('budget_tokens')}' is {budget}; it must be less than 'max_tokens', {most}.",
                           param=own.name("budget_tokens"))  # fmt: skip
        return thinking_variables(fields, "thinking", "medium", hosted), budget
    if kind == "disabled":  # which a model that cannot think is anyway
        known = hosted.model.chat_template.variables
        return {name: False for name in ("enable_thinking", "thinking") if name in known}, None
    if kind != "adaptive":
        raise own.wrong("type", kind, "one of enabled, disabled, adaptive")
    return {}, budget
