"""TensorRT engines: one for prompts, one for single tokens, over one state in the GPU's memory.

What crosses the bus in a step is tokens and lengths there, and back the chosen tokens, or the logits where they are
asked for. A step of single tokens is recorded once for each set of buffers and then launched as one.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.base import Candidates
from edgellm_runtime.backends.caches import CacheFile
from edgellm_runtime.backends.cuda_memory import Captured, Cuda, CudaStorage, DeviceArray, bindings
from edgellm_runtime.backends.graph_roles import GraphRole, GraphRoles
from edgellm_runtime.backends.tensorrt_choice import Choice, check_chooser
from edgellm_runtime.backends.tensorrt_encoder import EncoderEngine, check_encoder, row_shape
from edgellm_runtime.backends.tensorrt_kernels import KernelCache
from edgellm_runtime.backends.tensorrt_library import Engine, Library, find_library
from edgellm_runtime.bundle.engine_info import ENCODE
from edgellm_runtime.errors import BackendError, StateError
from edgellm_runtime.spec import UPDATES, Signature
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import Storage, widened

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle

__all__ = ["EngineRun", "TensorRTBackend", "open_engines"]

Array = NDArray[Any]
NO_CHOOSERS: Mapping[int, Engine] = {}
_KEPT = 8  # bindings a set of buffers: two turns of single tokens, chosen or not, and prompts with some logits


def open_engines(bundle: Bundle, *, device_id: int = 0) -> TensorRTBackend:
    """A backend of a bundle's engines, each compared with the library and the GPU that are here.

    Args:
        bundle: opened.
        device_id: which GPU.

    Raises:
        BackendError: no library, no bindings, no driver, no GPU, or not enough memory.
        BundleError: no engine for this library and this GPU; the text says how to build it here.
    """
    from edgellm_runtime.backends.engine_fit import check_engine, choosers_here

    manifest = bundle.manifest
    library = find_library([engine.library for engine in manifest.engines])
    cuda = Cuda(bindings(), device_id)
    here = {"library": library.name, "version": library.version, "compute_capability": cuda.compute_capability}
    roles = GraphRoles.of(manifest)
    names = [*(role.name for role in roles.all), *([] if manifest.encoder is None else [ENCODE])]
    files = {name: check_engine(bundle, name, **here).file for name in names}
    choosers, fetches = choosers_here(manifest, **here)

    def loaded(name: str) -> Engine:
        cache = CacheFile("kernels", *here.values(), manifest.files[name].sha256)
        return library.load(bundle.file(name), cache)

    assert manifest.capacity is not None
    engines = {name: loaded(file) for name, file in files.items()}
    backend = TensorRTBackend(
        library, cuda, roles, engines, manifest.signature, capacity=manifest.capacity,
        choosers={n: loaded(found.engine.file) for n, found in choosers.items()},
        max_source=0 if manifest.encoder is None else manifest.encoder.max_source,
    )  # fmt: skip
    backend.fetches = fetches
    return backend


@dataclass(frozen=True)
class EngineRun:
    """What the layers of an engine took in one run.

    Args:
        role: of the engine.
        layers: names and milliseconds, in the order in which they ran.
    """

    role: str
    layers: list[tuple[str, float]] = field(default_factory=list)


class TensorRTBackend:
    """Follows :class:`edgellm_runtime.backends.Backend`.

    Args:
        library: that runs the engines.
        cuda: the GPU.
        roles: of the bundle.
        engines: role to engine; with an encoder, its own too.
        signature: what the engines share.
        capacity: slots of each row of the state.
        choosers: engines that choose tokens, by how many they choose of a row; of a single one, or none.
        max_source: the most tokens of a source; 0: the model reads none.

    Raises:
        BackendError: an engine is not of this signature.
    """

    device = "tensorrt"
    updates: Collection[str] = UPDATES

    def __init__(
        self, library: Library, cuda: Cuda, roles: GraphRoles, engines: Mapping[str, Engine], signature: Signature, *,
        capacity: int, choosers: Mapping[int, Engine] = NO_CHOOSERS, max_source: int = 0,
    ) -> None:  # fmt: skip
        self.library, self._cuda, self._roles, self._signature = library, cuda, roles, signature
        self.storage: Storage = CudaStorage(cuda, capacity)
        self.captures, self.refusal = True, ""  # why steps of single tokens are not recorded, where they should be
        self._engines, self._choosers = engines, choosers
        for role in roles.all:
            _check(engines[role.name], role, signature, capacity)
        self._encoder: EncoderEngine | None = None
        if max_source:
            check_encoder(engines[ENCODE], signature, max_source)
            self._encoder = EncoderEngine(cuda, engines[ENCODE], signature)
        for count, engine in choosers.items():
            check_chooser(engine, int(signature.outputs[0].shape[-1]), count, engines["decode"].profile["tokens"][2][0])
        self.candidates = max(choosers, default=0)
        self.fetches = ""  # why logits are fetched where tokens could be chosen
        self._fresh = {id(e): e.kernels for e in (*engines.values(), *choosers.values()) if e.kernels is not None}
        self._timed: list[EngineRun] | None = None
        weakref.finalize(self, _save, tuple(self._fresh.values()))  # shapes that came later make kernels too

    def encode(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """See :meth:`edgellm_runtime.backends.Backend.encode`."""
        assert self._encoder is not None, "a session asks for what the manifest has"
        self._encoder.run(source, lengths, state)
        self._keep([self._encoder.engine])

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> Array:
        """See :meth:`edgellm_runtime.backends.Backend.run`."""
        logits = self._logits(self._step(tokens, lengths, logit_positions, state, 0))
        state.swap()  # only now: work on the GPU fails where it is waited for
        return logits

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[Array, Array]:
        """See :meth:`edgellm_runtime.backends.Backend.run_hidden`."""
        binding = self._step(tokens, lengths, logit_positions, state, 0)
        assert binding.hidden is not None
        logits, hidden = self._logits(binding), self._cuda.download(binding.hidden)
        state.swap()
        return logits, hidden[:, : tokens.shape[1]]

    def best(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State,
        count: int,
    ) -> Candidates:  # fmt: skip
        """See :meth:`edgellm_runtime.backends.Backend.best`."""
        chosen = min(n for n in self._choosers if n >= count)
        binding = self._step(tokens, lengths, logit_positions, state, chosen)
        assert binding.choice is not None
        ids, values = binding.choice.read()
        state.swap()
        self._keep(binding.engines)
        return Candidates(ids[:, :count], values[:, :count], lambda: self._logits(binding)[:, 0])

    def time_layers(self) -> Sequence[EngineRun]:
        """Time the engines' layers from now on: a list that grows with each run. Steps are no longer recorded."""
        timed = self._timed = list[EngineRun]()
        self.captures, self.refusal = False, "the engines' layers are timed"
        for engine in self._engines.values():
            engine.time_layers(lambda name, ms: timed[-1].layers.append((name, ms)))
        return timed

    def _step(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State,
        chosen: int,
    ) -> _Binding:  # fmt: skip
        """Put a step on the stream; so many tokens are chosen of its logits there, 0 for none."""
        role = self._roles.choose(tokens.shape[1])
        binding = self._binding(role, logit_positions.shape, state, chosen)
        numbers: dict[str, Array] = {
            "tokens": role.pad(tokens), "past_lengths": state.lengths, "lengths": lengths,
            "logit_positions": logit_positions,
        }  # fmt: skip
        for name, array in binding.inputs.items():
            self._cuda.upload(array, numbers[name])
        self._launch(role, binding)
        return binding

    def _logits(self, binding: _Binding) -> Array:
        logits = widened(self._cuda.download(binding.logits), binding.logits.dtype).astype(np.float32, copy=False)
        self._keep(binding.engines)
        return logits

    def _keep(self, engines: Sequence[Engine]) -> None:
        """Save what the library made of engines that have just run for the first time."""
        for engine in engines:
            if (kernels := self._fresh.pop(id(engine), None)) is not None:
                kernels.save()

    def _launch(self, role: GraphRole, binding: _Binding) -> None:
        if binding.captured is not None:
            binding.captured.launch()
            return
        resized = binding.place()
        if self._timed is not None:
            self._timed.append(EngineRun(role.name))
        records = role.time == 1 and self.captures and binding.warm  # the first run may still allocate
        if resized or not records:  # nor can what a library does once for new sizes be recorded
            binding.enqueue(self._cuda.stream)
        binding.warm = True
        if not records:
            return
        try:
            binding.captured = self._cuda.capture(lambda: binding.enqueue(self._cuda.stream))
        except BackendError as error:
            self.captures, self.refusal = False, str(error)
        if resized:
            return
        if binding.captured is None:
            binding.enqueue(self._cuda.stream)
        else:
            binding.captured.launch()

    def _binding(self, role: GraphRole, positions: tuple[int, ...], state: State, chosen: int) -> _Binding:
        engine = self._engines[role.name]
        turn = next((state.tensors[name].pointer for name in state.spares), 0)
        key = (id(self), role.name, turn, positions, chosen)
        found: _Binding | None = state.attachments.get(key)
        if found is None:
            self._check_shape(engine, role, positions, state)
            while len(state.attachments) >= _KEPT:
                state.attachments.pop(next(iter(state.attachments)))
            found = state.attachments[key] = _Binding(self._cuda, engine, self._signature, role, positions, state)
            if chosen:
                found.choice = Choice(self._cuda, self._choosers[chosen], chosen, found.logits)
        return found

    def _check_shape(self, engine: Engine, role: GraphRole, positions: tuple[int, ...], state: State) -> None:
        batch, count = positions
        most = engine.profile["tokens"][2][0]
        if not engine.fits("tokens", (batch, role.time)):
            raise StateError(
                f"{batch} rows, but the {role.name} engine was built for up to {most}; use fewer rows, or export the "
                f"model again with --max-batch {batch}"
            )
        if "logit_positions" in engine.inputs and not engine.fits("logit_positions", positions):
            raise BackendError(
                f"logits of {count} positions a row, but the {role.name} engine was built for up to "
                f"{engine.profile['logit_positions'][2][1]}; ask for fewer at a time"
            )
        for spec in state.specs:
            read = spec.encoded and spec.past_name in engine.inputs
            if read and not engine.fits(spec.past_name, state.tensors[spec.name].shape):
                raise StateError(
                    f"sources of {spec.source} tokens, but the {role.name} engine was built for others; build the "
                    "engines again: edgellm build"
                )


