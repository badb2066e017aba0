"""Which method a checkpoint was quantized by, from what its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgellm.checkpoints.files import read_json
from edgellm.checkpoints.quantized.awq import find_awq
from edgellm.checkpoints.quantized.bitsandbytes import find_bitsandbytes
from edgellm.checkpoints.quantized.compressed_tensors import find_compressed_tensors
from edgellm.checkpoints.quantized.fp8 import find_fp8
from edgellm.checkpoints.quantized.gptq import find_gptq
from edgellm.checkpoints.quantized.mlx import find_mlx
from edgellm.checkpoints.quantized.mxfp4 import find_mxfp4
from edgellm.checkpoints.quantized.source import PackedWeight, QuantizedSource, RawSource
from edgellm.errors import CheckpointError

__all__ = ["KEYS", "Dequantized", "dequantized"]

KEYS = ("quantization_config", "quantization", "compression_config")  # of a config.json
_Find = Callable[[RawSource, Mapping[str, Any]], tuple[dict[str, PackedWeight], frozenset[str], str]]
_METHODS: Mapping[str, _Find] = {
    "gptq": find_gptq,
    "awq": find_awq,
    "compressed-tensors": find_compressed_tensors,
    "fp8": find_fp8,
    "fbgemm_fp8": find_fp8,
    "bitsandbytes": find_bitsandbytes,
    "mxfp4": find_mxfp4,
}
_OLDER: Mapping[str, str] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_AUTO_ROUND: Mapping[str, str] = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


class Dequantized(NamedTuple):
    """A quantized checkpoint's tensors as floats, the method in words, and a note on it."""

    source: QuantizedSource
    method: str
    note: str


def dequantized(
    config: Mapping[str, Any], stored: RawSource, folder: Path | None = None
) -> Dequantized | None:  # fmt: skip
    """Read a checkpoint's tensors as floats where it was quantized; None where it was not.

    Args:
        config: its ``config.json``.
        stored: what its files hold.
        folder: where older tools put the settings in a file of their own.

    Raises:
        CheckpointError: a method or a setting that is not known, or tensors that do not belong together.
    """
    settings = next((config[key] for key in KEYS if config.get(key)), None)
    if settings is None and folder is not None:
        settings = _beside(folder)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"quantization_config is {settings!r}, which says nothing; copy the checkpoint again")
    weights, ignored, method = _method(settings)(stored, settings)
    if not weights:
        raise CheckpointError(f"quantization_config says {method}, but no tensor is stored so; remove it if none is")
    count = f"{len(weights)} matrices are" if len(weights) > 1 else "1 matrix is"
    note = f"{count} stored as {method}, and read as the floats that this stands for"
    return Dequantized(QuantizedSource(stored, weights, ignored), method, note)


def _beside(folder: Path) -> dict[str, Any] | None:
    """The settings in a file of their own, which says no method's name."""
    for name, method in _OLDER.items():
        if (folder / name).exists():
            return {"quant_method": method, **read_json(folder / name)}
    return None


def _method(settings: Mapping[str, Any]) -> _Find:
    name = settings.get("quant_method")
    if name is None and {"group_size", "bits"} <= settings.keys():
        return find_mlx  # which writes no name
    if name == "auto-round":
        name = _AUTO_ROUND.get(settings.get("packing_format", ""), name)
    if not isinstance(name, str) or name not in _METHODS:
        kind = (
            f"{name!r}" if name != "auto-round" else f"{name!r} with packing_format {settings.get('packing_format')!r}"
        )
        raise CheckpointError(
            f"quantization_config has quant_method {kind}; edgellm reads {', '.join(_METHODS)}, auto-round as "
            f"{' or '.join(_AUTO_ROUND)}, and MLX; use the model with its float weights"
        )
    return _METHODS[name]
