"""TensorRT for RTX finishes an engine for the GPU that is there when it is loaded and first run; that work, kept.

Its engines hold no machine code for one GPU but what it is made of. The kernels that were made can be taken from the
library and given to it again in the next process. TensorRT's engines are finished when they are built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgellm_runtime.backends.caches import CacheFile

__all__ = ["RTX_API", "KernelCache"]

# As API in tensorrt_library.py, of TensorRT for RTX alone.
RTX_API: Mapping[str, Sequence[str]] = {
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": ("create_runtime_cache", "set_runtime_cache"),
    "IRuntimeCache": ("deserialize", "serialize"),
}


class KernelCache:
    """What was made of one engine for this GPU.

    Args:
        engine: the library's, just loaded.
        file: where it lies between processes.
    """

    def __init__(self, engine: Any, file: CacheFile) -> None:
        self._file, self._engine = file, engine  # which must outlive what it made
        self._cache: Any = None
        self.config: Any = None  # what a context is made with; None: as if there were no cache
        if not file.on:
            return
        try:
            config = engine.create_runtime_config()
            cache = config.create_runtime_cache()
            data = file.read()
            if data is not None and not cache.deserialize(data):
                file.drop("is refused by the library")
            attached = config.set_runtime_cache(cache)
        except Exception as error:  # an engine runs without, so nothing of a cache may keep it from that
            file.drop(f"cannot be used ({error})")
            return
        if attached:
            self.config, self._cache = config, cache

    @property
    def fault(self) -> str:
        """Why the cache was of no use, if so."""
        return self._file.fault

    def save(self) -> None:
        """Write what the library has made until now, if that is more than before."""
        if self._cache is None:
            return
        try:
            made = self._cache.serialize()
            data = None if made is None else bytes(memoryview(made))
        except Exception as error:
            self._file.drop(f"cannot be written ({error})")
            return
        if data:
            self._file.write(data)
