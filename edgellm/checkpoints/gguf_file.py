"""GGUF files: metadata, and tensors dequantized one by one.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from edgellm.checkpoints.assemble import assemble
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.files import token_ids
from edgellm.checkpoints.generation_defaults import gguf_defaults
from edgellm.checkpoints.gguf_tokenizer import adds_bos, build_tokenizer, special_tokens
from edgellm.checkpoints.weights import Layout
from edgellm.errors import CheckpointError, ModelError
from edgellm.models.registry import Architecture, find_foreign

__all__ = ["GGUFSource", "open_gguf"]

_MOST_NUMBERS = 8  # in a byte of a file: no type takes less than a bit for each


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """gguf's reader, which by itself reads past the end of a damaged file as if nothing were there.

    It also keeps two array objects for each token of a vocabulary: here, lists are read as lists.
    """

    data: Any

    def __init__(self, path: Path) -> None:
        self._lists: dict[int, list[Any]] = {}  # by where in the file they are
        super().__init__(path)

    @property
    def metadata(self) -> dict[str, Any]:
        """Every field's name and value."""
        return {name: self._value(field) for name, field in self.fields.items()}

    def _value(self, field: Any) -> Any:
        if field.types[:1] == [gguf.GGUFValueType.ARRAY]:
            known = self._lists.get(int(field.parts[field.data[0]][0]) if field.data else -1)
            if known is not None:
                return known
        return field.contents()

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = np.asarray(self.data)  # the same mapping; slicing it costs half
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            self._lists[orig_offs], size = self._strings(start, count)
        elif kind in self.gguf_scalar_to_np:
            numbers = self._get(start, self.gguf_scalar_to_np[kind], count)
            self._lists[orig_offs], size = numbers.tolist(), numbers.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return 12 + size, [np.array([orig_offs])], [0], [gguf.GGUFValueType.ARRAY, kind]

    def _strings(self, start: int, count: int) -> tuple[list[str], int]:
        """So many strings, and how many bytes they take."""
        data, length, offset = memoryview(self.data), struct.Struct(">Q" if self._is_big_endian else "<Q"), start
        found: list[str] = []
        for _ in range(count):
            if offset + 8 > len(data):
                raise ValueError("it ends early")
            (size,) = length.unpack_from(data, offset)
            if offset + 8 + size > len(data):
                raise ValueError("it ends early")
            found.append(str(data[offset + 8 : offset + 8 + size], "utf-8"))
            offset += 8 + size
        return found, offset - start

    def _build_tensors(self, start_offs: int, fields: Any) -> None:
        """First see that no place or size is beyond the file: gguf's arithmetic begins again at 0 after 64 bits."""
        for field in fields:
            dims, offset = (field.parts[i].tolist() for i in (3, 5))
            if offset[0] > len(self.data) or math.prod(dims) > _MOST_NUMBERS * len(self.data):
                raise ValueError("a tensor is beyond its end")
        super()._build_tensors(start_offs, fields)

    @property
    def _is_big_endian(self) -> bool:
        return bool((sys.byteorder == "big") != (self.byte_order == "S"))


class GGUFSource:
    """The tensors and metadata of a GGUF file, or of one in several parts.

    Args:
        path: the file, or any of the parts, which are named ``NAME-00001-of-00003.gguf`` and lie in one folder.

    Raises:
        CheckpointError: it is not a whole GGUF file of this machine's byte order, or a part is missing.
    """

    def __init__(self, path: Path) -> None:
        self.metadata, self._tensors = _opened(path)
        count = self.metadata.get("split.count", 1)
        if type(count) is not int or not 0 <= count <= _MOST_PARTS:
            raise CheckpointError(f"{path} says that it is one of {count!r} parts; copy it again")
        if count > 1:
            self._join(_parts(path, count))

    def _join(self, parts: list[Path]) -> None:
        """Take the metadata of the first part and the tensors of all."""
        wanted = self.metadata.get("split.tensors.count")
        self._tensors = {}
        for number, part in enumerate(parts):
            metadata, tensors = _opened(part)
            if metadata.get("split.no") != number:
                raise CheckpointError(f"{part} is part {metadata.get('split.no')!r} and not {number}; name it rightly")
            if number == 0:
                self.metadata = metadata
            if twice := self._tensors.keys() & tensors.keys():
                raise CheckpointError(f"{part}: tensor {min(twice)} is in an earlier part too; copy the parts again")
            self._tensors |= tensors
        if wanted is not None and len(self._tensors) != wanted:
            raise CheckpointError(
                f"{parts[0]} and its parts have {len(self._tensors)} tensors instead of {wanted}; copy them again"
            )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, outermost dimension first."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @property
    def quantization(self) -> str:
        """The type that most weights are stored in."""
        sizes: Counter[str] = Counter()
        for tensor in self._tensors.values():
            sizes[tensor.kind.name] += math.prod(tensor.shape)
        return sizes.most_common(1)[0][0] if sizes else "empty"

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or the rows from one index up to another, dequantized to float32.

        Raises:
            CheckpointError: its type has no known dequantization, or the file was cut short since it was opened.
        """
        tensor = self._tensors[name]
        start, stop = rows or (0, tensor.shape[0])
        shape = (stop - start, *tensor.shape[1:])
        size, rest = divmod(tensor.nbytes, tensor.shape[0])
        try:
            if rest:
                raise ValueError("its rows are no whole blocks")
            stored = np.fromfile(tensor.path, np.uint8, size * shape[0], offset=tensor.offset + size * start)
            if len(stored) != size * shape[0]:
                raise ValueError("the file ends early")
            array = _dequantized(stored, tensor.kind).reshape(shape)
        except (NotImplementedError, ValueError, OSError) as error:
            kind = tensor.kind.name
            raise CheckpointError(f"{tensor.path}: tensor {name} of type {kind} cannot be read ({error})") from error
        return torch.from_numpy(np.require(array, np.float32, requirements=["C", "W"]))


class _Stored(NamedTuple):
    """Where a tensor is; gguf's own object would hold on to the mapping of the whole file."""

    path: Path
    shape: tuple[int, ...]  # outermost dimension first
    kind: Any
    offset: int
    nbytes: int

    @classmethod
    def of(cls, path: Path, tensor: Any) -> _Stored:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        return cls(path, shape, tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes))


