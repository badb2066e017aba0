"""Choosing tokens where the logits are, so that a vocabulary of numbers stays on the device and a few come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.base import Candidates
from edgellm_runtime.backends.ort_memory import Kernels
from edgellm_runtime.graphs.token_choice import choosing_graph

__all__ = ["Chooser"]

_INPUTS = {"float": "float32"}


class Chooser:
    """The best tokens of each row's only position.

    The best one is the lowest id among equals, whatever order a GPU reduces in: the maximum first, then the least id
    that has it. Others come from a sort, whose order among equals is the library's.

    Args:
        kernels: of the device.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def best(self, logits: Any, count: int, everything: Callable[[], NDArray[np.float32]]) -> Candidates:
        """The best tokens.

        Args:
            logits: a value (batch, 1, vocab) on the device.
            count: how many a row.
            everything: fetches the logits (batch, vocab).

        Raises:
            BackendError: the library failed.
        """
        dtype = logits.data_type()[len("tensor(") : -1]
        dtype, vocab = _INPUTS.get(dtype, dtype), int(logits.shape()[-1])
        key = ("best", dtype, str(vocab), str(count))
        graph = None if self._kernels.knows(key) else choosing_graph(dtype, vocab, count)
        outputs = dict.fromkeys(("ids", "values", "sum"))
        ids, values, total = self._kernels.run(key, graph, {"logits": logits}, outputs)
        values = values[:, 0].copy()
        values[np.isnan(total[:, 0, 0])] = np.nan  # a NaN anywhere shows in the sum, and hides from a maximum
        return Candidates(ids[:, 0], values, everything)
