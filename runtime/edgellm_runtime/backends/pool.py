"""Buffers on a device, used again by the next state of their size, with all that was captured for their addresses."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.storage import Buffers

__all__ = ["BufferPool"]

_KEPT = 2  # sets of buffers that wait for a state
Make = Callable[[StateSpec, int, int], Any]


class BufferPool:
    """Hands out sets of buffers and takes them back when their state is gone.

    Args:
        make: one tensor of arbitrary content, for a spec, rows and slots.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._waiting: list[tuple[Any, Any]] = []

    def __len__(self) -> int:
        """How many sets wait."""
        return len(self._waiting)

    def clear(self) -> None:
        """Give the memory of waiting sets back."""
        self._waiting.clear()

    def get(self, specs: Sequence[StateSpec], batch: int, capacity: int) -> tuple[Buffers, bool]:
        """Buffers of arbitrary content, and whether they are new."""
        size = (tuple(specs), batch, capacity)
        at = next((i for i, (key, _) in enumerate(self._waiting) if key == size), None)
        fresh = at is None
        parts = self._new(specs, batch, capacity) if at is None else self._waiting.pop(at)[1]
        buffers = Buffers(*parts)
        weakref.finalize(buffers, _take_back, self._waiting, size, parts).atexit = False
        return buffers, fresh

    def _new(self, specs: Sequence[StateSpec], batch: int, capacity: int) -> tuple[dict[str, Any], ...]:
        tensors = {spec.name: self._make(spec, batch, capacity) for spec in specs}
        spares = {spec.name: self._make(spec, batch, capacity) for spec in specs if not spec.in_place}
        return tensors, spares, {}


def _take_back(waiting: list[tuple[Any, Any]], size: Any, parts: Any) -> None:
    waiting.append((size, parts))
    del waiting[:-_KEPT]
