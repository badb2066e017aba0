"""The layouts of compressed-tensors, as llm-compressor writes them: packed whole numbers, plain ones, 8-bit floats.

``pack-quantized``: ``weight_packed`` (rows, columns * bits / 32), codes of a row packed along the words, stored plus
the middle code; ``weight_scale`` (rows, groups), ``weight_shape``, and of asymmetric weights ``weight_zero_point``,
packed down the rows. ``int-quantized``, ``float-quantized`` and ``naive-quantized``: ``weight`` in 8 bits,
``weight_scale`` for all of it, for rows, groups or blocks, and ``weight_zero_point``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgellm.checkpoints.quantized.blocks import Block, block_of, scaled
from edgellm.checkpoints.quantized.fp8 import rectangle
from edgellm.checkpoints.quantized.packing import as_float, unpacked, words_of
from edgellm.checkpoints.quantized.settings import Settings, check_settings, refused
from edgellm.checkpoints.quantized.source import PackedWeight, RawSource, Rows, part
from edgellm.codes import CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["find_compressed_tensors"]

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_ALLOWED = {"format": _FORMATS}
_METADATA = {
    "quant_method", "config_groups", "ignore", "quantization_status", "global_compression_ratio", "kv_cache_scheme",
    "version", "run_compressed", "dequantize",
}  # fmt: skip
# What layers read and what a cache holds is rounded by their kernels; here it is not.
_READ = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale",
    ".k_zero_point", ".v_zero_point", ".q_zero_point",
)  # fmt: skip


def find_compressed_tensors(
    stored: RawSource, settings: Settings
) -> tuple[dict[str, PackedWeight], frozenset[str], str]:
    """The weights in such a checkpoint, the tensors that mean nothing, and the method in words.

    Raises:
        CheckpointError: a setting that is not known, or tensors that do not belong together.
    """
    sparsity = settings.get("sparsity_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    check_settings({k: v for k, v in settings.items() if not (k == "sparsity_config" and dense)}, _ALLOWED, _METADATA)
    schemes = _schemes(settings)
    rectangles = [rectangle("block_structure", scheme.get("block_structure")) for scheme in schemes]
    found: dict[str, PackedWeight] = {}
    for name in stored.shapes:
        module = name.rpartition(".")[0]
        if name.endswith(".weight_packed"):
            found[f"{module}.weight"] = _packed(stored, module, schemes)
        elif name.endswith(".weight_scale") and f"{module}.weight" in stored.shapes:
            found[f"{module}.weight"] = _plain(stored, module, next((r for r in rectangles if r), None))
    ignored = frozenset(name for name in stored.shapes if name.endswith(_READ))
    return found, ignored, f"compressed-tensors, {_told(schemes)}"


def _schemes(settings: Settings) -> list[Mapping[str, Any]]:
    """What config_groups say of weights, in order."""
    found: list[Mapping[str, Any]] = []
    groups = settings.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        own = group.get("format") if isinstance(group, dict) else None
        if own not in (None, *_FORMATS):
            raise refused(f"config_groups.{name}.format", own, f"; edgellm reads {', '.join(_FORMATS)}")
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            if weights.get("type", "int") not in ("int", "float") or type(weights.get("num_bits")) is not int:
                raise refused(f"config_groups.{name}.weights", weights, ", which edgellm does not know")
            found.append(weights)
    if not found:
        raise refused("config_groups", groups, ", which say nothing of weights")
    return found


def _told(schemes: list[Mapping[str, Any]]) -> str:
    told = []
    for scheme in schemes:
        size = scheme.get("group_size")
        form = f"{scheme['num_bits']} bits{' of float' if scheme.get('type') == 'float' else ''}"
        told.append(f"{form}, {f'groups of {size}' if size and size > 0 else scheme.get('strategy') or 'rows'}")
    return " and ".join(dict.fromkeys(told))


def _packed(stored: RawSource, module: str, schemes: list[Mapping[str, Any]]) -> PackedWeight:
    names = {name: f"{module}.weight_{name}" for name in ("packed", "scale", "shape", "zero_point", "g_idx")}
    packed, scale = part(stored, names["packed"]), part(stored, names["scale"])
    part(stored, names["shape"])
    said = tuple(stored.raw(names["shape"]).flatten().tolist())
    fitting = [
        (scheme["num_bits"], group)
        for scheme in schemes
        for group in ([_group(scheme, said[1])] if len(said) == 2 else [])
        if packed == (said[0], -(-said[1] * scheme["num_bits"] // 32)) and scale == (said[0], -(-said[1] // group))
    ]
    if not fitting:
        raise CheckpointError(
            f"tensors {names['packed']} {packed}, {names['scale']} {scale} and a shape of {said} do not make a weight "
            f"of {_told(schemes)}; copy the checkpoint again"
        )
    (bits, group), (rows, columns), groups = fitting[0], said, scale[1]
    middle = 2 ** (bits - 1)

    def zeros() -> NDArray[np.uint8]:
        if names["zero_point"] not in stored.shapes:
            return np.full(scale, middle, np.uint8)
        found = stored.raw(names["zero_point"])
        if found.dtype == torch.int32:  # packed down the rows
            return np.ascontiguousarray(unpacked(np.ascontiguousarray(words_of(found).T), bits, rows).T)
        plain: NDArray[np.uint8] = (found.numpy().astype(np.int16) + middle).astype(np.uint8).reshape(scale)
        return plain

    def order() -> NDArray[np.int64] | None:
        if names["g_idx"] not in stored.shapes:
            return None
        found: NDArray[np.int64] = stored.raw(names["g_idx"]).numpy().astype(np.int64)
        if found.shape != (columns,) or found.min() < 0 or found.max() >= groups:
            raise CheckpointError(
                f"tensor {names['g_idx']} names a group outside the {groups} there are; copy it again"
            )
        return None if (found == np.arange(columns) // group).all() else found

    def form() -> CodeFormat:
        return CodeFormat(bits, group, bool((zeros() == middle).all()), order())

    def codes(some: Rows) -> StoredCodes:
        cut = slice(*some) if some else slice(None)
        found = unpacked(words_of(stored.raw(names["packed"], some)), bits, columns)
        return StoredCodes(form(), found, as_float(stored.raw(names["scale"], some)), zeros()[cut])

    parts = tuple(name for name in names.values() if name in stored.shapes)
    return PackedWeight(shape=(rows, columns), parts=parts, codes=codes, format=form)


def _group(scheme: Mapping[str, Any], columns: int) -> int:
    size = scheme.get("group_size")
    return size if type(size) is int and size > 0 else max(columns, 1)


def _plain(stored: RawSource, module: str, said: Block | None) -> PackedWeight:
    """8 bits, one code in a byte."""
    name, scale_name, zero_name = (f"{module}.weight{suffix}" for suffix in ("", "_scale", "_zero_point"))
    shape, scale = stored.shapes[name], part(stored, scale_name)
    parts = (name, scale_name, *((zero_name,) if zero_name in stored.shapes else ()))
    block = block_of(name, shape, scale, said)

    def floats(some: Rows) -> Tensor:
        zero = stored.raw(zero_name) if zero_name in stored.shapes else None
        return scaled(stored.raw(name, some), stored.raw(scale_name), block, some[0] if some else 0, zero)

    if scale not in ((shape[0], 1), (shape[0], shape[1] // block[1])) or stored.dtype_of(name) != "I8":
        return PackedWeight(shape=shape, parts=parts, floats=floats)

    def zeros() -> NDArray[np.uint8]:
        if zero_name not in stored.shapes:
            return np.full(scale, 128, np.uint8)
        found: NDArray[np.uint8] = (stored.raw(zero_name).numpy().astype(np.int16) + 128).astype(np.uint8)
        return found.reshape(scale)

    def form() -> CodeFormat:
        return CodeFormat(8, shape[1] // scale[1], bool((zeros() == 128).all()))

    def codes(some: Rows) -> StoredCodes:
        cut = slice(*some) if some else slice(None)
        found = (stored.raw(name, some).numpy().astype(np.int16) + 128).astype(np.uint8)
        return StoredCodes(form(), found, as_float(stored.raw(scale_name, some)), zeros()[cut])

    return PackedWeight(shape=shape, parts=parts, codes=codes, format=form)
