"""A file's pages as memory: read without being copied, and laid under larger memory that is written to.

What is written goes to copies of single pages; the file never changes. Only a file that nobody else may write to is
used so, for what another process takes off its end would end this one.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import stat
import sys
import threading
import weakref
from collections import deque
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["PAGE", "FilePages"]

Memory = NDArray[np.uint8]
_FIXED = sys.platform in ("linux", "darwin") and sys.maxsize > 1 << 32  # where a place for a file's pages can be named
PAGE = mmap.ALLOCATIONGRANULARITY if _FIXED else 4096
_MAP_FIXED = 0x10
_MOST = 16_384  # pieces of files that lie under memory at once; Linux gives a process 65,530 areas by default


class FilePages:
    """An open file as memory.

    Args:
        file: open for reading and not empty.

    Raises:
        OSError: it cannot be mapped.
    """

    _held, _lock = 0, threading.Lock()
    _given: ClassVar[deque[int]] = deque()  # how many were given back; collected under the lock, put there at any time

    def __init__(self, file: IO[bytes]) -> None:
        self.bytes: Memory = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    @classmethod
    def of(cls, file: IO[bytes]) -> FilePages | None:
        """The file's pages; None where they are not to be relied on, or cannot be had."""
        about = os.fstat(file.fileno())
        ours = os.name == "posix" and about.st_uid in (os.geteuid(), 0)
        if not ours or not stat.S_ISREG(about.st_mode) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        try:
            return cls(file)
        except (OSError, ValueError):  # a file system without maps, or an empty file
            return None

    def under(self, start: int, size: int, count: int, stride: int) -> Memory | None:
        """Memory of pieces that begin with pieces of the file, and have zeros after them.

        Args:
            start: in the file, of the first piece; a multiple of :data:`PAGE`, like ``size`` and ``stride``.
            size: bytes of each piece in the file, one behind the other.
            count: pieces.
            stride: bytes of each piece in memory.

        Returns:
            ``count * stride`` bytes; None where the system gives no such memory.
        """
        assert not (start % PAGE or size % PAGE or stride % PAGE or size > stride), "pieces of whole pages"
        with self._lock:
            while self._given:
                FilePages._held -= self._given.popleft()
            if not _FIXED or self._held + count > _MOST:
                return None
            try:
                area = mmap.mmap(-1, count * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, OverflowError):
                return None
            FilePages._held += count
            weakref.finalize(area, self._given.append, count)
        memory: Memory = np.frombuffer(area, np.uint8)
        place = _mmap()
        for piece in range(count):
            address = memory.ctypes.data + piece * stride
            found = place(
                address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, self._descriptor,
                start + piece * size,
            )  # fmt: skip
            if found != address:
                return None
        return memory


@functools.cache
def _mmap() -> Any:
    """The system's own, for Python's lets nobody say where."""
    place = ctypes.CDLL(None, use_errno=True).mmap
    place.restype = ctypes.c_void_p
    number, size = ctypes.c_int, ctypes.c_size_t
    place.argtypes = (ctypes.c_void_p, size, number, number, number, ctypes.c_int64)
    return place
