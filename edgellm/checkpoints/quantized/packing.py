"""Whole numbers of few bits out of the words that they are packed into."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["as_float", "unpacked", "words_of"]

_PIECE = 1 << 22  # bytes of words at a time, where codes lie across bytes


def words_of(tensor: Tensor) -> NDArray[np.uint32]:
    """A tensor of 32-bit words as unsigned numbers."""
    return tensor.contiguous().numpy().view(np.uint32)


def as_float(tensor: Tensor) -> NDArray[np.float32]:
    """A tensor of any float dtype as float32."""
    found: NDArray[np.float32] = tensor.float().contiguous().numpy()
    return found


def unpacked(words: NDArray[np.uint32], bits: int, count: int) -> NDArray[np.uint8]:
    """The codes in each row of words: a stream of bits from the lowest of the first word on.

    Args:
        words: (rows, words).
        bits: of one code, at most 8; codes of 3, 5, 6 and 7 bits lie across words.
        count: codes in a row.

    Returns:
        (rows, count).
    """
    bytes_ = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)  # (rows, words * 4)
    if bits in (1, 2, 4, 8):
        places = np.arange(0, 8, bits, dtype=np.uint8)
        return ((bytes_[:, :, None] >> places) & np.uint8(2**bits - 1)).reshape(len(words), -1)[:, :count]
    step = max(1, _PIECE // max(1, bytes_.shape[1]))
    found = [_across(bytes_[i : i + step], bits, count) for i in range(0, len(bytes_), step)]
    return np.concatenate(found) if found else np.zeros((0, count), np.uint8)


def _across(bytes_: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    stream = np.unpackbits(bytes_, axis=1, bitorder="little")[:, : count * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes: NDArray[np.uint8] = stream.reshape(len(bytes_), count, bits) @ weights
    return codes
