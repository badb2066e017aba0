"""A bundle's drafter on ONNX Runtime's CPU kernels: tokens one after another, with nothing copied between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.faults import load_fault, step_fault
from edgellm_runtime.backends.ort import check_names, library, with_kernels
from edgellm_runtime.bundle.draft_info import MOST_READ, draft_signature
from edgellm_runtime.threads import thread_count

if TYPE_CHECKING:
    from edgellm_runtime.backends.own_kernels import OwnKernels

__all__ = ["DraftGraph", "DraftSteps"]

Array = NDArray[Any]


class DraftGraph:
    """The graph, loaded; any number of threads may draft with it.

    Args:
        graph: already checked.
        features: of a hidden state.
        width: of its own state.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.
        kernels: run the products that they can; None for ONNX Runtime's everywhere.

    Raises:
        BackendError: the library is missing, or refuses the graph.
    """

    def __init__(
        self, graph: Path, features: int, width: int, *, threads: int | None = None, kernels: OwnKernels | None = None
    ) -> None:
        self._ort = library()
        options = self._ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = thread_count(threads), 1
        options.log_severity_level, options.enable_mem_pattern = 3, False
        source = str(graph) if kernels is None else with_kernels(graph, kernels, options)
        try:
            self._session = self._ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library raises many kinds of its own
            raise load_fault(f"ONNX Runtime {self._ort.__version__}", graph, error) from error
        self.features, self.width = features, width
        check_names(self._session, draft_signature(features, width))

    def steps(self) -> DraftSteps:
        """Arrays for the drafts of one text."""
        return DraftSteps(self._ort, self._session, self.features, self.width)


class DraftSteps:
    """Drafts of one text; made by :meth:`DraftGraph.steps`.

    The graph's state is of the tokens that were chosen, which :meth:`read` takes with what they were chosen from. A
    draft goes on from a copy of it.
    """

    def __init__(self, ort: Any, session: Any, features: int, width: int) -> None:
        self._ort, self._session = ort, session
        self._needed = {given.name for given in session.get_inputs()}
        self._hidden = np.zeros((1, MOST_READ, features), np.float32)
        self._tokens = np.zeros((1, MOST_READ), np.int64)
        self._first, self._next, self._chance = (
            np.ones((1, 1), np.float32),
            np.zeros(1, np.int64),
            np.zeros(1, np.float32),
        )
        self._past, self._present = np.zeros((1, width), np.float32), np.zeros((1, width), np.float32)
        self._chosen = np.zeros((1, width), np.float32)  # the state of the tokens that were chosen
        self._bindings: dict[int, tuple[Any, list[Any]]] = {}  # by the tokens that are read at once

    def _bound(self, count: int) -> tuple[Any, list[Any]]:
        binding, kept = self._session.io_binding(), list[Any]()
        inputs: dict[str, Array] = {
            "hidden": self._hidden[:, :count], "token": self._tokens[:, :count], "first": self._first,
            "past.draft": self._past,
        }  # fmt: skip
        outputs: dict[str, Array] = {"next": self._next, "chance": self._chance, "present.draft": self._present}
        for bind, arrays in ((binding.bind_ortvalue_input, inputs), (binding.bind_ortvalue_output, outputs)):
            for name, array in arrays.items():
                if name in outputs or name in self._needed:
                    kept.append(value := self._ort.OrtValue.ortvalue_from_numpy(array))
                    assert value.data_ptr() == array.ctypes.data, "ONNX Runtime copied an array that must be shared"
                    bind(name, value)
        return binding, kept

    def _run(self, count: int) -> tuple[int, float]:
        if count not in self._bindings:
            self._bindings[count] = self._bound(count)
        try:
            self._session.run_with_iobinding(self._bindings[count][0])
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error
        return int(self._next[0]), float(self._chance[0])

    def begin(self, state: Array | None = None) -> None:
        """Forget what was read; or take such a state (width,) for that of what was."""
        self._chosen[0] = 0.0 if state is None else state

    def read(self, tokens: Sequence[int], hidden: Array) -> tuple[int, float]:
        """Read tokens that were chosen, at least one.

        Args:
            tokens: in order.
            hidden: (tokens, features), what each was chosen from.

        Returns:
            The token that may follow the last, and how probable it is to be right.

        Raises:
            BackendError: the library failed.
        """
        self._first[0, 0] = 1.0
        for start in range(0, len(tokens), MOST_READ):
            piece = tokens[start : start + MOST_READ]
            self._tokens[0, : len(piece)], self._hidden[0, : len(piece)] = piece, hidden[start : start + len(piece)]
            self._past[:] = self._chosen
            found = self._run(len(piece))
            self._chosen[:] = self._present
        return found

    def guess(self, token: int) -> tuple[int, float]:
        """The same for a token that was drafted last; the draft goes on with it, and nothing is kept of it."""
        self._first[0, 0], self._tokens[0, 0] = 0.0, token
        self._past[:] = self._present
        return self._run(1)

    def draft(self, tokens: Sequence[int], hidden: Array, most: int, worth: Callable[[float], bool]) -> list[int]:
        """Tokens that may follow, as long as all of them together are probable enough to be right.

        Args:
            tokens: that were chosen since the last draft.
            hidden: (tokens, features), what each was chosen from.
            most: tokens at most.
            worth: says whether a token of such a probability is worth checking.
        """
        token, chance = self.read(tokens, hidden)
        found = list[int]()
        while worth(chance):
            found.append(token)
            if len(found) == most:
                break
            token, probable = self.guess(token)
            chance *= probable
        return found
