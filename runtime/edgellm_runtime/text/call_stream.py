"""Calls of tools while they are written: the name of each, and its arguments as JSON in pieces.

A call begins to go out once its name is one that may be called and an object of arguments has begun; of that goes out
what is surely the beginning of JSON. Its last brace is kept until the call is known to be whole: an object that a
reader can parse is always a call. What is written in a way that tells less on its way is left for the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from edgellm_runtime.text.answer_parts import CALL_MARKS, FENCE_MARKS, ToolCall, parameter_value
from edgellm_runtime.text.json_prefix import JsonPrefix

__all__ = ["CallStream", "Piece"]

_SEP = re.escape(FENCE_MARKS[1])
_ENDS = ("</tool_call>", "<|tool_call_end|>", FENCE_MARKS[2], "[TOOL_CALLS]")  # where a call before is whole
_MARKS = "|".join(map(re.escape, (*CALL_MARKS, *_ENDS, FENCE_MARKS[3], "</function>", "```")))
_BETWEEN = re.compile(rf"(?:{_MARKS}|[\s,;\[\]}}])*")
_KEY = r'"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*'
_OBJECT = re.compile(
    rf'\{{\s*(?:{_KEY})*(?:"function"\s*:\s*\{{\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_APART = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\[ARGS\](?=\{)")
_FENCED = re.compile(rf"(?:function{_SEP})?([\w.-]+)(?:{_SEP}|\n```json\n)(?=\{{)")
_TAGGED = re.compile(r"<function=([^>\s]+)>")
_HEADS = (  # how a call begins, and behind which marks
    (_OBJECT, CALL_MARKS), (_APART, ("[TOOL_CALLS]",)), (_FENCED, FENCE_MARKS[:1]), (_TAGGED, ("<tool_call>",)),
)  # fmt: skip
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_LAST = re.compile(r"\s*</function>")
_LONGEST_HEAD = 2048  # characters until the arguments begin


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of one part.

    Args:
        kind: which part; ``call`` begins one, and its arguments are JSON.
        text: never empty; of ``call`` the name.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str


class CallStream:
    """Reads a text that begins where calls do.

    Args:
        tools: names that may be called.
        single: whether only the first call counts.
        certain: whether an object without a mark before it is a call, as a grammar may hold it to be.
        calls: tells which calls the text so far makes, for those that may be whole.
    """

    def __init__(
        self, tools: Collection[str], *, single: bool, certain: bool, calls: Callable[[], Sequence[ToolCall]]
    ) -> None:
        self._tools, self._single, self._certain, self._calls = frozenset(tools), single, certain, calls
        self._text, self._at, self._stopped = "", 0, False
        self._object: JsonPrefix | None = None  # arguments that come as JSON
        self._sent = 0  # how far they have gone
        self._parameters: int | None = None  # of a call with tags, how many were read
        self._whole: str | None = None  # the arguments of a call that is whole but for the last brace
        self._arguments: list[str] = []
        self.made = 0  # calls that went out whole

    @property
    def begun(self) -> bool:
        """Whether something has gone out."""
        return self.made > 0 or self.unfinished

    @property
    def unfinished(self) -> bool:
        """Whether a call has begun to go out and is not whole."""
        return bool(self._arguments)

    def push(self, text: str) -> list[Piece]:
        """Take text; what of it may go."""
        self._text += text
        return list(self._pieces())

    def finish(self, calls: Sequence[ToolCall]) -> list[Piece]:
        """What was kept, at the text's end.

        Args:
            calls: that the whole text makes.
        """
        found = list(self._confirmed(calls))
        for call in calls[self.made : 1 if self._single else None]:
            found += [Piece("call", call.name), Piece("arguments", call.json_arguments)]
        return found

    def _pieces(self) -> Iterator[Piece]:
        while not self._stopped:
            if self._whole is not None:
                if not any(end in self._text[self._at :] for end in _ENDS):
                    return
                yield from self._confirmed(self._calls())
                if self.unfinished:
                    self._stopped = True
                continue
            if not self._arguments:
                begun = self._head()
                if begun is None:
                    return
                yield begun
            before = self._at, self._sent
            yield from self._json() if self._object is not None else self._tags()
            if self._whole is None and (self._at, self._sent) == before:
                return

    def _head(self) -> Piece | None:
        """The beginning of the next call, as far as its name and the opening of its arguments."""
        between = _BETWEEN.match(self._text, self._at)
        assert between is not None
        place = between.end()
        heads = ((pattern.match(self._text, place), marks) for pattern, marks in _HEADS)
        found = next((head for head, marks in heads if head and self._behind(marks, place)), None)
        if found is None or found[1] not in self._tools:
            self._stopped = found is not None or len(self._text) - place > _LONGEST_HEAD
            return None
        self._at = self._sent = found.end()
        self._object, self._parameters = (None, 0) if found.re is _TAGGED else (JsonPrefix(self._at), None)
        self._arguments = [found[1]]
        return Piece("call", found[1])

    def _behind(self, marks: Collection[str], place: int) -> bool:
        return self._certain or any(self._text.find(mark, 0, place) >= 0 for mark in marks)

    def _json(self) -> Iterator[Piece]:
        read = self._object
        assert read is not None
        read.read(self._text)
        free = self._text[self._sent : read.at - read.ended]
        self._sent += len(free)
        if free:
            self._arguments.append(free)
            yield Piece("arguments", free)
        if read.ended:
            self._at, self._whole = read.at, "}"
        self._stopped = read.wrong

    def _tags(self) -> Iterator[Piece]:
        """Parameters between tags, as JSON one after another."""
        assert self._parameters is not None
        if found := _PARAMETER.match(self._text, self._at):
            name, value = (
                json.dumps(x, ensure_ascii=False, allow_nan=False) for x in (found[1], parameter_value(found[2]))
            )
            text = f"{', ' if self._parameters else '{'}{name}: {value}"
            self._at, self._parameters = found.end(), self._parameters + 1
            self._arguments.append(text)
            yield Piece("arguments", text)
        elif found := _LAST.match(self._text, self._at):
            self._at, self._whole = found.end(), "}" if self._parameters else "{}"

    def _confirmed(self, calls: Sequence[ToolCall]) -> Iterator[Piece]:
        """The rest of a call that is whole, if it is one."""
        if self._whole is None or len(calls) <= self.made:
            return
        name, text = self._arguments[0], "".join([*self._arguments[1:], self._whole])
        call = calls[self.made]
        try:
            if call.name != name or json.loads(text) != call.arguments:
                return
        except (ValueError, RecursionError):  # numbers of thousands of digits, and objects as deep
            return
        yield Piece("arguments", self._whole)
        self._whole, self._arguments, self._object, self.made = None, [], None, self.made + 1
        self._stopped = self._stopped or self._single
