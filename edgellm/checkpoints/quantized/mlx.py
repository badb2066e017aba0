"""MLX's layout: code * scale + bias.

``weight`` is (rows, columns * bits / 32), codes of a row packed along the words, ``scales`` and ``biases`` are (rows,
groups).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.checkpoints.quantized.packing import as_float, unpacked, words_of
from edgellm.checkpoints.quantized.settings import Settings, check_settings, refused
from edgellm.checkpoints.quantized.source import PackedWeight, RawSource, Rows, part
from edgellm.errors import CheckpointError

__all__ = ["find_mlx"]

_ALLOWED = {"bits": (4, 2, 3, 5, 6, 8), "mode": ("affine",)}


def find_mlx(stored: RawSource, settings: Settings) -> tuple[dict[str, PackedWeight], frozenset[str], str]:
    """The weights in such a checkpoint, the tensors that mean nothing, and the method in words.

    Raises:
        CheckpointError: a setting that is not known, or tensors that do not belong together.
    """
    own = {name: value for name, value in settings.items() if isinstance(value, (dict, bool))}  # of single modules
    general = {name: value for name, value in settings.items() if name not in own}
    check_settings(general, _ALLOWED, {"group_size", "quant_method"})
    found = {}
    for name in stored.shapes:
        if name.endswith(".scales") and f"{name.removesuffix('.scales')}.biases" in stored.shapes:
            module = name.removesuffix(".scales")
            mine = own.get(module)
            if isinstance(mine, dict):
                check_settings(mine, _ALLOWED, {"group_size"})
            found[f"{module}.weight"] = _weight(stored, module, {**general, **(mine if isinstance(mine, dict) else {})})
    return found, frozenset(), f"MLX, {general.get('bits', 4)} bits, groups of {general.get('group_size', 64)}"


def _weight(stored: RawSource, module: str, settings: dict[str, Any]) -> PackedWeight:
    names = [f"{module}.{name}" for name in ("weight", "scales", "biases")]
    packed, scales, biases = (part(stored, name) for name in names)
    bits, group = settings.get("bits", 4), settings.get("group_size", 64)
    if type(group) is not int or group < 1:
        raise refused("group_size", group, ", which is no number of weights")
    columns = scales[-1] * group if scales else 0
    if len(packed) != 2 or scales != biases or packed != (scales[0], columns * bits // 32):
        raise CheckpointError(
            f"tensors {names[0]} {packed}, {names[1]} {scales} and {names[2]} {biases} do not make a weight of {bits} "
            f"bits in groups of {group}; copy the checkpoint again"
        )

    def floats(rows: Rows) -> Tensor:
        codes = unpacked(words_of(stored.raw(names[0], rows)), bits, columns).astype(np.float32)
        scale, bias = (np.repeat(as_float(stored.raw(name, rows)), group, axis=1) for name in names[1:])
        return torch.from_numpy(codes * scale + bias)

    return PackedWeight(shape=(packed[0], columns), parts=tuple(names), floats=floats)
