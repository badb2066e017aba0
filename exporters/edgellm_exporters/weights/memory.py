"""What memory this process has, and giving what is free back, so that what comes next does not add to what was."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

__all__ = ["give_back", "memory_now_and_at_most", "trim"]

_STATUS = Path("/proc/self/status")


def memory_now_and_at_most() -> tuple[int, int]:
    """Bytes in memory now, and the most there have been since the program began; none where the system is not Linux."""
    if not _STATUS.is_file():
        return 0, 0
    said = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    now, most = (int(said.get(name, "0 kB").split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, most


def give_back() -> None:
    """Drop unreachable objects and return the pages that nothing uses; where the C library cannot, only the former."""
    gc.collect()
    trim()


def trim() -> None:
    """Return the pages that nothing uses, where the C library can: small blocks between them keep large ones alive."""
    try:
        give = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    give(0)