class _Binding:
    """Addresses for one role over one set of buffers."""

    def __init__(
        self,
        cuda: Cuda,
        engine: Engine,
        signature: Signature,
        role: GraphRole,
        positions: tuple[int, ...],
        state: State,
    ) -> None:
        batch = positions[0]
        shapes = {
            "tokens": (batch, role.time), "past_lengths": (batch,), "lengths": (batch,), "logit_positions": positions
        }  # fmt: skip
        self.engine, self.warm = engine, False
        self.captured: Captured | None = None
        self.choice: Choice | None = None  # where tokens are chosen from the logits of its step
        self.inputs = {
            spec.name: cuda.empty(shapes[spec.name], spec.dtype)
            for spec in signature.inputs
            if spec.name in engine.inputs
        }
        logits, self.hidden = signature.logits, None
        self.logits = cuda.empty((*positions, int(logits.shape[-1])), engine.dtypes[logits.name])
        self._places: dict[str, DeviceArray] = {**self.inputs, logits.name: self.logits}
        if signature.hidden is not None:  # an engine writes all that it gives, asked or not
            self.hidden = cuda.empty((batch, role.time, int(signature.hidden.shape[-1])), "float32")
            self._places[signature.hidden.name] = self.hidden
        for spec in signature.state:
            past = state.tensors[spec.name]
            if spec.past_name in engine.inputs:
                self._places[spec.past_name] = past
            if not spec.encoded:
                # a cache is written in place, which is what the graph's TensorScatter means
                self._places[spec.present_name] = past if spec.in_place else state.spares[spec.name]

    @property
    def engines(self) -> Sequence[Engine]:
        """What a step runs, in order."""
        return (self.engine,) if self.choice is None else (self.engine, self.choice.engine)

    def place(self) -> bool:
        """Tell the engines' contexts, which all bindings share; whether a shape is another than before."""
        resized = [self.engine.bind(name, array.pointer, array.shape) for name, array in self._places.items()]
        return any(resized) | (self.choice is not None and self.choice.place())

    def enqueue(self, stream: Any) -> None:
        """Put one step on a stream."""
        for engine in self.engines:
            engine.enqueue(stream)


