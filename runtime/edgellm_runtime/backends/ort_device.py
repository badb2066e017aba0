"""ONNX Runtime on a GPU: states, inputs and logits stay in its memory; a decode step is one captured graph.

What crosses the bus in a step is a few numbers each way: tokens and lengths there, the chosen tokens back. Whole logits
come back only when they are asked for. With the provider ``cpu`` the same code runs on the CPU, which is how it is
tested where there is no GPU; capture is then only noted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends import cuda
from edgellm_runtime.backends.base import Candidates
from edgellm_runtime.backends.faults import first_line, load_fault, step_fault
from edgellm_runtime.backends.ort import check_names, library
from edgellm_runtime.backends.ort_choice import Chooser
from edgellm_runtime.backends.ort_memory import DeviceStorage, Kernels
from edgellm_runtime.errors import BackendError
from edgellm_runtime.spec import UPDATES, Signature
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import Storage

__all__ = ["OrtDeviceBackend"]

Array = NDArray[Any]
_KEPT = 4  # bindings a set of buffers: two turns of single tokens, and the chunk sizes of a prompt
_CAPTURES = 24  # a captured graph is never given back, so there is an end to them; later steps run uncaptured
_UNCAPTURED = -1
_REFUSED = ("cuda graph", "graph capture")  # what ONNX Runtime's message holds when a graph cannot be captured


class OrtDeviceBackend:
    """Follows :class:`edgellm_runtime.backends.Backend`.

    Args:
        graph: the ``model.onnx`` to run, already checked.
        signature: its inputs, outputs and state.
        max_context: the most tokens a row may hold.
        device: ``cuda``, or ``cpu`` to run the same code there.
        device_id: which GPU.
        capture: whether to capture decode steps.
        profile: how the name of ONNX Runtime's profile begins, for :meth:`end_profile`; None for none.
        encoder: the graph that reads sources, already checked; None: the model reads none.

    Raises:
        BackendError: CUDA is not there, the library refuses the graph, or the GPU has no memory for it.
    """

    candidates = 64
    updates: Collection[str] = UPDATES

    def __init__(
        self, graph: Path, signature: Signature, *, max_context: int, device: str = "cuda", device_id: int = 0,
        capture: bool = True, profile: Path | None = None, encoder: Path | None = None,
    ) -> None:  # fmt: skip
        self._profile = profile
        self._ort, self._graph, self._signature = library(), graph, signature
        self.device, self._id, self._context = device, device_id, max_context
        if device == "cuda":
            cuda.check_package(self._ort)
            cuda.check_gpu()
            cuda.preload(self._ort)
        self.captures, self.refusal = capture, ""  # why steps are not captured, where they should be
        self._sessions_made = 0
        self._make_session()
        self._inputs = check_names(self._session, signature)
        self._encoder = None
        if encoder is not None:  # sources have all lengths, so nothing is captured
            try:
                self._encoder = self._load(encoder, capture=False)
            except BackendError:
                raise
            except Exception as error:
                raise load_fault(f"ONNX Runtime {self._ort.__version__}", encoder, error) from error
            check_names(self._encoder, signature.encoder)
        kernels = Kernels(self._ort, self._providers(capture=False), device, device_id)
        self.storage: Storage = DeviceStorage(kernels)
        self._kernels, self._chooser = kernels, Chooser(kernels)
        self._graph_ids = itertools.count(1)

    def _providers(self, *, capture: bool) -> list[Any]:
        if self.device != "cuda":
            return ["CPUExecutionProvider"]
        options = {"device_id": str(self._id), "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
        return [(cuda.CUDA, {**options, "enable_cuda_graph": str(int(capture))}), "CPUExecutionProvider"]

    def _load(self, graph: Path, *, capture: bool) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level, options.enable_mem_pattern = 3, False
        if self.device == "cuda":
            options.intra_op_num_threads = 1  # what is left for the CPU is shapes
        if self.device == "cuda" or any(spec.dtype == "float16" for spec in self._signature.state):
            # other layouts are of no use here, and ONNX Runtime 1.32 ends the process while it tries them on 16 bits
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if self._profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(self._profile)
        session = self._ort.InferenceSession(str(graph), options, providers=self._providers(capture=capture))
        if self.device == "cuda" and cuda.CUDA not in session.get_providers():
            raise cuda.not_running(self._ort)  # the library has put the CPU in its place and said so only in its log
        return session

    def _make_session(self) -> None:
        try:
            self._session = self._load(self._graph, capture=self.captures)
        except BackendError:
            raise
        except Exception as error:
            if self.captures and any(words in str(error).lower() for words in _REFUSED):
                self._without_capture(error)
                return
            raise load_fault(f"ONNX Runtime {self._ort.__version__}", self._graph, error) from error
        self._sessions_made += 1

    def _without_capture(self, error: Exception) -> None:
        """Loops and recurrences cannot be captured; the GPU runs them all the same."""
        self.captures, self.refusal = False, first_line(error)
        self._make_session()

    def encode(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """See :meth:`edgellm_runtime.backends.Backend.encode`."""
        assert self._encoder is not None, "a session asks for what the manifest has"
        try:
            io = self._encoder.io_binding()
            for name, array in (("source", source), ("source_lengths", lengths)):
                io.bind_cpu_input(name, np.ascontiguousarray(array))
            for spec in self._signature.encoded:
                io.bind_ortvalue_output(spec.present_name, state.tensors[spec.name])
            self._encoder.run_with_iobinding(io)
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> Array:
        """See :meth:`edgellm_runtime.backends.Backend.run`."""
        return self._here(self._step(tokens, lengths, logit_positions, state).logits)

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[Array, Array]:
        """See :meth:`edgellm_runtime.backends.Backend.run_hidden`."""
        binding = self._step(tokens, lengths, logit_positions, state, hidden=True)
        return self._here(binding.logits), self._here(binding.hidden)

    def best(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State,
        count: int,
    ) -> Candidates:  # fmt: skip
        """See :meth:`edgellm_runtime.backends.Backend.best`."""
        binding = self._step(tokens, lengths, logit_positions, state)
        return self._chooser.best(binding.logits, count, lambda: self._here(binding.logits)[:, 0])

    def end_profile(self) -> Path:
        """The file that ONNX Runtime has written its profile to, as JSON."""
        return Path(self._session.end_profiling())

    def _here(self, logits: Any) -> Array:
        try:
            return self._kernels.host(logits).astype(np.float32, copy=False)
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error

    def _step(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State,
        *, hidden: bool = False,
    ) -> _Binding:  # fmt: skip
        binding = self._binding(tokens.shape, logit_positions.shape, state, hidden=hidden)
        longest = int((state.lengths + lengths).max())
        try:
            binding.fill(tokens, state.lengths, lengths, logit_positions, longest)
            self._session.run_with_iobinding(binding.io, binding.options)
        except Exception as error:
            if not binding.first or binding.graph_id == _UNCAPTURED:
                raise step_fault("ONNX Runtime", error) from error
            self._without_capture(error)  # a step may be run again: it reads what it has not changed
            state.attachments.clear()
            return self._step(tokens, lengths, logit_positions, state, hidden=hidden)
        binding.first = False
        state.swap()
        return binding

    def _binding(self, tokens: tuple[int, ...], positions: tuple[int, ...], state: State, *, hidden: bool) -> _Binding:
        # What is not written in place is written beside it, so two bindings take turns: told apart by what is read.
        turn = next((state.tensors[name].data_ptr() for name in state.spares), 0)
        key = (id(self), self._sessions_made, turn, tokens, positions, hidden)
        found: _Binding | None = state.attachments.get(key)
        if found is None:
            _make_room(state.attachments)
            graph_id = _UNCAPTURED
            if self.captures and tokens[1] == 1 and (number := next(self._graph_ids)) <= _CAPTURES:
                graph_id = number
            slots = min(state.capacity, self._context)
            found = _Binding(
                self._ort, self._session, self._kernels.empty, self._signature, self._inputs, tokens, positions, state,
                graph_id, slots, hidden=hidden,
            )  # fmt: skip
            state.attachments[key] = found
        return found


def _make_room(bindings: dict[Any, _Binding]) -> None:
    """Drop the oldest; captured ones last, for capturing again takes a graph more."""
    while len(bindings) >= _KEPT:
        oldest = next((key for key, b in bindings.items() if b.graph_id == _UNCAPTURED), next(iter(bindings)))
        bindings.pop(oldest)


class _Binding:
    """Values bound to the graph's names for one shape of step over one set of buffers.

    A captured one keeps the number of slots that kernels prepare for at the most there can be: it is read on the host,
    so it is part of what is captured.
    """

    def __init__(
        self, ort: Any, session: Any, empty: Callable[..., Any], signature: Signature, inputs: set[str],
        tokens: tuple[int, ...], positions: tuple[int, ...], state: State, graph_id: int, slots: int, *, hidden: bool,
    ) -> None:  # fmt: skip
        self.graph_id, self.first, self._slots = graph_id, True, slots
        self.options = ort.RunOptions()
        self.options.add_run_config_entry("gpu_graph_id", str(graph_id))
        shapes = {"tokens": tokens, "past_lengths": tokens[:1], "lengths": tokens[:1], "logit_positions": positions}
        self._dtypes = dtypes = {spec.name: spec.dtype for spec in signature.inputs}
        self.io = session.io_binding()
        self._values = {name: empty(shape, dtypes[name]) for name, shape in shapes.items() if name in inputs}
        for name, value in self._values.items():
            self.io.bind_ortvalue_input(name, value)
        self._total = np.zeros((), dtype=np.int32)
        if "total_length" in inputs:
            self._host = ort.OrtValue.ortvalue_from_numpy(self._total)
            assert self._host.data_ptr() == self._total.ctypes.data, "ONNX Runtime copied what it must share"
            self.io.bind_ortvalue_input("total_length", self._host)
        for spec in signature.state:
            past = state.tensors[spec.name]
            if spec.past_name in inputs:
                self.io.bind_ortvalue_input(spec.past_name, past)
            if not spec.encoded:
                present = past if spec.in_place else state.spares[spec.name]
                self.io.bind_ortvalue_output(spec.present_name, present)
        logits, self.hidden = signature.logits, None
        self.logits = empty((*positions, int(logits.shape[-1])), logits.dtype)
        self.io.bind_ortvalue_output(logits.name, self.logits)
        if hidden and signature.hidden is not None:
            self.hidden = empty((*tokens, int(signature.hidden.shape[-1])), signature.hidden.dtype)
            self.io.bind_ortvalue_output(signature.hidden.name, self.hidden)

    def fill(
        self, tokens: Array, past_lengths: Array, lengths: Array, logit_positions: Array, longest: int
    ) -> None:  # fmt: skip
        """Bring a step's numbers to the device."""
        numbers = {
            "tokens": tokens, "past_lengths": past_lengths, "lengths": lengths, "logit_positions": logit_positions
        }  # fmt: skip
        for name, value in self._values.items():
            # the library copies bytes and looks at neither shape nor dtype
            value.update_inplace(np.ascontiguousarray(numbers[name], dtype=self._dtypes[name]))
        self._total[...] = longest if self.graph_id == _UNCAPTURED else self._slots
