"""What this machine has, for whoever asks before a model is loaded: memory, pages of a file in memory, free disk."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import shutil
from pathlib import Path

__all__ = ["cached_share", "free_disk", "free_memory", "processor_flags"]

_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
_ENDLESS = 1 << 60


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: the smaller of the system's and its control group's; None if unknown.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    found = []
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        return None
    for most, used in _LIMITS:
        try:
            limit = int((root / "sys/fs/cgroup" / most).read_text())
            if limit < _ENDLESS:
                found.append(max(0, limit - int((root / "sys/fs/cgroup" / used).read_text())))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(found)


def free_disk(path: Path) -> int | None:
    """Bytes free where a path is, or would be; None if unknown."""
    there = next((p for p in (path, *path.parents) if p.exists()), None)
    try:
        return None if there is None else shutil.disk_usage(there).free
    except OSError:
        return None


def processor_flags(root: Path = Path("/")) -> frozenset[str] | None:
    """Features of the first core, as Linux names them; None if unknown."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return None


def cached_share(path: Path) -> float | None:
    """The part of a file that is in memory already; None where the system does not say."""
    try:
        size = path.stat().st_size
        if not size or os.name != "posix":
            return None
        pages = (ctypes.c_ubyte * math.ceil(size / mmap.PAGESIZE))()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            try:
                address = ctypes.c_void_p(ctypes.addressof(first))
                failed = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), pages)
            finally:
                del first  # or the map could not be closed
    except (OSError, AttributeError, ValueError):
        return None
    return None if failed else sum(page & 1 for page in pages) / len(pages)
