"""Texts that end an answer, found as it comes, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes text on, except what may still become a stop string.

    Args:
        stops: texts to stop at.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is free to go, and whether a stop string has come; after that, nothing more may be pushed."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = next((n for n in range(min(len(text), self._longest - 1), 0, -1) if self._opens(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back; the answer ends, so it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _opens(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)
