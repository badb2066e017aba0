"""8-bit floats (E4M3): with a scale for each rectangle, as DeepSeek's checkpoints have it, for each row, or for all.

``weight`` in 8 bits, and ``weight_scale_inv`` or ``weight_scale``, by which it is multiplied.
"""

from __future__ import annotations

from torch import Tensor

from edgellm.checkpoints.quantized.blocks import Block, block_of, scaled
from edgellm.checkpoints.quantized.settings import Settings, check_settings, refused
from edgellm.checkpoints.quantized.source import PackedWeight, RawSource, Rows, part

__all__ = ["find_fp8", "rectangle"]

_METADATA = {
    "quant_method", "modules_to_not_convert", "modules_to_convert", "weight_block_size", "activation_scheme",
    "dequantize", "activation_scale_ub", "ignored_layers", "kv_cache_scheme",
}  # fmt: skip
_ALLOWED = {"fmt": ("e4m3",), "scale_fmt": ("float", "ue8m0", None), "expert_dtype": ("fp8",)}
_SCALES = (".weight_scale_inv", ".weight_scale")
_READ = (".activation_scale", ".input_scale", ".input_scale_ub", ".k_scale", ".v_scale")


def find_fp8(stored: RawSource, settings: Settings) -> tuple[dict[str, PackedWeight], frozenset[str], str]:
    """The weights in such a checkpoint, the tensors that mean nothing, and the method in words.

    Raises:
        CheckpointError: a setting that is not known, or tensors that do not belong together.
    """
    check_settings(settings, _ALLOWED, _METADATA)
    said = rectangle("weight_block_size", settings.get("weight_block_size"))
    found = {}
    for name in stored.shapes:
        for suffix in _SCALES:
            if name.endswith(suffix):
                weight = f"{name.removesuffix(suffix)}.weight"
                found[weight] = _weight(stored, weight, name, said)
    ignored = frozenset(name for name in stored.shapes if name.endswith(_READ))
    where = f"rectangles of {said[0]} by {said[1]}" if said else "a scale for rows or all"
    return found, ignored, f"8-bit floats, {where}"


def _weight(stored: RawSource, name: str, scales: str, said: Block | None) -> PackedWeight:
    shape = part(stored, name)
    block = block_of(name, shape, stored.shapes[scales], said)

    def floats(rows: Rows) -> Tensor:
        return scaled(stored.raw(name, rows), stored.raw(scales), block, rows[0] if rows else 0)

    return PackedWeight(shape=shape, parts=(name, scales), floats=floats)


def rectangle(name: str, value: object) -> Block | None:
    """Rows and columns that share a scale, as a configuration says them.

    Raises:
        CheckpointError: it says something else.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or any(type(n) is not int or n < 1 for n in value):
        raise refused(name, value, ", which are not rows and columns")
    return value[0], value[1]
