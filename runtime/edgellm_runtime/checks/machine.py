"""What this machine has and how busy it is: for whoever asks before a model is loaded, or measures one."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import platform
import shutil
from pathlib import Path

__all__ = [
    "cached_share", "energy", "free_disk", "free_memory", "governor", "other_load", "processor_flags",
    "processor_name", "throttled",
]  # fmt: skip

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


def processor_name(root: Path = Path("/")) -> str:
    """What the processor calls itself."""
    try:
        for line in (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def throttled(root: Path = Path("/")) -> int | None:
    """How often the control group's quota has stopped this process; None if there is no quota."""
    for name in ("cpu.stat", "cpu/cpu.stat"):
        try:
            text = (root / "sys/fs/cgroup" / name).read_text()
        except OSError:
            continue
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == "nr_throttled":
                return int(value)
    return None


def energy(root: Path = Path("/")) -> float | None:
    """Joules that the processor's packages have taken since some moment; None where the system does not say."""
    total = 0
    packages = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]"))
    try:
        for package in packages:
            total += int((package / "energy_uj").read_text())
    except (OSError, ValueError):
        return None
    return total / 1e6 if packages else None


def other_load(root: Path = Path("/")) -> float | None:
    """Processes that wanted to run in the last minute, on average; None if unknown."""
    try:
        return float((root / "proc/loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def governor(root: Path = Path("/")) -> str | None:
    """How the first core's clock is governed; None if unknown."""
    try:
        return (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip() or None
    except OSError:
        return None
