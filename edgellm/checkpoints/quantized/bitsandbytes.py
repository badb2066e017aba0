"""bitsandbytes' layouts: 4 bits by a table (NF4, FP4), and 8 bits with one scale a row.

Of 4 bits, ``weight`` holds two numbers of the flat weight in a byte, the first in the higher bits; each is looked up in
``weight.quant_map`` and multiplied by ``weight.absmax`` of its block; that may be 8 bits itself, looked up in
``weight.nested_quant_map``, times ``weight.nested_absmax``, plus an offset. What else there is to know is JSON in
``weight.quant_state.bitsandbytes__nf4`` or ``__fp4``. Of 8 bits, ``weight`` is times ``SCB`` / 127.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.checkpoints.quantized.packing import as_float
from edgellm.checkpoints.quantized.settings import Settings, check_settings
from edgellm.checkpoints.quantized.source import PackedWeight, RawSource, Rows, part
from edgellm.codes import CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["find_bitsandbytes"]

_STATE = ".quant_state.bitsandbytes__"
_MOST_BYTES = 1 << 16  # of a state's JSON
_METADATA = {
    "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "llm_int8_threshold",
    "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
}  # fmt: skip
_ALLOWED = {"bnb_4bit_quant_type": ("nf4", "fp4"), "bnb_4bit_quant_storage": ("uint8",)}


def find_bitsandbytes(stored: RawSource, settings: Settings) -> tuple[dict[str, PackedWeight], frozenset[str], str]:
    """The weights in such a checkpoint, the tensors that mean nothing, and the method in words.

    Raises:
        CheckpointError: a setting that is not known, or tensors that do not belong together.
    """
    check_settings(settings, _ALLOWED, _METADATA)
    found, told = {}, set[str]()
    for name in stored.shapes:
        if _STATE in name:
            weight, _, kind = name.partition(_STATE)
            found[weight] = _four(stored, weight, name)
            told.add({"nf4": "NF4", "fp4": "FP4"}.get(kind, kind))
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            found[weight] = _eight(stored, weight, name)
            told.add("8 bits, rows")
    ignored = frozenset(name for name in stored.shapes if name.endswith(".weight_format"))
    return found, ignored, f"bitsandbytes, {' and '.join(sorted(told)) or 'no weight'}"


def _eight(stored: RawSource, name: str, scales: str) -> PackedWeight:
    shape, count = part(stored, name), part(stored, scales)
    if len(shape) != 2 or math.prod(count) != shape[0] or stored.dtype_of(name) != "I8":
        raise CheckpointError(f"tensors {name} {shape} and {scales} {count} do not make a weight; copy it again")

    def form() -> CodeFormat:
        return CodeFormat(8, shape[1], symmetric=True)

    def codes(rows: Rows) -> StoredCodes:
        scale = as_float(stored.raw(scales)).reshape(-1, 1)[slice(*rows) if rows else slice(None)] / np.float32(127)
        found = (stored.raw(name, rows).numpy().astype(np.int16) + 128).astype(np.uint8)
        return StoredCodes(form(), found, scale, np.full(scale.shape, 128, np.uint8))

    return PackedWeight(shape=shape, parts=(name, scales), codes=codes, format=form)


def _four(stored: RawSource, name: str, state: str) -> PackedWeight:
    about = _state(stored, state)
    shape = about["shape"]
    parts = [state, *(f"{name}.{end}" for end in ("absmax", "quant_map"))]
    if "nested_blocksize" in about:
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    sizes = {end.removeprefix(f"{name}."): math.prod(part(stored, end)) for end in parts[1:]}
    size, blocks = math.prod(shape), -(-math.prod(shape) // about["blocksize"])
    wanted = {"absmax": blocks, "quant_map": 16}
    if "nested_blocksize" in about:
        wanted |= {"nested_absmax": -(-blocks // about["nested_blocksize"]), "nested_quant_map": 256}
    if math.prod(part(stored, name)) != -(-size // 2) or sizes != wanted or stored.dtype_of(name) != "U8":
        raise CheckpointError(f"tensor {name} and what stands beside it do not make a weight {shape}; copy it again")

    def floats(rows: Rows) -> Tensor:
        packed = stored.raw(name).flatten().numpy()
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:size]
        table = as_float(stored.raw(f"{name}.quant_map"))
        wide = table[codes] * np.repeat(_largest(stored, name, about), about["blocksize"])[:size]
        return torch.from_numpy(wide.reshape(shape))[slice(*rows) if rows else slice(None)]

    return PackedWeight(shape=shape, parts=(name, *parts), floats=floats)


def _largest(stored: RawSource, name: str, about: dict[str, Any]) -> Any:
    """The largest magnitude of each block."""
    absmax = stored.raw(f"{name}.absmax").flatten()
    if "nested_blocksize" not in about:
        return as_float(absmax)
    table, outer = (as_float(stored.raw(f"{name}.nested_{end}").flatten()) for end in ("quant_map", "absmax"))
    spread = np.repeat(outer, about["nested_blocksize"])[: len(absmax)]
    return (table[absmax.numpy()] * spread + np.float32(about["nested_offset"])).astype(np.float32)


def _state(stored: RawSource, name: str) -> dict[str, Any]:
    """What the JSON beside a weight says: ``shape``, ``blocksize``, and of nested scales their block and offset."""
    wrong = f"tensor {name} does not say how its weight is stored; copy the checkpoint again"
    if len(stored.shapes[name]) != 1 or stored.shapes[name][0] > _MOST_BYTES or stored.dtype_of(name) != "U8":
        raise CheckpointError(wrong)
    try:
        said = json.loads(bytes(stored.raw(name).tolist()))
        shape = tuple(int(n) for n in said["shape"])
        found: dict[str, Any] = {"shape": shape, "blocksize": int(said["blocksize"])}
        if "nested_blocksize" in said:
            found |= {"nested_blocksize": int(said["nested_blocksize"]), "nested_offset": float(said["nested_offset"])}
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise CheckpointError(wrong) from error
    if len(shape) != 2 or min(*shape, found["blocksize"], found.get("nested_blocksize", 1)) < 1:
        raise CheckpointError(wrong)
    return found
