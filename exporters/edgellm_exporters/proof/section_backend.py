"""Steps of a graph whose sections are loaded one after the other in each step: slow, in little memory.

From the second step on the first sections stay loaded, as long as that leaves the process below the most it has held;
where it had little, each step loads all of them anew, in the memory of one. What else wants memory between steps has
them go by :func:`rest`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.proof.sections import Section, sections_of
from edgellm_runtime.backends.base import HostBackend
from edgellm_runtime.backends.faults import step_fault
from edgellm_runtime.backends.ort import check_values, library, load_graph, session_options
from edgellm_runtime.backends.spread_codes import spread_codes
from edgellm_runtime.checks.memory import memory_now_and_at_most
from edgellm_runtime.freed_pages import trim
from edgellm_runtime.graphs.float_inputs import with_float_inputs
from edgellm_runtime.graphs.product_parts import with_product_parts
from edgellm_runtime.spec import Signature
from edgellm_runtime.state import State

__all__ = ["SectionBackend", "rest"]

Array = NDArray[Any]
_ALL: WeakSet[SectionBackend] = WeakSet()


def rest() -> None:
    """Drop every section of any graph that stayed loaded; the steps after that load them anew."""
    for backend in _ALL:
        backend.rest()
    trim()


class SectionBackend(HostBackend):
    """Follows :class:`edgellm_runtime.backends.Backend`; its kernels and its numbers are those of ``OrtBackend``.

    Args:
        graph: the file, of one's own making.
        signature: its inputs, outputs and state.
        most: bytes of a section's weights, and of a product's weight in floats: larger ones are made in parts.
        threads: as for ``OrtBackend``.
        fusions: likewise.
        fetch: likewise.
        float_inputs: likewise.
        memory: gives the bytes that the process holds, and the most it has held.

    Raises:
        BackendError: the graph's inputs or outputs are not those of the signature.
    """

    device = "cpu"

    def __init__(
        self, graph: Path, signature: Signature, most: int, *, threads: int | None = None, fusions: bool = True,
        fetch: Sequence[str] = (), float_inputs: bool = False,
        memory: Callable[[], tuple[int, int]] = memory_now_and_at_most,
    ) -> None:  # fmt: skip
        self._graph, self._signature, self._fetch = graph, signature, tuple(fetch)
        self._make_options = partial(
            session_options, threads, fusions=fusions, float_inputs=float_inputs, weights=graph.parent
        )
        self.threads = self._make_options().intra_op_num_threads
        model = with_float_inputs(graph.read_bytes()) if float_inputs else graph.read_bytes()
        self.sections = sections_of(with_product_parts(model, most), most, fetch)
        made = {name for section in self.sections for name in section.outputs}
        read = {name for section in self.sections for name in section.inputs}
        given = {t.name for t in signature.outputs} | {s.present_name for s in signature.carried} | {*fetch}
        check_values(read - made, made - read | made & given, signature, fetch)
        self.fetched: dict[str, Array] = {}
        self._memory, self._limit = memory, memory()[1]
        self._kept: dict[int, Any] = {}  # sessions that stay loaded, by the places of their sections
        self._met = False  # all sections, once: before that none stays, for the next may take more than it seems
        self._grown = 0  # by the most that a section took once it was loaded
        self._most, self._largest = len(self.sections), max(self.sections, key=lambda section: section.nbytes)
        _ALL.add(self)

    def rest(self) -> None:
        """Drop what stayed loaded."""
        self._kept.clear()

    def run(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> Array:
        """See :meth:`edgellm_runtime.backends.Backend.run`."""
        made = self._step(tokens, lengths, logit_positions, state)
        return np.asarray(made[self._signature.logits.name], np.float32)

    def run_hidden(
        self, tokens: NDArray[np.int64], lengths: NDArray[np.int32], logit_positions: NDArray[np.int64], state: State
    ) -> tuple[Array, Array]:
        """See :meth:`edgellm_runtime.backends.Backend.run_hidden`."""
        assert self._signature.hidden is not None
        made = self._step(tokens, lengths, logit_positions, state)
        return np.asarray(made[self._signature.logits.name], np.float32), made[self._signature.hidden.name]

    def _step(self, tokens: Array, lengths: Array, logit_positions: Array, state: State) -> dict[str, Array]:
        """What there is after all sections, by name."""
        values: dict[str, Array] = {
            "tokens": tokens, "lengths": lengths, "past_lengths": state.lengths, "logit_positions": logit_positions,
            "total_length": np.asarray((state.lengths + lengths).max()),
        }  # fmt: skip
        dtypes = {"tokens": np.int64, "logit_positions": np.int64}
        values = {name: np.ascontiguousarray(v, dtypes.get(name, np.int32)) for name, v in values.items()}
        values["total_length"] = values["total_length"].reshape(())
        specs = self._signature.state
        values |= {spec.past_name: state.tensors[spec.name] for spec in specs}
        written = {
            spec.present_name: state.tensors[spec.name] if spec.in_place else state.spares[spec.name]
            for spec in specs
            if not spec.encoded
        }
        for place, section in enumerate(self.sections):
            session = self._kept.get(place) or self._load(section)
            values |= self._given(session, section, values, written)
            values |= {name: written[name] for name in section.outputs if name in written}  # later ones may read them
            if self._met and place not in self._kept and len(self._kept) < self._most and self._has_room(self._largest):
                self._kept[place] = session
            del session
            trim()
        self._met = True
        self.fetched = {name: values[name] for name in self._fetch}
        state.swap()
        return values

    def _load(self, section: Section) -> Any:
        """A section's session, for which those that stayed loaded make room, the last first; they do not stay again."""
        while self._kept and not self._has_room(section):
            self._kept.popitem()
            self._most = len(self._kept)
            trim()
        before = self._memory()[0]
        spread, options = spread_codes(section.model, self._graph.parent, section.outputs), self._make_options()
        if spread.codes:
            spread.hand_to(options, library())
        session = load_graph(spread.graph, self._graph, options)
        del spread, options
        trim()
        self._grown = max(self._grown, self._memory()[0] - before)
        return session

    def _has_room(self, section: Section) -> bool:
        """Whether a section can be loaded beside those that are: its weights, as they lie and in order.

        Scales of few bits become floats, so that in order they may take more than they do in the file: what the largest
        section took tells, of which loading takes up to two and a half times as much for a moment.
        """
        return self._memory()[0] + max(2 * section.nbytes, self._grown * 5 // 2) <= self._limit

    def _given(
        self, session: Any, section: Section, values: Mapping[str, Array], written: Mapping[str, Array]
    ) -> dict[str, Array]:  # fmt: skip
        """What one section gives besides the state."""
        value = library().OrtValue.ortvalue_from_numpy
        try:
            binding = session.io_binding()
            bound = {name: value(values[name]) for name in section.inputs}
            for name, array in bound.items():
                binding.bind_ortvalue_input(name, array)
            for name in section.outputs:
                if name in written:
                    past = next((n for n in bound if values[n] is written[name]), None)
                    binding.bind_ortvalue_output(name, value(written[name]) if past is None else bound[past])
                else:
                    binding.bind_output(name, "cpu")
            session.run_with_iobinding(binding)
            made = zip(section.outputs, binding.get_outputs(), strict=True)
            return {name: np.array(found.numpy()) for name, found in made if name not in written}
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error
