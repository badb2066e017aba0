"""Requests to end that wait while PyTorch traces: thrown into its C++, they can end the process with nothing undone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["held_signals"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_PATIENCE = 3  # who asks as often is not to wait any longer


@contextmanager
def held_signals() -> Iterator[None]:
    """Deliver what asks the process to end after the block, and the third of them at once.

    Only handlers in Python are held: what is ignored stays so, and what ends the process by itself still does. Python
    delivers signals to the main thread alone, so in any other thread this does nothing.
    """
    before, asked = dict[int, Callable[[int, FrameType | None], Any]](), list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) >= _PATIENCE:
            before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name)):
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked and len(asked) < _PATIENCE:
            signal.raise_signal(asked[-1])
