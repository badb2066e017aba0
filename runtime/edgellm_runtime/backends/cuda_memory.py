"""CUDA's own memory, streams and captured graphs, through NVIDIA's bindings; no framework.

Every call's code is looked at here, so that whoever uses it sees sound results or one clear error.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.pool import BufferPool
from edgellm_runtime.errors import BackendError, StateError
from edgellm_runtime.spec import DTYPE_BYTES, StateSpec
from edgellm_runtime.state.storage import Buffers, host_dtype, too_large

__all__ = ["Captured", "Cuda", "CudaStorage", "DeviceArray", "bindings"]

Array = NDArray[Any]
_OUT_OF_MEMORY, _NO_DRIVER, _NO_DEVICE = 2, (3, 35), 100  # of cudaError_t


def bindings() -> Any:
    """The module of NVIDIA's bindings to the CUDA runtime.

    Raises:
        BackendError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            "CUDA's bindings for Python are not installed; pip install 'cuda-bindings>=12.9', in the major version of "
            "CUDA that nvidia-smi shows"
        ) from error
    return runtime


@dataclass(eq=False)
class DeviceArray:
    """Memory on the GPU, given back when nothing refers to it any more.

    Args:
        pointer: its address there.
        shape: in elements.
        dtype: one of ours.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    _keeps: Any = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Captured:
    """Work that was recorded once and is launched as one.

    Args:
        cuda: where it was recorded.
        executable: the instantiated graph.
    """

    def __init__(self, cuda: Cuda, executable: Any) -> None:
        self._cuda, self._executable = cuda, executable
        weakref.finalize(self, cuda.runtime.cudaGraphExecDestroy, executable).atexit = False

    def launch(self) -> None:
        """Run it on the stream that it was recorded on."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._cuda.stream)


