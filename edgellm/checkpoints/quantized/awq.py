"""AWQ's layout for GEMM kernels, as AutoAWQ writes it.

Of a weight (rows, columns) ``qweight`` is (columns, rows / 8) and ``qzeros`` (groups, rows / 8): eight neighbouring
rows in a word, of which the even ones come first, from the lowest bits: 0, 2, 4, 6, 1, 3, 5, 7. ``scales`` is (groups,
rows).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgellm.checkpoints.quantized.packing import as_float, unpacked, words_of
from edgellm.checkpoints.quantized.settings import Settings, check_settings
from edgellm.checkpoints.quantized.source import PackedWeight, RawSource, Rows, part
from edgellm.codes import CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["find_awq"]

_BITS, _EACH = 4, 8
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word each of eight rows is
_METADATA = {
    "quant_method", "group_size", "q_group_size", "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len",
    "modules_to_fuse", "exllama_config", "sym", "desc_act", "meta", "lm_head", "true_sequential", "dynamic",
}  # fmt: skip
_ALLOWED = {
    "bits": (4,), "w_bit": (4,), "zero_point": (True,), "version": ("gemm", "GEMM"), "format": ("gemm", "GEMM"),
    "checkpoint_format": ("gemm",), "method": ("awq",), "pack_dtype": ("int32", None),
    "packing_format": ("auto_round:auto_awq",),
}  # fmt: skip


def find_awq(stored: RawSource, settings: Settings) -> tuple[dict[str, PackedWeight], frozenset[str], str]:
    """The weights in an AWQ checkpoint, the tensors that mean nothing, and the method in words.

    Raises:
        CheckpointError: a setting that is not known, or tensors that do not belong together.
    """
    check_settings(settings, _ALLOWED, _METADATA)
    group = settings.get("group_size", settings.get("q_group_size", 128))
    modules = [name.removesuffix(".qweight") for name in stored.shapes if name.endswith(".qweight")]
    found = {f"{module}.weight": _weight(stored, module) for module in modules}
    return found, frozenset(), f"AWQ, 4 bits, groups of {group if group != -1 else 'a row'}"


def _weight(stored: RawSource, module: str) -> PackedWeight:
    names = [f"{module}.{name}" for name in ("qweight", "qzeros", "scales")]
    packed, zeros, scales = (part(stored, name) for name in names)
    columns, rows, groups = packed[0], packed[1] * _EACH, scales[0]
    if scales != (groups, rows) or zeros != (groups, packed[1]) or not groups or columns % groups:
        raise CheckpointError(
            f"tensors {names[0]} {packed}, {names[1]} {zeros} and {names[2]} {scales} do not make a weight of 4 bits "
            "in groups; copy the checkpoint again"
        )

    def all_zeros() -> NDArray[np.uint8]:
        return _by_rows(words_of(stored.raw(names[1])))

    def form() -> CodeFormat:
        return CodeFormat(_BITS, columns // groups, bool((all_zeros() == 2 ** (_BITS - 1)).all()))

    def codes(some: Rows) -> StoredCodes:
        cut = slice(*some) if some else slice(None)
        scale = np.ascontiguousarray(as_float(stored.raw(names[2])).T[cut])
        return StoredCodes(form(), _by_rows(words_of(stored.raw(names[0])))[cut], scale, all_zeros()[cut])

    return PackedWeight(shape=(rows, columns), parts=tuple(names), codes=codes, format=form)


def _by_rows(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """(columns, rows / 8) words to (rows, columns) codes."""
    codes = unpacked(words, _BITS, words.shape[1] * _EACH).reshape(len(words), -1, _EACH)
    return np.ascontiguousarray(codes[:, :, _PLACES].reshape(len(words), -1).T)
