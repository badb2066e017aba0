"""What an answer is made of: the thinking, the calls of tools, and what is left for a reader.

Models write these in the ways that their templates taught them; each way that is common is known here by its marks, and
no model by its name. What only looks like a call stays text, so that nothing of an answer is lost.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.arguments import check_flag, check_list, check_text

__all__ = [
    "CALL_MARKS", "FENCE_MARKS", "THINKING_MARKS", "AnswerParts", "ToolCall", "answer_parts", "parameter_value",
]  # fmt: skip

_MOST = 1 << 16  # characters that are looked at: the marks' patterns are quadratic in what is not closed
_NO_CALLS = (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError, MemoryError)
THINKING_MARKS = ("<think>", "</think>")
_OPEN, _CLOSE = THINKING_MARKS


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model asks for.

    Args:
        name: of the tool.
        arguments: as JSON has them.
    """

    name: str
    arguments: dict[str, Any]

    @property
    def json_arguments(self) -> str:
        """The arguments as JSON, as interfaces carry them."""
        return json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class AnswerParts:
    """An answer taken apart.

    Args:
        content: for a reader; what is around thinking and calls.
        reasoning: the thinking; None where there is none.
        tool_calls: in the order in which they were written.
    """

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


def answer_parts(text: str, *, tools: Collection[str] | None = None, thinking: bool = False) -> AnswerParts:
    """Take an answer apart.

    Args:
        text: the answer with the names of its special tokens, without an end token's.
        tools: names that may be called; a call of another stays text. None: any may.
        thinking: whether the prompt ended within the thinking, as some templates open it.

    Raises:
        OptionError: something of the wrong kind.
    """
    check_text("text", text)
    check_flag("thinking", thinking)
    known = None if tools is None else frozenset(check_list("tools", list(tools), "names of tools", check_text))
    reasoning, rest = _split_thinking(text, thinking)
    content, calls = _split_calls(rest, known) if len(rest) <= _MOST else (rest, ())
    return AnswerParts(content.strip() if reasoning is not None or calls else content, reasoning, calls)


def _split_thinking(text: str, thinking: bool) -> tuple[str | None, str]:
    begun = text.lstrip()
    if begun.startswith(_OPEN):
        inside = begun[len(_OPEN) :]
    elif thinking:
        inside = text
    else:
        return None, text
    thought, closed, rest = inside.partition(_CLOSE)
    return thought.strip(), rest if closed else ""


def _split_calls(text: str, known: frozenset[str] | None) -> tuple[str, tuple[ToolCall, ...]]:
    def may(calls: list[ToolCall]) -> bool:
        return bool(calls) and all(known is None or call.name in known for call in calls)

    found: list[ToolCall] = []
    for pattern, read in _MARKED:
        kept, at = [], 0
        for match in pattern.finditer(text):
            if may(calls := list(_tried(read, match))):
                found += calls
                kept.append(text[at : match.start()])
                at = match.end()
        if at:
            return "".join([*kept, text[at:]]), tuple(found)
    whole = text.strip()
    if whole[:1] in ("{", "["):  # nothing but calls, without a mark
        for read_whole in (_json_calls, _python_calls):
            try:
                calls = list(read_whole(whole))
            except _NO_CALLS:
                continue
            if may(calls):
                return "", tuple(calls)
    return text, ()


def _tried(read: Callable[[re.Match[str]], Iterator[ToolCall]], match: re.Match[str]) -> Iterator[ToolCall]:
    try:
        yield from list(read(match))
    except _NO_CALLS:
        return


def _json_calls(text: str) -> Iterator[ToolCall]:
    """One object, several in a list, or several one after the other."""
    decoder, at = json.JSONDecoder(**_STRICT), 0
    text = text.strip()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        for entry in value if isinstance(value, list) else [value]:
            yield _call_of(entry)
        while at < len(text) and text[at] in " \n\t\r;,":
            at += 1


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is beyond the numbers that there are")
    return value