_MOST_PARTS = 4096
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def _opened(path: Path) -> tuple[Mapping[str, Any], dict[str, _Stored]]:
    """One file's metadata, and where its tensors are."""
    try:
        reader = _Reader(path)
        metadata = reader.metadata
        tensors = {tensor.name: _Stored.of(path, tensor) for tensor in reader.tensors}
    except (ValueError, LookupError, OverflowError, OSError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a whole GGUF file ({error}); copy it again") from error
    if reader.byte_order == "S":
        raise CheckpointError(f"{path} has the other byte order; convert it with gguf-convert-endian")
    return metadata, tensors


def _parts(path: Path, count: int) -> list[Path]:
    """All parts of the file that one part is of."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, which are named NAME-00001-of-{count:05}.gguf; give them their names back"
        )
    parts = [path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if absent := [part.name for part in parts if not part.is_file()]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise CheckpointError(f"{path}: {absent[0]}{more} of its {count} parts not beside it; copy all of them there")
    return parts


_PLAIN: Mapping[Any, Any] = {
    gguf.GGMLQuantizationType.F16: np.float16,
    gguf.GGMLQuantizationType.F32: np.float32,
    gguf.GGMLQuantizationType.F64: np.float64,
}
_CHUNK = 1 << 17  # numbers at a time: gguf's scratch memory stays small, and its loops over short rows are slow


def _dequantized(stored: np.ndarray[Any, np.dtype[np.uint8]], kind: Any) -> np.ndarray[Any, Any]:
    """The numbers of a tensor, in their order but of no particular shape."""
    if kind in _PLAIN:
        return stored.view(_PLAIN[kind])
    length, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = max(1, _CHUNK // length)
    result = np.empty(len(stored) // size * length, np.float32)
    for number, start in enumerate(range(0, len(stored), blocks * size)):
        chunk = stored[start : start + blocks * size].reshape(1, -1)
        numbers = np.asarray(gguf.quants.dequantize(chunk, kind)).reshape(-1)
        result[number * blocks * length :][: len(numbers)] = numbers
    return result


def open_gguf(path: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read a GGUF file; arguments and errors as :func:`open_checkpoint`."""
    source = GGUFSource(path)
    metadata = source.metadata
    architecture, config = _translate(source, path)
    assert architecture.gguf is not None
    convert = architecture.gguf.tensor

    def tensor(name: str, stored: Tensor) -> Tensor:
        return stored if convert is None else convert(config, metadata, name, stored)

    told = frozenset(architecture.gguf.numbers.values())  # those that the configuration holds
    reshaped = architecture.gguf.reshaped
    layout = Layout(
        name=architecture.gguf.names, tensor=tensor, ignored=told.__contains__,
        reshaped=lambda name: name.endswith(reshaped),
    )  # fmt: skip
    model, weights = assemble(architecture, config, source, layout, dtype=dtype, path=path)
    bos = token_ids(metadata, "tokenizer.ggml.bos_token_id", path)
    ends = [token_ids(metadata, f"tokenizer.ggml.{kind}_token_id", path) for kind in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    generation, notes = gguf_defaults(metadata, path)
    return Checkpoint(
        architecture=architecture.name,
        model=model,
        tokenizer_json=build_tokenizer(metadata, path),
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(i for ids in ends for i in ids)),
        add_bos=bool(bos) and adds_bos(metadata),
        source=f"GGUF {source.quantization}, {metadata['general.architecture']}",
        weights=weights,
        special_tokens=special_tokens(metadata),
        generation=generation,
        notes=notes,
    )


def _numbers(source: GGUFSource, name: str) -> tuple[float, ...]:
    return tuple(source.read(name).double().tolist())


def _translate(source: GGUFSource, path: Path) -> tuple[Architecture, Any]:
    try:
        architecture = find_foreign("gguf", source.metadata.get("general.architecture", ""))
        assert architecture.gguf is not None
        fields = architecture.gguf.read(source.metadata, source.shapes, partial(_numbers, source))
        return architecture, architecture.config(**fields)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: its metadata is malformed ({error}); convert it again") from error
