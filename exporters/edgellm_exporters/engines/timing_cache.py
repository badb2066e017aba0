"""TensorRT's timing cache: which kernels were fastest for the layers that were built before, on the same kind of GPU.

TensorRT for RTX times nothing when it builds. Its names for such a cache do nothing, and ask for a GPU; they are left
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgellm_runtime.backends.caches import CacheFile

__all__ = ["TIMING_API", "TimingCache"]

# As API in tensorrt.py, of TensorRT alone.
TIMING_API: Mapping[str, Sequence[str]] = {
    "IBuilderConfig": ("create_timing_cache", "get_timing_cache", "set_timing_cache"),
    "ITimingCache": ("serialize",),
}


class TimingCache:
    """The cache of one build.

    Args:
        library: ``tensorrt`` or ``tensorrt_rtx``.
        version: the library's whole version.
        capabilities: what is built for.
        config: the library's, of this build.
    """

    def __init__(self, library: str, version: str, capabilities: Sequence[str], config: Any) -> None:
        self._config = config
        self._file = CacheFile("timing", library, version, *capabilities)
        self.on = library == "tensorrt" and self._file.on
        if not self.on:
            return
        data = self._file.read()
        if data is not None and not self._attach(data):
            self._file.drop("is of another GPU or refused by the library")
            data = None
        if data is None:
            self.on = self._attach(b"")

    def _attach(self, data: bytes) -> bool:
        try:
            cache = self._config.create_timing_cache(data)
            return cache is not None and bool(self._config.set_timing_cache(cache, False))
        except Exception:  # the library raises many kinds of its own, and no build fails for want of a cache
            return False

    def keep(self) -> None:
        """Write what the build found out, once it is over."""
        if not self.on:
            return
        try:
            cache = self._config.get_timing_cache()
            found = None if cache is None else cache.serialize()
        except Exception:
            return
        if found is not None:
            self._file.write(bytes(memoryview(found)))
