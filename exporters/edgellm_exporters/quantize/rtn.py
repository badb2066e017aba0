"""Round to nearest: the largest weight of a block sets its scale. No calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.quantize.plan import Codes, Scheme

__all__ = ["round_to_nearest"]


def round_to_nearest(weight: NDArray[np.float32], scheme: Scheme) -> Codes:
    """Quantize each block of a row on its own.

    Args:
        weight: (rows, columns); columns divide into blocks.
        scheme: bits and block size.

    Returns:
        Codes in [-(2^(bits-1) - 1), 2^(bits-1) - 1] and their scales.
    """
    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // scheme.block, scheme.block)
    top = 2 ** (scheme.bits - 1) - 1
    scales = np.abs(blocks).max(axis=2) / top  # (rows, blocks)
    safe = np.where(scales == 0, 1, scales)  # a block of zeros has codes of zero, whatever its scale
    codes = np.clip(np.rint(blocks / safe[:, :, None]), -top, top)
    return Codes(codes.astype(np.int8).reshape(rows, columns), safe.astype(np.float32))
