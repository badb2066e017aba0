"""MXFP4, as gpt-oss has its experts: 4-bit floats (E2M1) with a power of two for each 32 of them.

``NAME_blocks`` (experts, rows, groups, 16) holds two numbers in a byte, the first in the lower bits; ``NAME_scales``
(experts, rows, groups) is the exponent plus 127. The float tensor ``NAME`` is (experts, columns, rows).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgellm.checkpoints.quantized.settings import Settings, check_settings
from edgellm.checkpoints.quantized.source import PackedWeight, RawSource, Rows, part
from edgellm.errors import CheckpointError

__all__ = ["find_mxfp4"]

_HALVES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
_VALUES = np.concatenate([_HALVES, -_HALVES])
_BYTES, _BIAS = 16, 127


def find_mxfp4(stored: RawSource, settings: Settings) -> tuple[dict[str, PackedWeight], frozenset[str], str]:
    """The weights in such a checkpoint, the tensors that mean nothing, and the method in words.

    Raises:
        CheckpointError: a setting that is not known, or tensors that do not belong together.
    """
    check_settings(settings, {}, {"quant_method", "modules_to_not_convert", "dequantize"})
    names = [name.removesuffix("_blocks") for name in stored.shapes if name.endswith("_blocks")]
    return {name: _weight(stored, name) for name in names}, frozenset(), "MXFP4, groups of 32"


def _weight(stored: RawSource, name: str) -> PackedWeight:
    blocks, scales = part(stored, f"{name}_blocks"), part(stored, f"{name}_scales")
    if len(blocks) != 4 or blocks[-1] != _BYTES or scales != blocks[:-1]:
        raise CheckpointError(f"tensors {name}_blocks {blocks} and _scales {scales} make no weight; copy it again")
    experts, rows, groups, _ = blocks

    def floats(some: Rows) -> Tensor:
        packed = stored.raw(f"{name}_blocks", some).numpy()
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * _BYTES)
        powers = stored.raw(f"{name}_scales", some).numpy().astype(np.int32) - _BIAS
        wide = np.ldexp(_VALUES[codes], powers[..., None]).reshape(len(packed), rows, -1)
        return torch.from_numpy(wide).transpose(1, 2).contiguous()

    return PackedWeight(
        shape=(experts, groups * 2 * _BYTES, rows), parts=(f"{name}_blocks", f"{name}_scales"), floats=floats
    )