class Cuda:
    """One GPU with one stream, on which everything happens in turn.

    Args:
        runtime: what :func:`bindings` gives.
        device_id: which GPU.

    Raises:
        BackendError: no driver, or no GPU that this process may use.
    """

    def __init__(self, runtime: Any, device_id: int = 0) -> None:
        self.runtime = runtime
        count = self._count()
        if device_id >= count:
            raise BackendError(
                f"no GPU {device_id}: this process may use {count}; check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        self.call("cudaSetDevice", device_id)
        self.device_id, self.stream = device_id, self.call("cudaStreamCreate")

    def _count(self) -> int:
        code, count = self.runtime.cudaGetDeviceCount()
        if int(code) == 0 and count:
            return int(count)
        if int(code) in _NO_DRIVER:
            raise BackendError(
                "no NVIDIA driver, or one that is older than CUDA's bindings; install a newer driver, or cuda-bindings "
                "of the major version that nvidia-smi shows"
            )
        if int(code) in (0, _NO_DEVICE):
            raise BackendError("no NVIDIA GPU that this process may use; check nvidia-smi and CUDA_VISIBLE_DEVICES")
        raise BackendError(f"CUDA does not start ({self._say(code)}); check that nvidia-smi works")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime; what it returns beside its code.

        Raises:
            BackendError: its code is not success.
        """
        code, *found = getattr(self.runtime, name)(*arguments)
        if int(code) == _OUT_OF_MEMORY:
            raise BackendError(
                "the device has no memory left; use fewer rows or a shorter context, or close other programs on it"
            )
        if int(code):
            raise BackendError(f"CUDA's {name} failed: {self._say(code)}; load the bundle again")
        return found[0] if found else None

    def _say(self, code: Any) -> str:
        _, text = self.runtime.cudaGetErrorString(code)
        return f"{text.decode() if isinstance(text, bytes) else text} ({int(code)})"

    @property
    def compute_capability(self) -> str:
        """Of the GPU, such as ``8.6``."""
        names = self.runtime.cudaDeviceAttr
        numbers = (names.cudaDevAttrComputeCapabilityMajor, names.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self.call("cudaDeviceGetAttribute", n, self.device_id)) for n in numbers)

    def empty(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Memory of arbitrary content."""
        made = DeviceArray(0, tuple(shape), dtype)
        made.pointer = int(self.call("cudaMalloc", max(made.nbytes, 1)))
        weakref.finalize(made, self.runtime.cudaFree, made.pointer).atexit = False
        return made

    def zero(self, array: DeviceArray) -> None:
        """Fill it with zero bytes."""
        self.call("cudaMemsetAsync", array.pointer, 0, array.nbytes, self.stream)

    def upload(self, array: DeviceArray, numbers: Array) -> None:
        """Bring numbers there; they may be changed again at once, for CUDA has taken its own copy of them."""
        numbers = np.ascontiguousarray(numbers, dtype=host_dtype(array.dtype))
        assert numbers.shape == array.shape, (numbers.shape, array.shape)
        self._copy(array.pointer, numbers.ctypes.data, array.nbytes, "HostToDevice")

    def download(self, array: DeviceArray) -> Array:
        """Its numbers, here; waits for all work before."""
        numbers = np.empty(array.shape, dtype=host_dtype(array.dtype))
        self._copy(numbers.ctypes.data, array.pointer, array.nbytes, "DeviceToHost")
        self.wait()
        return numbers

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Copy between addresses on the GPU."""
        self._copy(target, source, nbytes, "DeviceToDevice")

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        which = getattr(self.runtime.cudaMemcpyKind, f"cudaMemcpy{kind}")
        self.call("cudaMemcpyAsync", target, source, nbytes, which, self.stream)

    def wait(self) -> None:
        """Until the stream has done all that it was given."""
        self.call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Captured:
        """Record what ``work`` puts on the stream; nothing of it runs yet.

        Raises:
            BackendError: it does what cannot be recorded.
        """
        mode = self.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self.runtime.cudaStreamEndCapture(self.stream)  # fails too; it ends the recording
            raise
        graph = self.call("cudaStreamEndCapture", self.stream)
        try:
            return Captured(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)


class CudaStorage:
    """Follows :class:`edgellm_runtime.state.storage.Storage`, for states of one fixed capacity.

    Args:
        cuda: the GPU.
        capacity: slots that every row has.
    """

    def __init__(self, cuda: Cuda, capacity: int) -> None:
        self._cuda, self._capacity, self._pool = cuda, capacity, BufferPool(self._make)

    def rounded(self, slots: int) -> int:
        """The one capacity there is.

        Raises:
            StateError: more slots are asked for.
        """
        if slots > self._capacity:
            raise StateError(
                f"{slots} slots a row, but the engines were built for {self._capacity}; export the model again with "
                "a larger --max-context"
            )
        return self._capacity

    def acquire(self, specs: Sequence[StateSpec], batch: int, capacity: int) -> Buffers:
        """See :meth:`edgellm_runtime.state.storage.Storage.acquire`."""
        assert capacity == self._capacity, (capacity, self._capacity)
        buffers, fresh = self._pool.get(specs, batch, capacity)
        for spec in specs:
            if fresh or spec.update == "replace":
                self._cuda.zero(buffers.tensors[spec.name])
        return buffers

    def grown(self, specs: Sequence[StateSpec], old: Buffers, batch: int, capacity: int) -> Buffers:
        """Never asked for: there is one capacity."""
        raise AssertionError("a state of fixed capacity was asked to grow")

    def taken(self, specs: Sequence[StateSpec], old: Buffers, rows: Sequence[int], capacity: int) -> Buffers:
        """See :meth:`edgellm_runtime.state.storage.Storage.taken`."""
        new, _ = self._pool.get(specs, len(rows), capacity)
        for spec in specs:
            for to, row in enumerate(rows):
                self._row(spec, new.tensors[spec.name], to, old.tensors[spec.name], row)
        return new

    def put(self, spec: StateSpec, target: Any, row: int, source: Any, capacities: tuple[int, int]) -> None:
        """See :meth:`edgellm_runtime.state.storage.Storage.put`."""
        self._row(spec, target, row, source, 0)

    def _row(self, spec: StateSpec, target: DeviceArray, to: int, source: DeviceArray, row: int) -> None:
        nbytes = spec.nbytes(1, self._capacity)  # a row is one piece: the batch is the first axis
        self._cuda.move(target.pointer + to * nbytes, source.pointer + row * nbytes, nbytes)

    def clear(self, tensor: Any) -> None:
        """See :meth:`edgellm_runtime.state.storage.Storage.clear`."""
        self._cuda.zero(tensor)

    def read(self, spec: StateSpec, tensor: Any) -> Array:
        """See :meth:`edgellm_runtime.state.storage.Storage.read`; a copy."""
        return self._cuda.download(tensor)

    def write(self, spec: StateSpec, tensor: Any, array: Array) -> None:
        """See :meth:`edgellm_runtime.state.storage.Storage.write`."""
        if array.shape != tensor.shape:
            full = np.zeros(tensor.shape, dtype=array.dtype)
            full[tuple(slice(0, n) for n in array.shape)] = array
            array = full
        assert array.dtype == host_dtype(spec.dtype)
        self._cuda.upload(tensor, array)

    def _make(self, spec: StateSpec, batch: int, capacity: int) -> DeviceArray:
        try:
            return self._cuda.empty(spec.resolve(batch, capacity), spec.dtype)
        except BackendError as error:
            self._pool.clear()
            raise too_large(spec, batch, capacity, error, " on the GPU") from error
