"""A JSON object that comes in pieces: how much of a text is surely the beginning of one."""

from __future__ import annotations

import re

__all__ = ["JsonPrefix"]

_SPACE = re.compile(r"[ \t\n\r]*")
_INSIDE = re.compile(r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")


class JsonPrefix:
    """Reads a text in which an object begins, more of it from call to call.

    Args:
        at: where its first brace is.

    Attributes:
        at: how far it was read: all of that is the beginning of an object. A number is read once it has ended.
        ended: whether the object is whole; then ``at`` is behind its last brace.
        wrong: whether what comes at ``at`` cannot go on with it.
    """

    def __init__(self, at: int) -> None:
        self.at, self.ended, self.wrong = at, False, False
        self._open: list[str] = []  # braces and brackets to be closed
        self._next = "value"  # or "key", "first key", "colon", "more", "first value", "in key", "in value"

    def read(self, text: str) -> None:
        """Read on.

        Args:
            text: the whole of it so far; what was read before is not looked at again.
        """
        while not self.ended and not self.wrong and self.at < len(text) and self._one(text):
            pass

    def _one(self, text: str) -> bool:
        """Read one more token; False where more text is needed for it."""
        if self._next in ("in key", "in value"):
            return self._string(text)
        space = _SPACE.match(text, self.at)
        assert space is not None
        self.at = space.end()
        if self.at == len(text):
            return False
        sign = text[self.at]
        if sign in "}]" and self._next in ("more", "first key" if sign == "}" else "first value"):
            return self._close(sign)
        if self._next in ("key", "first key"):
            return self._goes_on("in key", right=sign == '"')
        if self._next == "colon":
            return self._goes_on("value", right=sign == ":")
        if self._next == "more":
            return self._goes_on("key" if self._open[-1] == "}" else "value", right=sign == ",")
        return self._value(text, sign)

    def _value(self, text: str, sign: str) -> bool:
        if sign == '"':
            return self._goes_on("in value")
        if sign in "{[":
            self._open.append("}" if sign == "{" else "]")
            return self._goes_on("first key" if sign == "{" else "first value")
        word = _WORD.match(text, self.at)
        if word is not None and word.end() == len(text):
            return False
        self.wrong = word is None or not self._open or _WHOLE.fullmatch(word[0]) is None
        if word is not None and not self.wrong:
            self.at, self._next = word.end(), "more"
        return not self.wrong

    def _string(self, text: str) -> bool:
        inside = _INSIDE.match(text, self.at)
        assert inside is not None
        self.at = inside.end()
        if self.at == len(text) or _ESCAPE.match(text, self.at):
            return False
        return self._goes_on("colon" if self._next == "in key" else "more", right=text[self.at] == '"')

    def _close(self, sign: str) -> bool:
        if sign != self._open[-1]:
            self.wrong = True
            return False
        self._open.pop()
        self.at, self._next, self.ended = self.at + 1, "more", not self._open
        return True

    def _goes_on(self, then: str, *, right: bool = True) -> bool:
        self.wrong = not right
        if right:
            self.at, self._next = self.at + 1, then
        return right
