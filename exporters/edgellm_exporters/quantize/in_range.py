"""Weights that scales in 16 bits hold: others are refused by name, before their codes are nonsense."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.errors import QuantizeError

__all__ = ["in_range"]

_LARGEST = 65504.0  # float16's: no format's scale is larger than its largest weight


def in_range(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weight itself, some rows or all, about to be quantized.

    Args:
        name: for the message.
        weight: as smoothed.

    Raises:
        QuantizeError: it has numbers that are not finite or too large.
    """
    largest = max(float(weight.max(initial=0)), -float(weight.min(initial=0)))  # NaN, if one is; no copy is made
    if not np.isfinite(largest):
        raise QuantizeError(f"{name} holds NaN or infinite weights; train or download the checkpoint again")
    if largest > _LARGEST:
        raise QuantizeError(
            f"{name} holds weights of up to {largest:.3g}, and scales are float16, which ends at {_LARGEST:.0f}; leave "
            "the model's weights floats, with --quantize none"
        )
    return weight
