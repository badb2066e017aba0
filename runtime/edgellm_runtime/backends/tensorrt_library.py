"""TensorRT and TensorRT for RTX behind one set of names: which is installed, its engines, and what it says went wrong.

Both libraries share nearly all names. Enumerations were renumbered between versions, so names are compared, never
numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_runtime.backends.caches import CacheFile
from edgellm_runtime.backends.faults import is_out_of_memory, load_fault
from edgellm_runtime.backends.tensorrt_kernels import KernelCache
from edgellm_runtime.errors import BackendError

__all__ = ["API", "DTYPES", "Engine", "Library", "find_library", "imported"]

_NAMES = ("tensorrt", "tensorrt_rtx")
DTYPES: Mapping[str, str] = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64", "INT8": "int8",
    "UINT8": "uint8", "BOOL": "bool",
}  # fmt: skip
# Every name of the libraries that the runtime uses, for a test that looks for them in each.
API: Mapping[str, Sequence[str]] = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": (
        "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape",
        "get_tensor_profile_shape", "create_execution_context",
    ),
    "IExecutionContext": ("set_input_shape", "set_tensor_address", "execute_async_v3", "profiler"),
    "IProfiler": ("report_layer_time",),
    "ILogger": ("log",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "DataType": tuple(DTYPES),
}  # fmt: skip


def find_library(wanted: Sequence[str] = ()) -> Library:
    """The installed library; of both, the one that engines are there for.

    Args:
        wanted: libraries that there are engines for, the best first.

    Raises:
        BackendError: none is installed.
    """
    installed: dict[str, Any] = {}
    for name in _NAMES:
        try:
            installed[name] = imported(name)
        except (ImportError, OSError):  # the latter: its packages are there, its libraries are not
            continue
    if not installed:
        raise BackendError(
            "TensorRT is not installed; pip install tensorrt-rtx cuda-bindings for TensorRT for RTX, or on Jetson and "
            "data-centre GPUs install NVIDIA's tensorrt, and cuda-bindings beside it"
        )
    name = next((name for name in wanted if name in installed), next(iter(installed)))
    return Library(name, installed[name])


def imported(name: str) -> Any:
    """One of the libraries.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module(name)


class Library:
    """One of the two.

    Args:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        module: it.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module, self.version = name, module, str(module.__version__)
        self.said: list[str] = []  # errors, the last one last
        self._logger = _recorder(module, self.said)
        self._runtime: Any = None

    def load(self, file: Path, cache: CacheFile | None = None) -> Engine:
        """An engine from its file, whose fingerprint was compared before.

        Args:
            file: the engine.
            cache: of what TensorRT for RTX makes of it on this GPU; TensorRT's has made all when it is built.

        Raises:
            BackendError: the library refuses it, or the GPU has no memory for it.
        """
        kernels: KernelCache | None = None
        try:
            self._runtime = self._runtime or self.module.Runtime(self._logger)
            found = self._runtime.deserialize_cuda_engine(file.read_bytes())
            if found is not None and cache is not None and self.name == "tensorrt_rtx":
                kernels = KernelCache(found, cache)
            with_cache = () if kernels is None or kernels.config is None else (kernels.config,)
            context = found.create_execution_context(*with_cache) if found is not None else None
        except Exception as error:
            raise load_fault(f"{self.name} {self.version}", file, error) from error
        if context is None:
            raise load_fault(f"{self.name} {self.version}", file, RuntimeError(self.last_words()))
        return Engine(self, file, found, context, kernels)

    def last_words(self) -> str:
        """The last error that it logged; it reports failures by giving nothing back."""
        return self.said[-1] if self.said else "it gave no reason"


def _recorder(module: Any, said: list[str]) -> Any:
    class Recorder(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if getattr(severity, "name", "") in ("ERROR", "INTERNAL_ERROR"):
                said.append(message)
                del said[:-8]

    return Recorder()


def _timer(module: Any, tell: Callable[[str, float], None]) -> Any:
    class Timer(module.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            tell(layer_name, ms)

    return Timer()


class Engine:
    """One engine with one context of its own.

    Args:
        library: that loaded it.
        file: it was loaded from.
        engine: the library's.
        context: the library's.
        kernels: what the library makes of it while it runs; None: nothing that could be kept.
    """

    def __init__(
        self, library: Library, file: Path, engine: Any, context: Any, kernels: KernelCache | None = None
    ) -> None:
        self.file = file
        self._library, self._engine, self._context, self.kernels = library, engine, context, kernels
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = frozenset(n for n in names if engine.get_tensor_mode(n).name == "INPUT")
        self.outputs = frozenset(names) - self.inputs
        self.dtypes = {n: DTYPES.get(engine.get_tensor_dtype(n).name, "?") for n in names}
        self.shapes = {n: tuple(int(d) for d in engine.get_tensor_shape(n)) for n in names}  # -1: free
        self.profile = {
            n: tuple(tuple(int(d) for d in shape) for shape in engine.get_tensor_profile_shape(n, 0))
            for n in self.inputs
        }
        self._set: dict[str, tuple[int, ...]] = {}

    def fits(self, name: str, shape: Sequence[int]) -> bool:
        """Whether an input of that shape is within the profile."""
        least, _, most = self.profile[name]
        return len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))

    def bind(self, name: str, pointer: int, shape: Sequence[int]) -> bool:
        """Say where a tensor is, and of an input, what shape it has.

        Returns:
            Whether that shape is another than before.

        Raises:
            BackendError: the library refuses the shape.
        """
        if resized := name in self.inputs and self._set.get(name) != tuple(shape):
            if not self._context.set_input_shape(name, tuple(shape)):
                raise BackendError(f"{self._library.name} refuses {name} of shape {tuple(shape)}: "
                                   f"{self._library.last_words()}")  # fmt: skip
            self._set[name] = tuple(shape)
        self._context.set_tensor_address(name, pointer)
        return resized

    def time_layers(self, tell: Callable[[str, float], None]) -> None:
        """From now on, wait for each run, and tell the name of each of its layers and the milliseconds that it took."""
        self._timer = _timer(self._library.module, tell)  # the library holds it, but not for Python
        self._context.profiler = self._timer

    def enqueue(self, stream: Any) -> None:
        """Put one run on a stream.

        Raises:
            BackendError: the library could not.
        """
        if self._context.execute_async_v3(int(stream)):
            return
        said = self._library.last_words()
        if is_out_of_memory(RuntimeError(said)):
            raise BackendError(
                f"the device has no memory left for this step ({self._library.name}: {said[:300]}); use fewer rows or "
                "a shorter context, or close other programs on the device"
            )
        raise BackendError(f"{self._library.name} failed in a step: {said[:300]}")
