"""Formats that hold weights as they are: a checkpoint that was quantized before is not rounded a second time.

What is stored as whole numbers with scales has its codes taken over (``stored.py``); this is for the others. GGUF's
Q4_0 and Q8_0 are held without loss; Q4_1 and the K-quants, whose minimum or scale is a product, nearly so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgellm_exporters.quantize.plan import Scheme
from edgellm_exporters.quantize.rtn import round_to_nearest

__all__ = ["TOLERANCE", "smallest_holding"]

TOLERANCE = 0.01  # root mean square error against the weight's own; 4-bit rounding of free weights is above 0.05
_SAMPLE_ROWS = 64
_LADDER = (
    Scheme(4, 32),
    Scheme(4, 32, symmetric=False),
    Scheme(4, 32, symmetric=False, shifted=True),
    Scheme(8, 32),
    Scheme(8, 16),
)


def smallest_holding(
    tensors: Mapping[str, ir.TensorProtocol],
    ends: set[str],
    progress: Callable[[float], None],
    *,
    narrow: Collection[str] = (),
) -> dict[str, Scheme]:
    """The smallest format for each weight that changes it by no more than :data:`TOLERANCE`.

    Args:
        tensors: matrices by name; some rows of each are tried.
        ends: those that rows are looked up in, which shifted formats are not for.
        progress: told the share that is done.
        narrow: those whose formats have scales of 8 bits where they can.
    """
    found: dict[str, Scheme] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        sample = _sample(tensor)
        for wide in _LADDER:
            scheme = wide.narrow if name in narrow else wide
            if sample.shape[1] % scheme.block == 0 and not (scheme.shifted and name in ends) and _holds(sample, scheme):
                found[name] = scheme
                break
        progress((number + 1) / len(tensors))
    return found


def _sample(tensor: ir.TensorProtocol) -> NDArray[np.float32]:
    """Rows at equal distances; of a weight that can be read by rows, no others are read."""
    step = max(1, tensor.shape.numpy()[0] // _SAMPLE_ROWS)
    rows_of = getattr(tensor, "rows", None)
    if rows_of is None:
        return np.asarray(tensor.numpy()[::step], dtype=np.float32)
    places = range(0, tensor.shape.numpy()[0], step)
    return np.concatenate([np.asarray(rows_of(place, place + 1), dtype=np.float32) for place in places])


def _holds(weight: NDArray[np.float32], scheme: Scheme) -> bool:
    error = round_to_nearest(weight, scheme).dequantize() - weight
    return bool(np.sqrt((error**2).mean()) <= TOLERANCE * np.sqrt((weight**2).mean()))
