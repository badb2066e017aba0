"""A bundle's drafter on ONNX Runtime's CPU kernels: tokens one after another, with nothing copied between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.faults import load_fault, step_fault
from edgellm_runtime.backends.ort import check_names, library
from edgellm_runtime.bundle.draft_info import draft_signature
from edgellm_runtime.threads import thread_count

__all__ = ["DraftGraph", "DraftSteps"]

Array = NDArray[Any]


class DraftGraph:
    """The graph, loaded; any number of threads may draft with it.

    Args:
        graph: already checked.
        features: of a hidden state.
        width: of its own state.
        threads: for one step; None for what :func:`edgellm_runtime.threads.thread_count` says.

    Raises:
        BackendError: the library is missing, or refuses the graph.
    """

    def __init__(self, graph: Path, features: int, width: int, *, threads: int | None = None) -> None:
        self._ort = library()
        options = self._ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = thread_count(threads), 1
        options.log_severity_level, options.enable_mem_pattern = 3, False
        try:
            self._session = self._ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library raises many kinds of its own
            raise load_fault(f"ONNX Runtime {self._ort.__version__}", graph, error) from error
        self.features, self.width = features, width
        check_names(self._session, draft_signature(features, width))

    def steps(self) -> DraftSteps:
        """Arrays for the drafts of one text."""
        return DraftSteps(self._ort, self._session, self.features, self.width)


class DraftSteps:
    """Drafts of one text at a time; made by :meth:`DraftGraph.steps`."""

    def __init__(self, ort: Any, session: Any, features: int, width: int) -> None:
        self._session = session
        self._hidden, self._token = np.zeros((1, features), np.float32), np.zeros(1, np.int64)
        self._first, self._next = np.ones((1, 1), np.float32), np.zeros(1, np.int64)
        self._chance = np.zeros(1, np.float32)
        self._states = np.zeros((2, 1, width), np.float32)  # read and written, in turn
        self._bindings = [self._bound(ort, self._states[turn], self._states[1 - turn]) for turn in (0, 1)]

    def _bound(self, ort: Any, past: Array, present: Array) -> Any:
        binding, kept = self._session.io_binding(), list[Any]()
        needed = {given.name for given in self._session.get_inputs()}
        inputs: dict[str, Array] = {
            "hidden": self._hidden,
            "token": self._token,
            "first": self._first,
            "past.draft": past,
        }
        outputs: dict[str, Array] = {"next": self._next, "chance": self._chance, "present.draft": present}
        for bind, arrays in ((binding.bind_ortvalue_input, inputs), (binding.bind_ortvalue_output, outputs)):
            for name, array in arrays.items():
                if name in outputs or name in needed:
                    kept.append(value := ort.OrtValue.ortvalue_from_numpy(array))
                    assert value.data_ptr() == array.ctypes.data, "ONNX Runtime copied an array that must be shared"
                    bind(name, value)
        return binding, kept

    def step(self, token: int, hidden: Array | None) -> tuple[int, float]:
        """The token that may follow another, and how probable it is to be right.

        Args:
            token: the one before it.
            hidden: (features,), what that was chosen from, if it begins a draft; None: the draft goes on with it.

        Raises:
            BackendError: the library failed.
        """
        self._token[0], self._first[0, 0] = token, float(hidden is not None)
        if hidden is not None:
            self._hidden[0] = hidden
        try:
            self._session.run_with_iobinding(self._bindings[0][0])
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error
        self._bindings.reverse()
        return int(self._next[0]), float(self._chance[0])

    def draft(self, token: int, hidden: Array, most: int, worth: Callable[[float], bool]) -> list[int]:
        """Tokens that may follow one, as long as all of them together are probable enough to be right.

        Args:
            token: that was chosen last.
            hidden: (features,), what it was chosen from.
            most: tokens at most.
            worth: says whether a token of such a probability is worth checking.
        """
        found, chance = list[int](), 1.0
        start: Array | None = hidden
        while len(found) < most:
            token, probable = self.step(token, start)
            start, chance = None, chance * probable
            if not worth(chance):
                break
            found.append(token)
        return found
