"""States on a device that ONNX Runtime manages: tensors are its values, and its kernels move them.

Nothing passes through this process's memory but what is read or written on purpose. Copies, zeros and rows are graphs
of one or two nodes, run by the provider that runs the model, so that no further library is needed. With the device
``cpu`` the very same code runs on the CPU's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.faults import first_line, step_fault
from edgellm_runtime.backends.pool import BufferPool
from edgellm_runtime.graphs.writer import ELEMENT_TYPES, Node, graph_bytes
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state.storage import GROWTH, Buffers, host_dtype, too_large, widened

__all__ = ["DeviceStorage", "Kernels"]

Array = NDArray[Any]
_DTYPES = {f"tensor({'float' if name == 'float32' else 'double' if name == 'float64' else name})": name
           for name in ELEMENT_TYPES}  # fmt: skip


class Kernels:
    """Small graphs on one device, each made when it is first needed.

    Args:
        ort: the library.
        providers: as ``InferenceSession`` takes them.
        device: ``cuda`` or ``cpu``, where values are.
        device_id: which one.
    """

    def __init__(self, ort: Any, providers: Sequence[Any], device: str, device_id: int = 0) -> None:
        self.device = device
        self._ort, self._providers, self._id = ort, list(providers), device_id
        self._sessions: dict[tuple[str, ...], Any] = {}

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A value of that shape; its content is arbitrary."""
        make = self._ort.OrtValue.ortvalue_from_shape_and_type
        return make(list(shape), ELEMENT_TYPES[dtype], self.device, self._id)

    def run(
        self, key: tuple[str, ...], graph: bytes | None, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> list[Array]:
        """Run a graph.

        Args:
            key: tells it from others.
            graph: its bytes; None when it has run before.
            inputs: values on the device, or arrays here.
            outputs: values to write, or None for outputs that are to come here.

        Returns:
            The outputs that were to come here, in the graph's order.

        Raises:
            BackendError: the library failed, or the device has no memory left.
        """
        try:
            if key not in self._sessions:
                assert graph is not None
                options = self._ort.SessionOptions()
                options.log_severity_level, options.intra_op_num_threads = 3, 1
                self._sessions[key] = self._ort.InferenceSession(graph, options, providers=self._providers)
            session = self._sessions[key]
            io = session.io_binding()
            for name, value in inputs.items():
                if isinstance(value, np.ndarray):
                    io.bind_cpu_input(name, np.ascontiguousarray(value))
                else:
                    io.bind_ortvalue_input(name, value)
            for name, value in outputs.items():
                if value is None:
                    io.bind_output(name, "cpu")
                else:
                    io.bind_ortvalue_output(name, value)
            session.run_with_iobinding(io)
            if all(value is not None for value in outputs.values()):
                return []
            found = io.copy_outputs_to_cpu()
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error
        return [array for array, value in zip(found, outputs.values(), strict=True) if value is None]

    def knows(self, key: tuple[str, ...]) -> bool:
        """Whether that graph has run before."""
        return key in self._sessions

    def zeros(self, out: Any) -> None:
        """Fill a value with zeros."""
        dtype = _DTYPES[out.data_type()]
        first = "float16" if dtype == "bfloat16" else dtype  # the CPU spreads no bfloat16
        nodes = [Node("Cast", ["zero"], ["z"], {"to": ELEMENT_TYPES[first]}), Node("Expand", ["z", "shape"], ["wide"])]
        nodes.append(Node("Cast", ["wide"], ["y"], {"to": ELEMENT_TYPES[dtype]}))
        graph = graph_bytes(nodes, {"shape": "int64"}, {"y": dtype}, {"zero": [0]})
        self.run(("zeros", dtype), graph, {"shape": np.array(out.shape(), dtype=np.int64)}, {"y": out})

    def copy(self, source: Any, out: Any) -> None:
        """Copy a value into another of its shape; of another dtype, converted."""
        key = _DTYPES[source.data_type()], _DTYPES[out.data_type()]
        node = Node("Cast", ["x"], ["y"], {"to": ELEMENT_TYPES[key[1]]})
        self.run(("copy", *key), graph_bytes([node], {"x": key[0]}, {"y": key[1]}), {"x": source}, {"y": out})

    def rows(self, source: Any, index: Sequence[int], out: Any) -> None:
        """Copy some rows of a value."""
        dtype = _DTYPES[source.data_type()]
        node = Node("Gather", ["x", "rows"], ["y"], {"axis": 0})
        graph = graph_bytes([node], {"x": dtype, "rows": "int64"}, {"y": dtype})
        self.run(("rows", dtype), graph, {"x": source, "rows": np.array(index, dtype=np.int64)}, {"y": out})

    def fit(self, source: Any, axis: int, out: Any) -> None:
        """Copy along an axis what both have; the rest becomes zeros."""
        dtype, shape, wanted = _DTYPES[source.data_type()], list(source.shape()), list(out.shape())
        if wanted[axis] <= shape[axis]:
            nodes = [Node("Slice", ["x", "start", "end", "axis"], ["y"])]
            bounds = {"start": [0], "end": [wanted[axis]], "axis": [axis]}
            graph = graph_bytes(nodes, {"x": dtype, **dict.fromkeys(bounds, "int64")}, {"y": dtype})
            numbers = {name: np.array(value, dtype=np.int64) for name, value in bounds.items()}
            self.run(("slice", dtype), graph, {"x": source, **numbers}, {"y": out})
            return
        rest = self.empty([*shape[:axis], wanted[axis] - shape[axis], *shape[axis + 1 :]], dtype)
        self.zeros(rest)
        node = Node("Concat", ["x", "rest"], ["y"], {"axis": axis})
        graph = graph_bytes([node], {"x": dtype, "rest": dtype}, {"y": dtype})
        self.run(("concat", dtype, str(axis)), graph, {"x": source, "rest": rest}, {"y": out})

    def put(self, target: Any, row: int, source: Any) -> None:
        """Copy a value of one row into a row of another, in place."""
        dtype = _DTYPES[target.data_type()]
        node = Node("ScatterND", ["x", "row", "new"], ["y"])
        graph = graph_bytes([node], {"x": dtype, "row": "int64", "new": dtype}, {"y": dtype})
        index = np.array([[row]], dtype=np.int64)
        self.run(("put", dtype), graph, {"x": target, "row": index, "new": source}, {"y": target})

    def host(self, value: Any) -> Array:
        """A value's numbers here; bfloat16 as float32."""
        if _DTYPES[value.data_type()] == "bfloat16":
            wide = self.empty(value.shape(), "float32")
            self.copy(value, wide)
            value = wide
        found: Array = np.array(value.numpy())  # a copy: the value may be written again
        return found


class DeviceStorage:
    """Follows :class:`edgellm_runtime.state.storage.Storage`, with ONNX Runtime's values as tensors.

    Buffers whose state is gone are kept for the next one of their size: what was captured for their addresses stays
    good, and nothing is allocated for it.

    Args:
        kernels: of the device.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels, self._pool = kernels, BufferPool(self._make)

    def rounded(self, slots: int) -> int:
        """See :meth:`edgellm_runtime.state.storage.Storage.rounded`."""
        return -(-slots // GROWTH) * GROWTH

    def acquire(self, specs: Sequence[StateSpec], batch: int, capacity: int) -> Buffers:
        """See :meth:`edgellm_runtime.state.storage.Storage.acquire`."""
        buffers, fresh = self._pool.get(specs, batch, capacity)
        for spec in specs:  # slots that no token has filled, and what is static before it is made, are not looked at
            if fresh or spec.update == "replace":
                self._kernels.zeros(buffers.tensors[spec.name])
        return buffers

    def grown(self, specs: Sequence[StateSpec], old: Buffers, batch: int, capacity: int) -> Buffers:
        """See :meth:`edgellm_runtime.state.storage.Storage.grown`."""
        new, _ = self._pool.get(specs, batch, capacity)
        for spec in specs:
            source, out, axis = old.tensors[spec.name], new.tensors[spec.name], spec.capacity_axis
            if axis is None:
                self._kernels.copy(source, out)
            else:
                self._kernels.fit(source, axis, out)
        return new

    def taken(self, specs: Sequence[StateSpec], old: Buffers, rows: Sequence[int], capacity: int) -> Buffers:
        """See :meth:`edgellm_runtime.state.storage.Storage.taken`."""
        new, _ = self._pool.get(specs, len(rows), capacity)
        for spec in specs:
            self._kernels.rows(old.tensors[spec.name], rows, new.tensors[spec.name])
        return new

    def put(self, spec: StateSpec, target: Any, row: int, source: Any, capacities: tuple[int, int]) -> None:
        """See :meth:`edgellm_runtime.state.storage.Storage.put`."""
        axis = spec.capacity_axis
        if axis is not None and capacities[0] != capacities[1]:
            fitting = self._kernels.empty(spec.resolve(1, capacities[0]), spec.dtype)
            self._kernels.fit(source, axis, fitting)
            source = fitting
        self._kernels.put(target, row, source)

    def clear(self, tensor: Any) -> None:
        """See :meth:`edgellm_runtime.state.storage.Storage.clear`."""
        self._kernels.zeros(tensor)

    def read(self, spec: StateSpec, tensor: Any) -> Array:
        """See :meth:`edgellm_runtime.state.storage.Storage.read`; a copy."""
        found = self._kernels.host(tensor)
        if spec.dtype != "bfloat16":
            return found
        return (found.view(np.uint32) >> 16).astype(np.uint16)

    def write(self, spec: StateSpec, tensor: Any, array: Array) -> None:
        """See :meth:`edgellm_runtime.state.storage.Storage.write`."""
        shape = tuple(tensor.shape())
        assert array.dtype == host_dtype(spec.dtype), "the library copies bytes and does not look at their dtype"
        if array.shape != shape:
            full = np.zeros(shape, dtype=array.dtype)
            full[tuple(slice(0, n) for n in array.shape)] = array
            array = full
        if spec.dtype != "bfloat16":
            tensor.update_inplace(np.ascontiguousarray(array))
            return
        wide = self._kernels.empty(shape, "float32")
        wide.update_inplace(widened(array, spec.dtype))
        self._kernels.copy(wide, tensor)

    def _make(self, spec: StateSpec, batch: int, capacity: int) -> Any:
        try:
            return self._kernels.empty(spec.resolve(batch, capacity), spec.dtype)
        except Exception as error:  # the library raises many kinds of its own
            self._pool.clear()
            raise too_large(
                spec, batch, capacity, first_line(error), f" on the {self._kernels.device} device"
            ) from error
