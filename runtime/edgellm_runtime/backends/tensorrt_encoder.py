"""The encoder of a model that answers sources, as an engine: run once for each source, outside of what is recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.cuda_memory import Cuda, DeviceArray
from edgellm_runtime.backends.tensorrt_library import Engine
from edgellm_runtime.errors import BackendError, StateError
from edgellm_runtime.spec import SOURCE, Signature, StateSpec
from edgellm_runtime.state import State

__all__ = ["EncoderEngine", "check_encoder", "row_shape"]

_FREE = -1  # a size that an engine takes a range of


class EncoderEngine:
    """Reads sources into the states that steps read.

    Args:
        cuda: the GPU.
        engine: one that :func:`check_encoder` lets pass.
        signature: of the model.
    """

    def __init__(self, cuda: Cuda, engine: Engine, signature: Signature) -> None:
        self.engine, self._cuda, self._signature = engine, cuda, signature

    def run(self, source: NDArray[np.int64], lengths: NDArray[np.int32], state: State) -> None:
        """Write what the encoder makes of sources into a state's memory on the GPU; arguments as ``Backend.encode``.

        Raises:
            BackendError: the library failed, or the GPU has no memory left.
            StateError: more rows, or longer sources, than the engine was built for.
        """
        if not self.engine.fits("source", source.shape):
            rows, tokens = self.engine.profile["source"][2]
            raise StateError(
                f"{source.shape[0]} sources of {source.shape[1]} tokens, but the encode engine was built for up to "
                f"{rows} of {tokens}; use fewer rows, or export the model again with --max-batch {source.shape[0]}"
            )
        given: dict[str, NDArray[Any]] = {"source": source, "source_lengths": lengths}
        made = [spec for spec in state.specs if spec.encoded]
        places: dict[str, DeviceArray] = {spec.present_name: state.tensors[spec.name] for spec in made}
        for spec in self._signature.encoder.inputs:
            if spec.name in self.engine.inputs:
                places[spec.name] = self._cuda.empty(given[spec.name].shape, spec.dtype)
                self._cuda.upload(places[spec.name], given[spec.name])
        for name, array in places.items():
            self.engine.bind(name, array.pointer, array.shape)
        self.engine.enqueue(self._cuda.stream)
        self._cuda.wait()  # the inputs' memory is given back now, and what fails is told here


def row_shape(spec: StateSpec, capacity: int) -> tuple[int, ...]:
    """The sizes of one row of a state in an engine, whose sources have any length."""
    shape = spec.resolve(1, capacity)
    return tuple(_FREE if spec.encoded and spec.shape[axis] == SOURCE else shape[axis] for axis in range(1, len(shape)))


def check_encoder(engine: Engine, signature: Signature, max_source: int) -> None:
    """Compare an encoder's engine with the signature, so that no address is given for something else.

    Raises:
        BackendError: it differs, or takes shorter sources than the model.
    """
    own = signature.encoder
    wanted = {t.name: t.dtype for t in (*own.inputs, *own.outputs)}
    wrong = {name for name, dtype in engine.dtypes.items() if wanted.get(name) != dtype}
    outputs = {t.name for t in own.outputs}
    odd = sorted(wrong | (engine.inputs - {t.name for t in own.inputs}) | (engine.outputs ^ outputs))
    if odd or "source" not in engine.inputs:
        raise BackendError(
            f"{engine.file}: {odd[:3] or 'source'} differ from the manifest's signature; build the engine again"
        )
    for spec in signature.encoded:
        if (found := engine.shapes[spec.present_name][1:]) != (expected := row_shape(spec, 1)):
            raise BackendError(
                f"{engine.file}: {spec.present_name} has {list(found)} for each row, the manifest says "
                f"{list(expected)}; build the engine again"
            )
    if not engine.fits("source", (1, max_source)) or not engine.fits("source", (1, 1)):
        raise BackendError(
            f"{engine.file}: was built for sources of {engine.profile['source'][0][1]} to "
            f"{engine.profile['source'][2][1]} tokens, the manifest says 1 to {max_source}; build the engine again"
        )
