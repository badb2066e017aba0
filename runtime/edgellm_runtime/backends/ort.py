"""ONNX Runtime: every array is bound once, a step copies nothing and allocates nothing it can keep."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.base import HostBackend
from edgellm_runtime.backends.faults import load_fault, step_fault
from edgellm_runtime.backends.spread_codes import spread_codes
from edgellm_runtime.errors import BackendError
from edgellm_runtime.freed_pages import trim
from edgellm_runtime.graphs.float_inputs import with_float_inputs
from edgellm_runtime.graphs.writer import with_outputs
from edgellm_runtime.spec import Signature
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import host_dtype
from edgellm_runtime.threads import thread_count

if TYPE_CHECKING:
    from edgellm_runtime.backends.own_kernels import OwnKernels

__all__ = ["OrtBackend", "check_names", "check_values", "library", "load_graph", "session_options", "with_kernels"]

Array = NDArray[Any]
NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_NO_BLOCKS = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_MAKING = threading.Lock()  # of sessions, while the environment is changed for them
_FOLDER = "session.model_external_initializers_file_folder_path"  # of the weights of a graph that is given as bytes
# What the library makes of a product with 8-bit weights that are widened before it; by default one that rounds inputs.
_FLOAT_PRODUCTS = "session.qdq_matmulnbits_accuracy_level"
# Equal scalars of a graph become one, after which the library looks through the whole graph again: that takes 3 to 6 ms
# of loading, and no step is faster for it.
_NO_OPTIMIZERS = ["ConstantSharing"]
_KEPT = 12  # bindings a state: two turns of single tokens, the chunk sizes of a prompt, and those of drafts


def library() -> Any:
    """The onnxruntime package, imported here and nowhere else, with its telemetry off unless the user set otherwise.

    Raises:
        BackendError: it is not installed.
    """
    # It would write a device id into the user's cache and look for a telemetry host; after its import it is too late.
    os.environ.setdefault(NO_TELEMETRY, "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed; pip install onnxruntime (or onnxruntime-gpu for CUDA, never both)"
        ) from error
    return onnxruntime


@contextmanager
def _attention_in_one_piece() -> Iterator[None]:
    """Have kernels of attention that are made meanwhile not work block by block, unless the environment says already.

    On CPU, ONNX Runtime's blocks make a token up to twice as slow and a prompt no faster (docs/benchmark-notes.md); it
    asks nothing but the environment. Bundles that are loaded at once take turns, or one would change it for another.
    """
    with _MAKING:
        ours = _NO_BLOCKS not in os.environ
        if ours:
            os.environ[_NO_BLOCKS] = "1"
        try:
            yield
        finally:
            if ours:
                os.environ.pop(_NO_BLOCKS, None)


def session_options(
    threads: int | None, *, fusions: bool = True, float_inputs: bool = False, weights: Path | None = None
) -> Any:  # fmt: skip
    """Options of the library for one graph on this processor.

    Args:
        threads: as for :class:`OrtBackend`.
        fusions: likewise.
        float_inputs: likewise.
        weights: the folder of the files of weights, where the graph is given as bytes.
    """
    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = thread_count(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A plan of one block of memory for each shape of step, kept for good: it costs megabytes and saves no time.
    options.enable_mem_pattern = False
    if not fusions:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        # weights are made floats once, when the graph is loaded, and not in every step
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if float_inputs:
        options.add_session_config_entry(_FLOAT_PRODUCTS, "1")
    if weights is not None:
        options.add_session_config_entry(_FOLDER, str(weights))
    return options


def load_graph(source: str | bytes, graph: Path, options: Any) -> Any:
    """A session of the library.

    Args:
        source: the graph's file, or its bytes.
        graph: the file, for messages.
        options: of the session.

    Raises:
        BackendError: the library refuses the graph.
    """
    ort = library()
    try:
        with _attention_in_one_piece():
            return ort.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], disabled_optimizers=_NO_OPTIMIZERS
            )
    except Exception as error:  # the library raises many kinds of its own
        raise load_fault(f"ONNX Runtime {ort.__version__}", graph, error) from error


def with_kernels(
    graph: Path, kernels: OwnKernels, options: Any, fetch: Sequence[str] = (), swapped: bytes | None = None
) -> bytes:
    """A graph whose products run on kernels that a session's options are told of; it reads its weights where it was.

    Args:
        graph: the file.
        kernels: for its products.
        options: of the session.
        fetch: names of values that must stay.
        swapped: the graph as the kernels have changed it, where that is known and nothing more must stay.
    """
    kernels.add_to(options)
    options.add_session_config_entry(_FOLDER, str(graph.parent))
    return swapped if swapped is not None and not fetch else kernels.swapped(graph.read_bytes(), fetch)[0]


class OrtBackend(HostBackend):
    """Follows :class:`edgellm_runtime.backends.Backend`.

    Args:
        graph: the ``model.onnx`` to run, already checked.
        signature: its inputs, outputs and state.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
        device: only ``cpu``.
        fusions: whether the library may put other kernels in the place of a graph's nodes. Where activations have 16
            bits, ONNX Runtime 1.32 computes wrong products of quantized weights then, and ends the process over a Scan.
        profile: how the name of a file begins that tells what each kernel took; None for no such file.
        fetch: names of further values of the graph, which :attr:`fetched` holds after each step.
        encoder: the graph that reads sources, already checked; None: the model reads none.
        kernels: run the products that they can; None for ONNX Runtime's everywhere.
        swapped: the graph as these kernels have changed it, where that is known.
        float_inputs: have products with quantized weights read floats, slow as that is, and not what they round to 8
            bits.

    Raises:
        BackendError: the library is missing, or refuses the graph.
    """

    def __init__(
        self, graph: Path, signature: Signature, *, threads: int | None = None, device: str = "cpu",
        fusions: bool = True, profile: Path | None = None, fetch: Sequence[str] = (), encoder: Path | None = None,
        kernels: OwnKernels | None = None, swapped: bytes | None = None, float_inputs: bool = False,
    ) -> None:  # fmt: skip
        ort = library()
        options = session_options(threads, fusions=fusions, float_inputs=float_inputs)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        self.device, self.threads, self.kernels = device, options.intra_op_num_threads, kernels
        self._ort, self._signature, self._fetch = ort, signature, tuple(fetch)
        self.fetched: dict[str, Array] = {}
        source: str | bytes = str(graph)
        if kernels is not None:
            source = with_kernels(graph, kernels, options, fetch, swapped)
        if float_inputs:
            source = with_float_inputs(graph.read_bytes())
        spread = spread_codes(source if isinstance(source, bytes) else graph.read_bytes(), graph.parent, fetch)
        of_encoder = options
        if spread.codes:
            source, of_encoder = spread.graph, session_options(threads, fusions=fusions, float_inputs=float_inputs)
            spread.hand_to(options, ort)
        if fetch:
            source = with_outputs(source if isinstance(source, bytes) else graph.read_bytes(), fetch)
        if isinstance(source, bytes) and kernels is None:  # which have set it; twice, and the library complains
            options.add_session_config_entry(_FOLDER, str(graph.parent))
        self._session = load_graph(source, graph, options)
        if spread.codes:  # which are in the session by now
            spread.codes.clear()
            trim()
        self._inputs = check_names(self._session, signature, fetch)
        self._encoder = None if encoder is None else load_graph(str(encoder), encoder, of_encoder)
        if self._encoder is not None:
            check_names(self._encoder, signature.encoder)

    def encode(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """See :meth:`edgellm_runtime.backends.Backend.encode`."""
        assert self._encoder is not None, "a session asks for what the manifest has"
        try:
            binding, value = self._encoder.io_binding(), self._ort.OrtValue.ortvalue_from_numpy
            for name, array in (("source", source), ("source_lengths", lengths)):
                binding.bind_ortvalue_input(name, value(array))
            for spec in self._signature.encoded:
                binding.bind_ortvalue_output(spec.present_name, value(state.tensors[spec.name]))
            self._encoder.run_with_iobinding(binding)
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> Array:
        """See :meth:`edgellm_runtime.backends.Backend.run`."""
        return self._step(tokens, lengths, logit_positions, state, hidden=False).floats

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[Array, Array]:
        """See :meth:`edgellm_runtime.backends.Backend.run_hidden`."""
        binding = self._step(tokens, lengths, logit_positions, state, hidden=True)
        assert binding.hidden is not None
        return binding.floats, binding.hidden

    def _step(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State,
        *, hidden: bool,
    ) -> _Binding:  # fmt: skip
        try:
            binding = self._binding(tokens.shape, logit_positions.shape, state, hidden=hidden)
        except MemoryError as error:
            raise step_fault("ONNX Runtime", error) from error
        binding.tokens[...] = tokens
        binding.lengths[...] = lengths
        binding.past_lengths[...] = state.lengths
        binding.logit_positions[...] = logit_positions
        binding.total_length[...] = (state.lengths + lengths).max()
        try:
            for name in self._fetch:
                binding.io.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding.io)
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error
        if self._fetch:
            given = binding.io.get_outputs()[-len(self._fetch) :]  # in the order in which they were bound
            self.fetched = {name: value.numpy() for name, value in zip(self._fetch, given, strict=True)}
        state.swap()
        return binding

    def end_profile(self) -> Path:
        """Write what each kernel took until now, if that was asked for; the file's path."""
        return Path(self._session.end_profiling())

    def _binding(self, tokens: tuple[int, ...], positions: tuple[int, ...], state: State, *, hidden: bool) -> _Binding:
        # What is not written in place is written beside it, so two bindings take turns: told apart by what is read.
        turn = next((id(state.tensors[name]) for name in state.spares), 0)
        key = (id(self), turn, tokens, positions, hidden)
        found: _Binding | None = state.attachments.get(key)
        if found is None:
            while len(state.attachments) >= _KEPT:
                state.attachments.pop(next(iter(state.attachments)))
            found = _Binding(
                self._ort, self._session, self._signature, self._inputs, tokens, positions, state, hidden=hidden
            )
            state.attachments[key] = found
        return found