def _save(kernels: Sequence[KernelCache]) -> None:
    for made in kernels:
        made.save()


def _check(engine: Engine, role: GraphRole, signature: Signature, capacity: int) -> None:
    """Compare an engine's tensors with the signature, so that no address is given for something else."""
    wanted = {t.name: t.dtype for t in (*signature.inputs, *signature.outputs)}
    wanted |= {s.past_name: s.dtype for s in signature.state} | {s.present_name: s.dtype for s in signature.carried}
    known = {t.name for t in signature.inputs} | {s.past_name for s in signature.state}
    outputs = {t.name for t in signature.outputs} | {s.present_name for s in signature.carried}
    wrong = [name for name, dtype in engine.dtypes.items() if wanted.get(name) != dtype]
    if wrong or not engine.inputs <= known or engine.outputs != outputs:
        odd = sorted({*wrong, *(engine.inputs - known), *(engine.outputs ^ outputs)})
        raise BackendError(f"{engine.file}: {odd[:3]} differ from the manifest's signature; build the engine again")
    time = engine.shapes["tokens"][1]
    slots = {engine.shapes[s.past_name][s.capacity_axis] for s in signature.state if s.capacity_axis is not None}
    if time != role.time or not slots <= {capacity}:
        raise BackendError(
            f"{engine.file}: takes {time} tokens and {sorted(slots)} slots, the manifest says {role.time} and "
            f"{capacity}; build the engine again"
        )
    for spec in signature.state:
        expected = row_shape(spec, capacity)
        for name in engine.shapes.keys() & {spec.past_name, spec.present_name}:
            if (found := engine.shapes[name][1:]) != expected:
                raise BackendError(
                    f"{engine.file}: {name} has {list(found)} for each row, the manifest says {list(expected)}; build "
                    "the engine again"
                )
