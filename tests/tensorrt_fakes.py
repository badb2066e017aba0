"""TensorRT and CUDA as the runtime sees them, without a GPU: device memory is memory of this process, streams run at
once, and an engine computes what its graph says, by ONNX Runtime. Whatever the real ones refuse, these refuse: shapes
outside the profile, addresses that were not given, allocation and copies to the host while a stream is recorded."""

from __future__ import annotations

import ctypes
import functools
import json
import types
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgellm_runtime.graphs.layer_map import graph_nodes
from edgellm_runtime.graphs.onnx_file import read_model

SIDECAR = json.loads((Path(__file__).parent / "data/tensorrt_sidecar.json").read_text())
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}
SUCCESS, OUT_OF_MEMORY, NOT_PERMITTED = 0, 2, 900


class Kind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class FakeCuda:
    """``cuda.bindings.runtime``.

    Args:
        devices: how many GPUs there are.
        error: what asking for them gives.
        capability: of each.
        room: bytes that may be allocated.
    """

    cudaMemcpyKind = Kind
    cudaDeviceAttr = types.SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor=75, cudaDevAttrComputeCapabilityMinor=76
    )  # fmt: skip
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(
        self, devices: int = 1, error: int = 0, capability: tuple[int, int] = (8, 6), room: int = 1 << 28
    ) -> None:
        self.devices, self.error, self.capability, self.room = devices, error, capability, room
        self.memory: dict[int, np.ndarray] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.launches = self.downloads = self.device_to_host_bytes = 0
        self.refuses_capture = False

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return self.error, self.devices

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:
        return 0, f"error {code}".encode()

    def cudaSetDevice(self, number: int) -> tuple[int]:
        return (SUCCESS,)

    def cudaDeviceGetAttribute(self, name: int, number: int) -> tuple[int, int]:
        return SUCCESS, self.capability[name - 75]

    def cudaStreamCreate(self) -> tuple[int, int]:
        return SUCCESS, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (NOT_PERMITTED if self.recording is not None else SUCCESS,)

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:
        if self.recording is not None:
            return NOT_PERMITTED, 0
        if sum(a.nbytes for a in self.memory.values()) + nbytes > self.room:
            return OUT_OF_MEMORY, 0
        array = np.full(nbytes, 0xFF, dtype=np.uint8)  # NaN in every float: what is not written shows
        self.memory[array.ctypes.data] = array
        return SUCCESS, array.ctypes.data

    def cudaFree(self, pointer: int) -> tuple[int]:
        del self.memory[pointer]
        return (SUCCESS,)

    def owner(self, pointer: int, nbytes: int) -> np.ndarray:
        """The allocation that holds those bytes; there must be one."""
        for start, array in self.memory.items():
            if start <= pointer and pointer + nbytes <= start + array.nbytes:
                return array
        raise AssertionError(f"{nbytes} bytes at {pointer:#x} are not in one allocation")

    def cudaMemsetAsync(self, pointer: int, value: int, nbytes: int, stream: int) -> tuple[int]:
        self.owner(pointer, nbytes)
        ctypes.memset(pointer, value, nbytes)
        return (SUCCESS,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Kind, stream: int) -> tuple[int]:
        if kind != Kind.cudaMemcpyHostToDevice:
            self.owner(source, nbytes)
        if kind != Kind.cudaMemcpyDeviceToHost:
            self.owner(target, nbytes)
        else:
            self.downloads, self.device_to_host_bytes = self.downloads + 1, self.device_to_host_bytes + nbytes
        ctypes.memmove(target, source, nbytes)
        return (SUCCESS,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.recording = []
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        recorded, self.recording = self.recording, None
        return (NOT_PERMITTED, None) if self.refuses_capture else (SUCCESS, recorded)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[int, Any]:
        return SUCCESS, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[int]:
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[int]:
        return (SUCCESS,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[int]:
        self.launches += 1
        for work in graph:
            work()
        return (SUCCESS,)


class FakeRuntimeCache:
    """Which kernels TensorRT for RTX has made, as JSON."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def serialize(self) -> bytes:
        return json.dumps(self.kernels).encode()

    def deserialize(self, data: bytes) -> bool:
        try:
            self.kernels = json.loads(data)
        except ValueError:
            return False
        return True


class FakeRuntimeConfig:
    cache: FakeRuntimeCache | None = None

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeContext:
    def __init__(self, engine: FakeEngine, config: FakeRuntimeConfig | None) -> None:
        self.engine, self.shapes, self.addresses = engine, dict[str, tuple[int, ...]](), dict[str, int]()
        self.cache = FakeRuntimeCache() if config is None or config.cache is None else config.cache
        self.profiler: Any = None
        self.resized = False  # since the last run, which then does work that cannot be recorded
        self.finish(engine.name)

    def finish(self, kernel: str) -> None:
        """Make a kernel, unless one was made before."""
        if kernel not in self.cache.kernels:
            self.cache.kernels.append(kernel)
            self.engine.module.made.append(kernel)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        inside = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        if inside:
            self.resized |= self.shapes.get(name) != tuple(shape)
            self.shapes[name] = tuple(shape)
        else:
            self.engine.module.log("ERROR", f"{name}: {shape} is outside the profile")
        return inside

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert name in self.engine.tensors, name
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        module, cuda = self.engine.module, self.engine.module.cuda
        if module.fails:
            module.log("ERROR", module.fails)
            return False
        assert set(self.addresses) == set(self.engine.tensors), "an address is missing"
        if self.resized and cuda.recording is not None:
            module.log("ERROR", "the first run of other sizes cannot be recorded")
            return False
        self.resized = False
        self.finish(f"{self.engine.name} {sorted(self.shapes.items())}")
        work = functools.partial(self.engine.compute, dict(self.shapes), dict(self.addresses))
        if cuda.recording is not None:
            assert self.profiler is None, "a run that is recorded is not timed"
            cuda.recording.append(work)
        else:
            work()
        if self.profiler is not None:
            for name in self.engine.layers():
                self.profiler.report_layer_time(name, 0.5)
        return True


class FakeEngine:
    """An engine whose file is JSON: which network it is, where its graph lies, and its profile."""

    def __init__(self, module: FakeTensorRT, description: dict[str, Any]) -> None:
        self.module, self._profile = module, description["profile"]
        self.name = f"{description['network']}.{description['role']}"
        self.tensors = SIDECAR["networks"][description["network"]][description["role"]] | description.get("changed", {})
        self._session = _session(description["graph"])
        self._graph = Path(description["graph"])
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return types.SimpleNamespace(name=self.tensors[name]["mode"])

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=self.tensors[name]["dtype"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])

    def get_tensor_profile_shape(self, name: str, number: int) -> list[tuple[int, ...]]:
        assert number == 0 and self.tensors[name]["mode"] == "INPUT"
        return [tuple(self._profile[name][kind]) for kind in ("min", "opt", "max")]

    def create_runtime_config(self) -> FakeRuntimeConfig:
        if self.module.no_config:
            raise RuntimeError(self.module.no_config)
        return FakeRuntimeConfig()

    def create_execution_context(self, config: FakeRuntimeConfig | None = None) -> FakeContext | None:
        if self.module.no_context:
            self.module.log("ERROR", self.module.no_context)
            return None
        return FakeContext(self, config)

    def layers(self) -> list[str]:
        """Names as TensorRT makes them: of nodes, of two that became one, of all from one to another, and its own."""
        nodes = [node.name for node in graph_nodes(read_model(self._graph.read_bytes()))]
        return [nodes[0], f"{nodes[1]} + {nodes[2]}", f"{{ForeignNode[{nodes[3]}...{nodes[-1]}]}}", "Reformatting 1"]

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        """Run the graph over the memory at those addresses; outputs are written there, the cache's in place."""
        names = [n for n, t in self.tensors.items() if t["mode"] == "INPUT"]
        assert set(names) == set(shapes), "an input has no shape"
        inputs = {name: self._at(name, shapes[name], addresses[name]).copy() for name in names}
        outputs = [o.name for o in self._session.get_outputs()]
        for name, array in zip(outputs, self._session.run(outputs, inputs), strict=True):
            self._at(name, array.shape, addresses[name])[...] = array

    def _at(self, name: str, shape: tuple[int, ...], pointer: int) -> np.ndarray:
        dtype = np.dtype(NUMPY[self.tensors[name]["dtype"]])
        nbytes = int(np.prod(shape)) * dtype.itemsize
        self.module.cuda.owner(pointer, nbytes)
        return np.frombuffer((ctypes.c_char * nbytes).from_address(pointer), dtype=dtype).reshape(shape)


@functools.cache
def _session(graph: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class FakeTensorRT:
    """The module ``tensorrt`` or ``tensorrt_rtx``."""

    def __init__(self, cuda: FakeCuda, version: str = "1.7.1.116") -> None:
        self.__version__, self.cuda = version, cuda
        self.fails = self.no_context = self.no_config = ""
        self.made: list[str] = []  # kernels
        self.loggers: list[Any] = []
        module = self

        class ILogger:
            def __init__(self) -> None:
                module.loggers.append(self)

        class Runtime:
            def __init__(self, logger: Any) -> None:
                assert logger in module.loggers

            def deserialize_cuda_engine(self, data: bytes) -> FakeEngine | None:
                try:
                    return FakeEngine(module, json.loads(data))
                except ValueError:
                    module.log("ERROR", "the engine's header is damaged")
                    return None

        class IProfiler:
            def __init__(self) -> None:
                pass

        self.ILogger, self.Runtime, self.IProfiler = ILogger, Runtime, IProfiler

    def log(self, severity: str, message: str) -> None:
        for logger in self.loggers:
            logger.log(types.SimpleNamespace(name=severity), message)
