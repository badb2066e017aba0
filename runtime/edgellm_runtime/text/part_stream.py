"""An answer taken apart while it comes: its thinking, its content, and its calls of tools, in pieces.

What goes out piece by piece is what :func:`~edgellm_runtime.text.answer_parts.answer_parts` finds in the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from edgellm_runtime.text.answer_parts import CALL_MARKS, THINKING_MARKS, AnswerParts, ToolCall, answer_parts
from edgellm_runtime.text.call_stream import CallStream, Piece

__all__ = ["PartStream", "Piece"]

_OPEN, _CLOSE = THINKING_MARKS


class PartStream:
    """Sorts an answer's text. What may be the beginning of a mark or of a call is held back, and so is space before it.

    Args:
        tools: names that may be called; none: no call is looked for.
        thinking: whether the prompt ended within the thinking.
        single: whether only the first call counts.
        certain: whether an answer that begins like a call without a mark is one.
    """

    def __init__(
        self, *, tools: Collection[str] = (), thinking: bool = False, single: bool = False, certain: bool = False
    ) -> None:
        self._tools, self._thinking = list(tools), thinking
        self._texts: list[str] = []
        self._place: Literal["start", "reasoning", "content", "call"] = "start"
        self._strips = False  # whether the content's outer space is left out, as it is beside thinking
        self._held = ""
        self._sent = {"reasoning": list[str](), "content": list[str]()}
        self._calls = CallStream(tools, single=single, certain=certain, calls=self._made)

    def push(self, text: str) -> list[Piece]:
        """Take text; what of it is free to go."""
        self._texts.append(text)
        if self._place == "call":  # nothing else goes out before the end
            return self._calls.push(text)
        self._held += text
        return list(self._sorted())

    @property
    def unfinished(self) -> bool:
        """Whether a call has begun to go out that the answer did not make in the end."""
        return self._calls.unfinished

    def finish(self) -> tuple[list[Piece], AnswerParts]:
        """What had been held back, calls last unless one has begun to go out, and the whole answer's parts."""
        parts, found, begun = self._parts(), list[Piece](), self._calls.begun
        kinds: tuple[tuple[Literal["reasoning", "content"], str], ...] = (
            ("reasoning", parts.reasoning or ""), ("content", parts.content)
        )  # fmt: skip
        for kind, whole in kinds:
            sent = "".join(self._sent[kind])
            rest = whole.removeprefix(sent.lstrip() if parts.tool_calls else sent)
            found += [Piece(kind, rest)] if rest else []
        calls = self._calls.finish(parts.tool_calls)
        return [*calls, *found] if begun else [*found, *calls], parts

    def _parts(self) -> AnswerParts:
        return answer_parts("".join(self._texts), tools=self._tools, thinking=self._thinking)

    def _made(self) -> Sequence[ToolCall]:
        return self._parts().tool_calls

    def _sorted(self) -> Iterator[Piece]:
        if self._place == "start":
            begun = self._held.lstrip()
            if begun.startswith(_OPEN):
                self._place, self._held = "reasoning", begun[len(_OPEN) :]
            elif _OPEN.startswith(begun):
                return
            else:
                self._place = "reasoning" if self._thinking else "content"
        if self._place == "reasoning":
            thought, closed, rest = self._held.partition(_CLOSE)
            yield from self._given("reasoning", thought, 0 if closed else _begun(thought, (_CLOSE,)), strips=True)
            if not closed:
                return
            self._place, self._held, self._strips = "content", rest, True
        yield from self._content()

    def _content(self) -> Iterator[Piece]:
        text, keep = self._held, 0
        if self._tools:
            nothing_yet = not self._sent["content"]
            at = min((i for i in map(text.find, CALL_MARKS) if i >= 0), default=len(text))
            if nothing_yet and text.lstrip()[:1] in ("{", "["):  # perhaps nothing but calls, without a mark
                at = 0
            if at < len(text):
                self._place = "call"
            keep = len(text) - at if at < len(text) else _begun(text, CALL_MARKS)
        yield from self._given("content", text, keep, strips=self._strips)
        if self._place == "call":
            yield from self._calls.push(text[len(text) - keep :])

    def _given(self, kind: Literal["reasoning", "content"], text: str, keep: int, *, strips: bool) -> Iterator[Piece]:
        """Give a text but for its last characters, and the space before those where that may not be part of it."""
        free = text[: len(text) - keep]
        if strips or self._tools:
            free = free.rstrip()
        self._held = text[len(free) :]
        if strips and not self._sent[kind]:
            free = free.lstrip()
        if free:
            self._sent[kind].append(free)
            yield Piece(kind, free)


def _begun(text: str, marks: Collection[str]) -> int:
    """How many of a text's last characters may be the beginning of a mark."""
    most = min(len(text), max(map(len, marks)) - 1)
    return next((n for n in range(most, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