class _Binding:
    """Arrays bound to the graph's names for one shape of step over one state."""

    def __init__(
        self, ort: Any, session: Any, signature: Signature, inputs: set[str], tokens: tuple[int, ...],
        positions: tuple[int, ...], state: State, *, hidden: bool,
    ) -> None:  # fmt: skip
        batch = tokens[0]
        self.tokens = np.zeros(tokens, dtype=np.int64)
        self.past_lengths = np.zeros(batch, dtype=np.int32)
        self.lengths = np.zeros(batch, dtype=np.int32)
        self.logit_positions = np.zeros(positions, dtype=np.int64)
        self.total_length = np.zeros((), dtype=np.int32)
        logits = signature.logits
        self.logits = np.zeros((*positions, int(logits.shape[-1])), dtype=host_dtype(logits.dtype))
        self.io = session.io_binding()
        self._values: list[Any] = []

        def value(array: Array) -> Any:
            made = ort.OrtValue.ortvalue_from_numpy(array)
            assert made.data_ptr() == array.ctypes.data, "ONNX Runtime copied an array that must be shared"
            self._values.append(made)
            return made

        for name in ("tokens", "past_lengths", "lengths", "logit_positions", "total_length"):
            if name in inputs:
                self.io.bind_ortvalue_input(name, value(getattr(self, name)))
        for spec in signature.state:
            past = value(state.tensors[spec.name])
            present = past if spec.in_place else value(state.spares[spec.name])
            if spec.past_name in inputs:
                self.io.bind_ortvalue_input(spec.past_name, past)
            if not spec.encoded:
                self.io.bind_ortvalue_output(spec.present_name, present)
        self.io.bind_ortvalue_output(logits.name, value(self.logits))
        self.hidden: Array | None = None
        if hidden and signature.hidden is not None:  # what is not bound is not copied out
            self.hidden = np.zeros((*tokens, int(signature.hidden.shape[-1])), dtype=np.float32)
            self.io.bind_ortvalue_output(signature.hidden.name, value(self.hidden))

    @property
    def floats(self) -> Array:
        """The logits in float32."""
        return self.logits if self.logits.dtype == np.float32 else self.logits.astype(np.float32)


def check_names(session: Any, signature: Signature, fetch: Sequence[str] = ()) -> set[str]:
    """Compare a session's inputs and outputs with the manifest's.

    Returns:
        The names of its inputs.

    Raises:
        BackendError: they differ.
    """
    found = {i.name for i in session.get_inputs()}
    check_values(found, {o.name for o in session.get_outputs()}, signature, fetch)
    return found


def check_values(inputs: Set[str], outputs: Set[str], signature: Signature, fetch: Sequence[str] = ()) -> None:
    """Compare the names of a graph's inputs and outputs with the manifest's; errors as :func:`check_names`."""
    expected = {t.name for t in signature.inputs} | {s.past_name for s in signature.state}
    if not inputs <= expected:
        raise BackendError(f"the graph asks for {sorted(inputs - expected)}, which the manifest does not know")
    if outputs != {t.name for t in signature.outputs} | {s.present_name for s in signature.carried} | {*fetch}:
        raise BackendError("the graph's outputs are not those of the manifest; export the model again")
