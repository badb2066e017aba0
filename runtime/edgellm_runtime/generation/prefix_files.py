"""Blocks of a prefix cache in a directory of the user's own, for other processes and the next start.

They are believed like any file of a stranger's: sizes and shapes are checked, and what is wrong is as if it were not
there. But numbers that someone put there would be taken for the model's, so nobody else may write to the directory.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.errors import StateError
from edgellm_runtime.generation.trail import BLOCK
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.array_file import read_arrays
from edgellm_runtime.state.blocks import appended
from edgellm_runtime.state.snapshot import Snapshot, packed, unpacked
from edgellm_runtime.state.storage import host_dtype

__all__ = ["BlockFiles"]

_SUFFIX, _UNFINISHED = ".block", ".part"


class BlockFiles:
    """The directory.

    Args:
        directory: made if it is not there.
        max_bytes: of all its files; the ones that were asked for the longest ago go first.

    Raises:
        StateError: it cannot be made, or other users may write to it.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes, self._lock = directory, max_bytes, threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = directory.stat()
            self._together = sum(size for _, size, _ in self._listed())
        except OSError as error:
            raise StateError(
                f"{directory}: no directory for a prefix cache ({error.strerror}); name another place"
            ) from error
        foreign = os.name == "posix" and (
            about.st_uid != os.geteuid() or bool(about.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        )
        if foreign:
            raise StateError(f"{directory}: other users may write to it; name a directory of your own")

    def read(
        self, key: bytes, specs: Sequence[StateSpec], length: int
    ) -> tuple[dict[str, NDArray[Any]], Snapshot | None] | None:
        """A block's slots and snapshot.

        Args:
            key: the block's.
            specs: of the model's states.
            length: tokens of the text up to the block's end.

        Returns:
            None if it is not there, or not what it should be.
        """
        path = self._path(key)
        try:
            data = read_arrays(path).arrays
            slots = {spec.name: data[spec.name].copy() for spec in appended(specs)}
            for spec in appended(specs):
                if slots[spec.name].shape != spec.resolve(1, BLOCK) or slots[spec.name].dtype != host_dtype(spec.dtype):
                    raise ValueError(f"{spec.name} is {slots[spec.name].dtype} {slots[spec.name].shape}")
            snapshots = unpacked(data, specs, length)
            if any(snapshot.length != length for snapshot in snapshots):
                raise ValueError("a snapshot of another place")
        except FileNotFoundError:
            return None
        except Exception as error:  # NumPy and the reader of archives have many kinds
            _tell(f"{path.parent}: {path.name} is damaged ({error}); it is made anew")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # so that the oldest is the one that nobody wants
        return slots, snapshots[0] if snapshots else None

    def write(self, key: bytes, slots: Mapping[str, NDArray[Any]], snapshot: Snapshot | None) -> None:
        """Put a block there, whole or not at all; a full disk is logged, and work goes on without it."""
        path, arrays = self._path(key), {**slots, **packed([] if snapshot is None else [snapshot])}
        try:
            descriptor, name = tempfile.mkstemp(prefix=path.stem[:16], suffix=_UNFINISHED, dir=self._directory)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    np.savez(file, allow_pickle=False, **arrays)
                    size = file.tell()
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            _tell(f"{self._directory}: no block is written ({error.strerror}); work goes on without")
            return
        with self._lock:
            self._together += size
            if self._together > self._max_bytes:
                self._make_room()

    def _make_room(self) -> None:
        files = self._listed()
        self._together = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if self._together <= self._max_bytes:
                break
            with contextlib.suppress(OSError):  # another process may have taken it away
                file.unlink()
            self._together -= size

    def _listed(self) -> list[tuple[float, int, Path]]:
        """Time, size and path of each block."""
        found = []
        for file in self._directory.iterdir():
            with contextlib.suppress(OSError):
                about = file.lstat()
                if file.suffix == _SUFFIX and stat.S_ISREG(about.st_mode):
                    found.append((about.st_mtime, about.st_size, file))
        return found

    def _path(self, key: bytes) -> Path:
        return self._directory / f"{key.hex()}{_SUFFIX}"


@functools.cache
def _tell(text: str) -> None:
    logging.getLogger(__package__).warning("%s", text)
