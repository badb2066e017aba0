"""Which regular expressions of a tokenizer may take a text more ways than its length squared: those are refused.

The library's engine goes back and tries again. It gives a single match up after ten million tries, but a text has as
many matches as characters, and each may try nearly as often. So an expression is read before it meets a text. What the
tokenizers of real models do passes: classes that are repeated one after another, looks ahead, alternatives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["patterns_in", "slow_part"]

_LOOP = 64  # so many repetitions are as good as any number
_DEPTH = 50  # of groups in groups
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})")
_ESCAPE = re.compile(r"\\(?:[pP]\{[^}]*\}|x\{[^}]*\}|x[0-9a-fA-F]{1,2}|u[0-9a-fA-F]{4}|.)", re.DOTALL)
_GROUP = re.compile(r"\?(?:#|[a-zA-Z-]*:|[a-zA-Z-]+\)|=|!|<=|<!|>|<[A-Za-z_]\w*>)")
_EDGES = frozenset([r"\A", r"\Z", r"\z", r"\b", r"\B", r"\G", "^", "$"])  # places in a text
_AGAIN = frozenset("123456789kg")  # what has matched before, or an expression within itself
# Every character of ASCII, and some of each kind that classes tell apart.
_POOL = "".join(map(chr, range(128))) + "éßЖǅʰあ漢한\u0301\u093e٣²Ⅷ€±\u00b4©‿\u2013«»\u00a0\u2028\u2029\u200b\ue000😀"


@dataclass(frozen=True)
class _Item:
    """One part of a sequence: what matches one character so often, or a place (no characters at all).

    ``members`` are the characters of the pool that it takes, all of them where that is not known.
    """

    least: float
    most: float
    members: frozenset[str] = frozenset(_POOL)

    @property
    def loops(self) -> bool:
        return self.most - self.least >= _LOOP


class _Slow(ValueError):
    """Says which part of an expression is slow, and why."""


def slow_part(pattern: str) -> str:
    """Why an expression may take longer than the square of a text's length, such as ``(a+)+ repeats what repeats``;
    empty where it may not.

    Args:
        pattern: in the syntax of Oniguruma, which the library has compiled.
    """
    try:
        _Expression(pattern).check()
    except _Slow as error:
        return str(error)
    return ""


class _Expression:
    def __init__(self, pattern: str) -> None:
        self._pattern, self._at, self._depth = pattern, 0, 0

    def check(self) -> None:
        self._alternatives()
        if self._at < len(self._pattern):
            raise _Slow(f"it cannot be read at {self._pattern[self._at :][:20]!r}")

    def _alternatives(self) -> list[list[_Item]]:
        """Up to a closing bracket or the end."""
        found = [list[_Item]()]
        while self._at < len(self._pattern) and self._pattern[self._at] != ")":
            if self._pattern[self._at] == "|":
                self._at += 1
                found.append([])
            else:
                found[-1] += self._repeated()
        for items in found:
            _check_sequence(items, self._pattern)
        return found

    def _repeated(self) -> list[_Item]:
        """One part with its quantifiers."""
        start = self._at
        items = self._part()
        varies = len(items) != 1 or items[0].least != items[0].most
        while (match := _QUANTIFIER.match(self._pattern, self._at)) and (times := _times(match)) is not None:
            self._at = match.end()
            if self._pattern[self._at : self._at + 1] == "?":  # as few as will do
                self._at += 1
            if times[1] > 1 and varies and not _separated(items):
                raise _Slow(f"{self._pattern[start : self._at]} repeats what may itself be repeated or left out")
            varies = varies or times[0] != times[1]
            one = frozenset().union(*(item.members for item in items))
            if times == (0, 1):
                items = [_Item(0, item.most, item.members) for item in items]
            else:
                items = [_Item(times[0] * min(1, sum(i.least for i in items)), times[1], one)]
        return items

    def _part(self) -> list[_Item]:
        rest = self._pattern[self._at :]
        if rest[0] == "(":
            return self._group()
        text = self._class() if rest[0] == "[" else match[0] if (match := _ESCAPE.match(rest)) else rest[0]
        if text[:1] == "\\" and text[1:2] in _AGAIN:
            raise _Slow(f"{text} matches again what it has matched before")
        self._at += len(text)
        return [_Item(1, 0)] if text in _EDGES else [_Item(1, 1, _members(text))]

    def _class(self) -> str:
        """The text of a class, with the classes in it."""
        depth, at = 0, self._at
        while at < len(self._pattern):
            match = _ESCAPE.match(self._pattern, at)
            depth += {"[": 1, "]": -1}.get(self._pattern[at], 0)
            at = match.end() if match else at + 1
            if depth == 0:
                return self._pattern[self._at : at]
        raise _Slow(f"it cannot be read at {self._pattern[self._at :][:20]!r}")

    def _group(self) -> list[_Item]:
        self._at, self._depth = self._at + 1, self._depth + 1
        match = _GROUP.match(self._pattern, self._at)
        said = match[0] if match else ""
        if self._depth > _DEPTH or (not said and self._pattern[self._at : self._at + 1] == "?"):
            raise _Slow(f"it cannot be read at {self._pattern[self._at - 1 :][:20]!r}")
        self._at += len(said)
        if said.endswith(")"):  # options, for what follows
            self._depth -= 1
            return []
        if said == "?#":
            self._at = max(self._at, self._pattern.find(")", self._at))
        each = self._alternatives()
        if self._pattern[self._at : self._at + 1] != ")":
            raise _Slow("it cannot be read: a bracket is open")
        self._at, self._depth = self._at + 1, self._depth - 1
        if said in ("?=", "?!", "?<=", "?<!"):
            return [_Item(1, 0)]
        return each[0] if len(each) == 1 else _either(each)


def _either(each: Sequence[Sequence[_Item]]) -> list[_Item]:
    """Alternatives as one sequence in which each part may be left out."""
    least = min(sum(item.least for item in items) for items in each)
    apart = [_Item(0, item.most, item.members) for items in each for item in items]
    return [*apart, _Item(1, 0)] if least else apart


def _separated(items: Sequence[_Item]) -> bool:
    """Whether each repetition of a group begins with a character that nothing else in it takes."""
    first, *others = items or [_Item(0, 0)]
    return first.least == first.most == 1 and all(not first.members & other.members for other in others if other.most)


def _check_sequence(items: Sequence[_Item], pattern: str) -> None:
    """Refuse two repetitions that share a stretch of text where what follows may fail: each split would be tried."""
    loops = [place for place, item in enumerate(items) if item.loops]
    for before, place in enumerate(loops):
        for other in loops[before + 1 :]:
            between = items[place + 1 : other]
            split = any(item.least and item.most and not item.members & items[place].members for item in between)
            fails = any(item.least for item in items[other + 1 :])
            if not split and fails and items[place].members & items[other].members:
                raise _Slow(f"two repetitions in {pattern[:60]} share what they match")


def _times(match: re.Match[str]) -> tuple[float, float] | None:
    """The least and the most repetitions; None of a bracket that says none."""
    if match[0] in "*+?":
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[match[0]]
    low, comma, high = match.groups()
    if not low and not high:
        return None
    least = int(low or 0)
    return least, int(high) if high else math.inf if comma else least


@lru_cache(maxsize=1024)
def _members(atom: str) -> frozenset[str]:
    """The characters of the pool that a part takes."""
    from tokenizers import Regex, normalizers

    try:
        left = normalizers.Replace(Regex(atom), "").normalize_str(_POOL)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # what the library does not read by itself; its panics are no Exceptions
        return frozenset(_POOL)
    return frozenset(_POOL) - frozenset(left)


def patterns_in(part: object) -> Iterable[str]:
    """The regular expressions in a part of a tokenizer's file."""
    if isinstance(part, dict):
        if isinstance(found := part.get("Regex"), str):
            yield found
        for value in part.values():
            yield from patterns_in(value)
    elif isinstance(part, list):
        for value in part:
            yield from patterns_in(value)
