"""Choosing tokens by an engine, on the logits of the step's own engine: a few numbers a row come back from the GPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.cuda_memory import Cuda, DeviceArray
from edgellm_runtime.backends.tensorrt_library import Engine
from edgellm_runtime.errors import BackendError
from edgellm_runtime.graphs.token_choice import LOGITS, RESULTS
from edgellm_runtime.state.storage import host_dtype

__all__ = ["Choice", "check_chooser"]

_ALIGNMENT = 256  # bytes; what TensorRT asks of an address


class Choice:
    """Where a chooser puts what it chose, in one piece, so that it comes back in one copy.

    Args:
        cuda: the GPU.
        engine: the chooser.
        count: how many tokens of a row it chooses.
        logits: (batch, 1, vocab), which it reads.
    """

    def __init__(self, cuda: Cuda, engine: Engine, count: int, logits: DeviceArray) -> None:
        self.engine, self._cuda, self._logits = engine, cuda, logits
        batch = logits.shape[0]
        self._shapes = {"ids": (batch, 1, count), "values": (batch, 1, count), "sum": (batch, 1, 1)}
        self._starts, total = dict[str, int](), 0
        for name, shape in self._shapes.items():
            self._starts[name] = total
            nbytes = int(np.prod(shape)) * host_dtype(RESULTS[name]).itemsize
            total += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._whole = cuda.empty((total,), "uint8")

    def place(self) -> bool:
        """Tell the engine's context, which all bindings share; whether a shape is another than before."""
        for name, start in self._starts.items():
            self.engine.bind(name, self._whole.pointer + start, self._shapes[name])
        return self.engine.bind(LOGITS, self._logits.pointer, self._logits.shape)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and logits (batch, count) of the last step, the latter NaN where a row's logits hold one."""
        whole = self._cuda.download(self._whole)
        ids, values, total = (
            np.frombuffer(whole, host_dtype(RESULTS[name]), int(np.prod(shape)), self._starts[name]).reshape(shape)
            for name, shape in self._shapes.items()
        )
        found = values[:, 0].copy()
        found[np.isnan(total[:, 0, 0])] = np.nan  # a NaN anywhere shows in the sum, and hides from a maximum
        return ids[:, 0].copy(), found


def check_chooser(engine: Engine, vocab: int, count: int, most: int) -> None:
    """Compare a chooser's tensors with what it must be, so that it writes no further than its buffers.

    Args:
        engine: loaded.
        vocab: how many logits a row.
        count: how many tokens it must choose.
        most: rows of a step.

    Raises:
        BackendError: it is another one.
    """
    shapes = {LOGITS: (-1, 1, vocab), "ids": (-1, 1, count), "values": (-1, 1, count), "sum": (-1, 1, 1)}
    dtypes = {LOGITS: "float32", **RESULTS}
    if engine.inputs != {LOGITS} or engine.shapes != shapes or engine.dtypes != dtypes:
        raise BackendError(f"{engine.file}: does not choose {count} of {vocab} tokens; build the engine again")
    if not (engine.fits(LOGITS, (1, 1, vocab)) and engine.fits(LOGITS, (most, 1, vocab))):
        raise BackendError(
            f"{engine.file}: chooses for other numbers of rows than 1 to {most}, which the decode engine takes; build "
            "the engine again"
        )
