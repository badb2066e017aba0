"""A bundle's drafter on ONNX Runtime's CPU kernels: tokens one after another, with nothing copied between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.faults import load_fault, step_fault
from edgellm_runtime.backends.ort import check_names, library, with_kernels
from edgellm_runtime.bundle.draft_info import draft_signature
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
    """Drafts of one text at a time; made by :meth:`DraftGraph.steps`.

    The graph's state is of what was chosen so far. A draft goes on from it, and :meth:`keep` says how much of the draft
    was chosen, so that nothing is read a second time.
    """

    def __init__(self, ort: Any, session: Any, features: int, width: int) -> None:
        self._session = session
        self._hidden, self._token = np.zeros((1, features), np.float32), np.zeros(1, np.int64)
        self._first, self._next = np.ones((1, 1), np.float32), np.zeros(1, np.int64)
        self._chance = np.zeros(1, np.float32)
        self._past, self._present = np.zeros((1, width), np.float32), np.zeros((1, width), np.float32)
        self._start = np.zeros((1, width), np.float32)  # the state that the next draft begins with
        self._read: list[Array] = []  # states of the last draft, after each token that it read
        self._binding, self._kept = self._bound(ort)

    def _bound(self, ort: Any) -> tuple[Any, list[Any]]:
        binding, kept = self._session.io_binding(), list[Any]()
        needed = {given.name for given in self._session.get_inputs()}
        inputs: dict[str, Array] = {
            "hidden": self._hidden, "token": self._token, "first": self._first, "past.draft": self._past,
        }  # fmt: skip
        outputs: dict[str, Array] = {"next": self._next, "chance": self._chance, "present.draft": self._present}
        for bind, arrays in ((binding.bind_ortvalue_input, inputs), (binding.bind_ortvalue_output, outputs)):
            for name, array in arrays.items():
                if name in outputs or name in needed:
                    kept.append(value := ort.OrtValue.ortvalue_from_numpy(array))
                    assert value.data_ptr() == array.ctypes.data, "ONNX Runtime copied an array that must be shared"
                    bind(name, value)
        return binding, kept

    def begin(self, state: Array | None = None) -> None:
        """Draft from such a state (width,) next; None: from that of a text's beginning."""
        self._start[0] = 0.0 if state is None else state
        self._read = []

    def keep(self, drafted: int) -> None:
        """Go on behind so many of the tokens that were drafted last.

        A draft's last token was not read where the draft was cut off behind it; it is passed over then. Where nothing
        was drafted the state does not know the text so far, and begins anew.
        """
        if not self._read:
            self.begin()
            return
        self._start, self._read = self._read[min(drafted, len(self._read) - 1)], []

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
            self._hidden[0], self._read = hidden, []
        self._past[:] = self._read[-1] if self._read else self._start
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise step_fault("ONNX Runtime", error) from error
        self._read.append(self._present.copy())
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
