"""GPTQ's layout, as AutoGPTQ, GPTQModel and AutoRound write it.

Of a weight (rows, columns) ``qweight`` is (columns * bits / 32, rows), codes of a column packed down the words, the
first in the lowest bits; ``qzeros`` (groups, rows * bits / 32) and ``scales`` (groups, rows); ``g_idx`` (columns) is
the group of each column. In the older of two formats each zero is stored less one, as one sum over a whole word.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoints.quantized.packing import as_float, unpacked, words_of
from edgellm.checkpoints.quantized.settings import Settings, check_settings
from edgellm.checkpoints.quantized.source import PackedWeight, RawSource, Rows, part
from edgellm.codes import CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["find_gptq"]

_METADATA = {
    "quant_method", "group_size", "desc_act", "sym", "true_sequential", "static_groups", "damp_percent", "lm_head",
    "meta", "model_name_or_path", "model_file_base_name", "tokenizer", "dataset", "batch_size", "pad_token_id",
    "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize",
    "use_cuda_fp16", "use_exllama", "exllama_config", "max_input_length", "cache_block_outputs", "disable_exllama",
    "backend", "act_group_aware", "damp_auto_increment", "mse", "mock_quantization", "dynamic", "parallel_packing",
    "offload_to_disk", "offload_to_disk_path", "pack_impl", "fail_safe", "gptaq", "hyb_act", "v2", "device",
    # of AutoRound
    "iters", "nsamples", "seqlen", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input",
    "gradient_accumulate_steps", "lr", "minmax_lr", "low_gpu_mem_usage", "autoround_version", "data_type", "amp",
    "scale_dtype", "to_quant_block_names", "super_bits", "super_group_size", "weight_format",
}  # fmt: skip
_ALLOWED = {
    "bits": (4, 2, 3, 8), "checkpoint_format": ("gptq", "gptq_v2"), "format": ("gptq", "gptq_v2"),
    "method": ("gptq",), "pack_dtype": ("int32", None), "is_marlin_format": (False, None), "rotation": (None,),
    "activation": (None,), "adapter": (None,),
    "packing_format": ("auto_round:auto_gptq",),
}  # fmt: skip


def find_gptq(stored: RawSource, settings: Settings) -> tuple[dict[str, PackedWeight], frozenset[str], str]:
    """The weights in a GPTQ checkpoint, the tensors that mean nothing, and the method in words.

    Raises:
        CheckpointError: a setting that is not known, or tensors that do not belong together.
    """
    check_settings(settings, _ALLOWED, _METADATA)
    bits, group = settings.get("bits", 4), settings.get("group_size", 128)
    named = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    found = {}
    for name in stored.shapes:
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            found[f"{module}.weight"] = _weight(stored, module, bits, group, one_less=named == "gptq")
    return found, frozenset(), f"GPTQ, {bits} bits, groups of {group if group != -1 else 'a row'}"


def _weight(stored: RawSource, module: str, bits: int, group: int, *, one_less: bool) -> PackedWeight:
    names = [f"{module}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx")]
    packed, zeros, scales = (part(stored, name) for name in names[:3])
    order = stored.shapes.get(names[3])
    columns = order[0] if order is not None else packed[0] * 32 // bits
    own = packed[0] * 32 // columns if columns else 0  # a module may have bits of its own
    rows, groups = packed[1], scales[0]
    if own not in (2, 3, 4, 8) or scales != (groups, rows) or zeros != (groups, rows * own // 32) or not groups:
        raise CheckpointError(
            f"tensors {names[0]} {packed}, {names[1]} {zeros} and {names[2]} {scales} do not make a weight of {bits} "
            "bits; copy the checkpoint again"
        )
    if groups != 1 and (group == -1 or groups != -(-columns // group)):
        group = -(-columns // groups)
    size = columns if groups == 1 else group
    read = _Reader(stored, names, own, columns, size, one_less)
    return PackedWeight(
        shape=(rows, columns), parts=tuple(names), codes=read.codes, format=partial(read.format, order is not None)
    )


class _Reader:
    """Reads one module.

    Args:
        stored: the tensors.
        names: of codes, zeros, scales and groups.
        bits: of a code.
        columns: of the weight.
        group: columns in a group.
        one_less: whether zeros are stored less one.
    """

    def __init__(
        self, stored: RawSource, names: list[str], bits: int, columns: int, group: int, one_less: bool
    ) -> None:  # fmt: skip
        self._stored, (self._codes, self._zeros, self._scales, self._groups) = stored, names
        self._bits, self._columns, self._group, self._one_less = bits, columns, group, one_less

    def format(self, has_groups: bool) -> CodeFormat:
        groups = self.groups() if has_groups else None
        middle = 2 ** (self._bits - 1)
        return CodeFormat(self._bits, self._group, bool((self.zeros() == middle).all()), groups)

    def groups(self) -> NDArray[np.int64] | None:
        """Of each column, or None where they are in order."""
        if self._groups not in self._stored.shapes:
            return None
        found: NDArray[np.int64] = self._stored.raw(self._groups).numpy().astype(np.int64)
        count = self._stored.shapes[self._scales][0]
        if found.min() < 0 or found.max() >= count:
            raise CheckpointError(f"tensor {self._groups} names a group outside the {count} there are; copy it again")
        return None if (found == np.arange(len(found)) // self._group).all() else found

    def zeros(self) -> NDArray[np.uint8]:
        """(rows, groups)."""
        words = words_of(self._stored.raw(self._zeros))
        rows = self._stored.shapes[self._scales][1]
        if self._one_less and self._bits != 3:
            words = words + np.uint32(sum(1 << i for i in range(0, 32, self._bits)))  # around the end, as they took it
        zeros = unpacked(words, self._bits, rows)
        if self._one_less and self._bits == 3:
            zeros = np.bitwise_and(zeros + np.uint8(1), np.uint8(7))
        return np.ascontiguousarray(zeros.T)

    def codes(self, rows: Rows) -> StoredCodes:
        words = words_of(self._stored.raw(self._codes)).T[slice(*rows) if rows else slice(None)]
        cut = slice(*rows) if rows else slice(None)
        scales, zeros = as_float(self._stored.raw(self._scales)).T[cut], self.zeros()[cut]
        form = CodeFormat(self._bits, self._group, bool((zeros == 2 ** (self._bits - 1)).all()), self.groups())
        return StoredCodes(form, unpacked(words, self._bits, self._columns), np.ascontiguousarray(scales), zeros)