_STRICT: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite}  # for json: what others can read again


def _call_of(entry: Any) -> ToolCall:
    entry = entry.get("function", entry) if isinstance(entry.get("function", entry), dict) else entry
    name = entry["name"]
    arguments = entry.get("arguments", entry.get("parameters"))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, **_STRICT) if arguments.strip() else {}
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no name, or arguments that are none")
    return ToolCall(name, arguments)


def _python_calls(text: str) -> Iterator[ToolCall]:
    """``[a(x=1), b(y="z")]``: names and literals only; nothing is run."""
    tree = ast.parse(text.strip(), mode="eval").body
    for node in tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]:
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            raise ValueError("no call with named arguments")
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        json.dumps(arguments, allow_nan=False)  # sets, bytes and the like are no JSON
        yield ToolCall(ast.unparse(node.func), arguments)


def _tagged(match: re.Match[str]) -> Iterator[ToolCall]:
    """``<function=name><parameter=key>value</parameter></function>``, or JSON."""
    body = match[1]
    if "<function=" not in body:
        yield from _json_calls(body)
        return
    for function in re.finditer(r"<function=([^>\s]+)>(.*?)</function>", body, re.DOTALL):
        arguments = {}
        for parameter in re.finditer(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", function[2], re.DOTALL):
            arguments[parameter[1]] = parameter_value(parameter[2])
        yield ToolCall(function[1], arguments)


def parameter_value(text: str) -> Any:
    """What a tagged parameter says: JSON, if it is a number, a list, an object, true, false or null; else the text."""
    try:
        value = json.loads(text, **_STRICT)
    except ValueError:
        return text
    return text if isinstance(value, str) else value


def _named(match: re.Match[str]) -> Iterator[ToolCall]:
    """A name and its JSON arguments, apart."""
    arguments = json.loads(match[2], **_STRICT)
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are none")
    yield ToolCall(match[1], arguments)


_BAR, _UNDER = "\uff5c", "\u2581"  # one family's marks are written with these in the place of | and _
_CALL = {
    name: f"<{_BAR}tool{_UNDER}{text}{_BAR}>"
    for name, text in {
        "all": f"calls{_UNDER}begin", "one": f"call{_UNDER}begin", "sep": "sep", "end": f"call{_UNDER}end",
        "over": f"calls{_UNDER}end",
    }.items()
}  # fmt: skip
# what calls begin with where they are not all that there is; others stand within them
CALL_MARKS = (
    "<tool_call>", "<|tool_call_start|>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>", _CALL["all"], _CALL["one"],
)  # fmt: skip
FENCE_MARKS = (_CALL["one"], _CALL["sep"], _CALL["end"], _CALL["over"])  # of one way to write calls
_FENCED = (
    f"(?:{_CALL['all']})?{_CALL['one']}(?:function{_CALL['sep']})?([\\w.-]+)(?:{_CALL['sep']}|\\n```json\\n)"
    f"(.*?)(?:\\n```)?{_CALL['end']}(?:{_CALL['over']})?"
)
_APART = r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\[ARGS\](\{.*?\})(?=\s*\[TOOL_CALLS\]|\s*\Z)"
_MARKED: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Iterator[ToolCall]]], ...] = (
    (re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL), _tagged),
    (
        re.compile(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|\Z)", re.DOTALL),
        lambda m: _json_calls(m[1]) if m[1].lstrip().startswith(("{", "[{")) else _python_calls(m[1]),
    ),
    (re.compile(_APART, re.DOTALL), _named),
    (re.compile(r"\[TOOL_CALLS\](.*)\Z", re.DOTALL), lambda m: _json_calls(m[1])),
    (re.compile(r"<\|tool_call\|>(.*)\Z", re.DOTALL), lambda m: _json_calls(m[1])),
    (re.compile(r"<\|python_tag\|>(.*)\Z", re.DOTALL), lambda m: _json_calls(m[1])),
    (re.compile(_FENCED, re.DOTALL), _named),
)
