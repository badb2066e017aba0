"""Files that only save time: what a library found out about this machine, for the next process of the same user.

A cache holds machine code or what decides about it, and goes to parsers that trust it. So it is believed only where
nobody but this user may write, if it is this user's, and if it is whole; and it never lies in a bundle, which may come
from anyone. Whatever is wrong with one, work goes on without it, and the reason is logged, once a process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from pathlib import Path

__all__ = ["VARIABLE", "CacheFile", "cache_directory"]

VARIABLE = "EDGELLM_CACHE_DIR"
MOST_BYTES, MOST_TOGETHER = 256 << 20, 1 << 30  # of one file, and of the directory, whose oldest files go first
_MAGIC = b"edgellm cache 1\n"
_SUFFIX, _UNFINISHED = ".cache", ".part"
_HEADER = len(_MAGIC) + hashlib.sha256().digest_size
_ABANDONED = 24 * 3600  # seconds; what a process that was killed has left
_REMEDY = f"work goes on without it; set {VARIABLE} to a directory of your own, or to nothing for no caches"
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def cache_directory() -> Path | None:
    """Where this user's caches lie, there or not: EDGELLM_CACHE_DIR, or edgellm in the user's cache directory.

    Returns:
        None where EDGELLM_CACHE_DIR is set to nothing: caches are off.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).absolute() if named else None
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path("~/.cache").expanduser()) / "edgellm"


class CacheFile:
    """One cache, there or not.

    Args:
        kind: what it holds, a plain word.
        key: all that it depends on; any change is another file.
    """

    def __init__(self, kind: str, *key: str) -> None:
        self._name = (
            f"{kind}-{hashlib.sha256(json.dumps([kind, *key], allow_nan=False).encode()).hexdigest()[:40]}{_SUFFIX}"
        )
        self.path: Path | None = None
        self.fault = ""  # why the cache was of no use, if so
        self._held = b""  # the digest of what the file is known to hold
        try:
            directory = cache_directory()
        except RuntimeError as error:  # a user without a home
            self._tell(f"caches are off ({error}); {_REMEDY}")
        else:
            self.path = None if directory is None else directory / self._name

    @property
    def on(self) -> bool:
        """Whether there may be a cache at all."""
        return self.path is not None

    def read(self) -> bytes | None:
        """What was written last, of this key; None if nothing was, or if it is not to be believed."""
        if self.path is None:
            return None
        try:
            found = _believed(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"no cache is read: {_reason(error, self.path)}; {_REMEDY}")
            return None
        data = found[_HEADER:]
        if found[:_HEADER] != _MAGIC + (digest := self._digest(data)):
            self.drop("is damaged")
            return None
        self._held = digest
        with contextlib.suppress(OSError):
            os.utime(self.path)  # so that the oldest is the one that nobody wants
        return data

    def write(self, data: bytes) -> None:
        """Put data in its place, whole or not at all; whichever of several processes is last counts."""
        digest = self._digest(data)
        if self.path is None or digest == self._held:
            return
        try:
            _put(self.path, _MAGIC + digest + data)
        except OSError as error:
            self._tell(f"no cache is written: {_reason(error, self.path)}; {_REMEDY}")
        else:
            self._held = digest

    def drop(self, why: str) -> None:
        """Take the file away, which turned out to be of no use; the next one is written in its place."""
        self._held = b""
        if self.path is not None:
            self._tell(f"{self.path} {why}; it is made anew")
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _digest(self, data: bytes) -> bytes:
        digest = hashlib.sha256(self._name.encode())  # no cache stands in for another
        digest.update(data)
        return digest.digest()

    def _tell(self, fault: str) -> None:
        self.fault = fault
        _log_once(fault)


@functools.cache
def _log_once(text: str) -> None:
    logging.getLogger(__package__).warning("%s", text)


def _reason(error: OSError, path: Path) -> str:
    """What is wrong, and where; the directory stands for all of its files, so that it is said once."""
    return f"{path.parent}: {error.strerror}" if error.strerror else str(error)


def _believed(path: Path) -> bytes:
    """A file that is this user's alone, in a directory that is; empty where it is larger than any cache.

    Raises:
        OSError: it is not there, or not to be believed; the text says why.
    """
    _check_directory(path.parent)
    descriptor = os.open(path, _FLAGS)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(f"{path} is no plain file")
        _check_owner(about, path)
        return file.read(about.st_size) if about.st_size <= MOST_BYTES else b""


def _put(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there.

    Raises:
        OSError: the directory cannot be made, is not this user's alone, or is full.
    """
    if len(content) > MOST_BYTES:
        raise OSError(f"{len(content)} bytes are too many for {path}")
    directory = path.parent
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)
    _check_directory(directory)
    descriptor, name = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=_UNFINISHED, dir=directory)  # mode 0600
    unfinished = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _make_room(directory)


def _check_directory(directory: Path) -> None:
    about = directory.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(f"{directory} is no directory")
    _check_owner(about, directory)


def _check_owner(about: os.stat_result, path: Path) -> None:
    """Refuse what another user owns or may write to."""
    if os.name != "posix":  # elsewhere a user's own directory is private, and modes say nothing
        return
    if about.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"other users may write to {path}")


def _make_room(directory: Path) -> None:
    files = []
    for file in directory.iterdir():
        with contextlib.suppress(OSError):  # another process may have taken it away
            about = file.lstat()
            if file.suffix == _UNFINISHED and about.st_mtime < time.time() - _ABANDONED:
                file.unlink()
            elif file.suffix == _SUFFIX:
                files.append((about.st_mtime, about.st_size, file))
    together = sum(size for _, size, _ in files)
    for _, size, file in sorted(files)[:-1]:
        if together <= MOST_TOGETHER:
            break
        together -= size
        with contextlib.suppress(OSError):
            file.unlink()
