"""How many CPU threads to use: the cores that this process may use, and no more.

Threads beyond them are not merely idle: ONNX Runtime's and OpenMP's wait for each other by spinning, so that 64 threads
on 2 cores are tens of times slower than one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath

from edgellm_runtime.arguments import check_integer

__all__ = ["VARIABLE", "available_cores", "chosen_threads", "limited_threads", "most_threads", "thread_count"]

VARIABLE = "EDGELLM_THREADS"
_LEAST_BOUND = 64  # so that what is asked for on a large machine can be tried on a small one
_DIGITS = 10
_LIMIT: ContextVar[int | None] = ContextVar("limit of threads", default=None)


def thread_count(asked: int | None = None) -> int:
    """How many threads to use.

    Args:
        asked: a number of threads; None for that of :func:`limited_threads`, else that of the variable
            ``EDGELLM_THREADS``, else the cores that this process may use.

    Raises:
        OptionError: a number below 1 or above :func:`most_threads`, or something else than a number.
    """
    if asked is not None:
        return check_integer("threads", asked, 1, most_threads())
    return chosen_threads() or available_cores()


def chosen_threads() -> int | None:
    """What :func:`limited_threads` or the variable ``EDGELLM_THREADS`` says; None if neither says anything.

    Raises:
        OptionError: as for :func:`thread_count`.
    """
    if (limit := _LIMIT.get()) is not None:
        return limit
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < _DIGITS else text
    return check_integer(VARIABLE, number, 1, most_threads())


def most_threads() -> int:
    """The most threads that may be asked for: the machine's cores, or 64."""
    return max(os.cpu_count() or 1, _LEAST_BOUND)


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Let ``threads`` be the default of all that runs in the block; None changes nothing.

    Raises:
        OptionError: as for :func:`thread_count`.
    """
    token = _LIMIT.set(_LIMIT.get() if threads is None else thread_count(threads))
    try:
        yield
    finally:
        _LIMIT.reset(token)


def available_cores(root: Path = Path("/")) -> int:
    """The smaller of the cores that this process may run on and the CPU quota of its control groups, at least 1.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Part of a core is not counted: a thread that spins uses up the quota, and then all of them are stopped.
    return max(1, min([affinity, *map(int, _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group around this process may use, where it is limited."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # no Linux, or hidden from us
        return
    for line in groups:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "/")
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount, top in _mounts(mounts, unified=not controllers):
            yield from _along(root / mount.lstrip("/"), _below(path, top), unified=not controllers)


def _mounts(lines: list[str], *, unified: bool) -> Iterator[tuple[str, str]]:
    """Where the hierarchy is mounted, and which of its groups is there."""
    for line in lines:
        before, _, after = line.partition(" - ")
        place, kind = before.split(" "), after.split(" ")
        if len(place) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" if unified else kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            yield place[4], place[3]


def _below(path: str, top: str) -> tuple[str, ...]:
    """The parts of a group's path under the group that is mounted; none where it lies elsewhere."""
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(top):
        return ()
    return group.relative_to(top).parts


def _along(mount: Path, parts: tuple[str, ...], *, unified: bool) -> Iterator[float]:
    """The quotas from the mounted group down to this process's: each of them holds."""
    for depth in range(len(parts) + 1):
        folder = mount.joinpath(*parts[:depth])
        try:
            if unified:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
                )  # fmt: skip
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):  # the topmost group has no such file
            continue
