"""Reading a ``tokenizer.model``, sentencepiece's protobuf: its pieces, and how it prepares text.

The fields: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm.errors import CheckpointError

__all__ = ["BPE", "UNIGRAM", "SentencePieceModel", "read_sentencepiece"]

UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
_MOST_BYTES = 64 << 20  # the largest in the field have 5 MB
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What the file holds, with the format's defaults where it says nothing.

    Args:
        pieces: the vocabulary.
        scores: of each piece.
        types: of each piece; as GGUF's ``tokenizer.ggml.token_type``.
        kind: 1 for a unigram model, 2 for byte-pair encoding.
        charsmap: what rewrites characters first, as NFKC does, in sentencepiece's own form; empty: nothing.
        add_dummy_prefix: whether a text is begun with a space.
        remove_extra_whitespaces: whether spaces are folded.
        byte_fallback: whether unknown characters become pieces of one byte.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    kind: int = UNIGRAM
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    byte_fallback: bool = False

    @property
    def rewrites(self) -> bool:
        """Whether characters are rewritten first."""
        return bool(self.charsmap)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read the file.

    Raises:
        CheckpointError: it is damaged or something else.
    """
    try:
        data = memoryview(path.read_bytes())
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has {len(data)} bytes")
        return _model(data)
    except (OSError, ValueError, struct.error, IndexError) as error:
        raise CheckpointError(f"{path} is no sentencepiece model ({error}); copy the checkpoint again") from error


def _model(data: memoryview) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | memoryview] = {}
    normalizer: dict[int, int | memoryview] = {}
    for number, value in _fields(data):
        if number in (1, 2, 3) and isinstance(value, int):
            raise ValueError(f"field {number} is a number")
        if number == 1:
            pieces.append(_piece(dict(_fields(value))))  # type: ignore[arg-type]
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_fields(value))  # type: ignore[arg-type]
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(
        pieces=[piece for piece, _, _ in pieces],
        scores=[score for _, score, _ in pieces],
        types=[kind for _, _, kind in pieces],
        kind=_number(trainer, 3, UNIGRAM),
        charsmap=bytes(_bytes(normalizer, 2)),
        add_dummy_prefix=bool(_number(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1)),
        byte_fallback=bool(_number(trainer, 35, 0)),
    )


def _piece(fields: dict[int, int | memoryview]) -> tuple[str, float, int]:
    (score,) = struct.unpack("<f", _bytes(fields, 2) or bytes(4))
    return str(_bytes(fields, 1), "utf-8"), score, _number(fields, 3, 1)


def _number(fields: dict[int, int | memoryview], key: int, default: int) -> int:
    value = fields.get(key, default)
    if not isinstance(value, int):
        raise ValueError(f"field {key} is no number")
    return value


def _bytes(fields: dict[int, int | memoryview], key: int) -> memoryview:
    value = fields.get(key, memoryview(b""))
    if isinstance(value, int):
        raise ValueError(f"field {key} is a number")
    return value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: an int, or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in _SIZES:
            size = _SIZES[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if size > len(data) - at:
            raise ValueError("it ends early")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number of more than ten bytes")
