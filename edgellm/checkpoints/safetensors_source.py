"""Tensors in one safetensors file, or in several with an index, read one by one.

A file is mapped into memory only while a tensor is read: pages of a mapping that were touched count as memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgellm.checkpoints.files import read_json
from edgellm.errors import CheckpointError

__all__ = ["SafetensorsSource"]

SINGLE = "model.safetensors"


class SafetensorsSource:
    """The tensors of some safetensors files; ``dtype`` is what most of their numbers are stored in.

    Args:
        files: name of each tensor and the file it is in.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks a tensor.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        handles: dict[Path, Any] = {path: _open(path) for path in dict.fromkeys(files.values())}
        self._files = files
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        sizes: Counter[str] = Counter()
        for name, path in files.items():
            try:
                header = handles[path].get_slice(name)
            except SafetensorError:
                raise CheckpointError(f"{path}: tensor {name} is missing; the checkpoint is incomplete") from None
            self._shapes[name] = tuple(header.get_shape())
            self._dtypes[name] = header.get_dtype()
            sizes[self._dtypes[name]] += math.prod(header.get_shape())
        self.dtype = sizes.most_common(1)[0][0] if sizes else "empty"

    @classmethod
    def in_directory(cls, directory: Path, stem: str = "model") -> SafetensorsSource:
        """``model.safetensors``, or what its index lists, or the only safetensors file there but an adapter.

        Args:
            directory: where.
            stem: in place of ``model``; of any other, the only file does not do.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
        if not single.exists() and index.exists():
            return cls(_indexed(index))
        others = sorted(p for p in directory.glob("*.safetensors") if not p.name.startswith("adapter"))
        found = [single] if single.exists() else others if stem == "model" else []
        if len(found) != 1:
            raise CheckpointError(
                f"{directory} has {len(found)} safetensors files and no {index.name}; it needs {single.name}, or "
                "several with the index"
            )
        return cls(dict.fromkeys(_open(found[0]).keys(), found[0]))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return self._shapes

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor as stored, or the rows from one index up to another.

        Raises:
            CheckpointError: it cannot be read, or holds something other than floating-point numbers.
        """
        tensor = self.raw(name, rows)
        if not tensor.is_floating_point():
            path = self._files[name]
            raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}; edgellm reads floating-point weights")
        return tensor

    def dtype_of(self, name: str) -> str:
        """What a tensor is stored in."""
        return self._dtypes[name]

    def raw(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor of any dtype, or the rows from one index up to another.

        Raises:
            CheckpointError: it cannot be read.
        """
        path = self._files[name]
        try:
            with _open(path) as handle:
                tensor: Tensor = handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows[0] : rows[1]]
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name} cannot be read ({error}); copy it again") from error
        return tensor


def _open(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); copy it again") from error


def _indexed(index: Path) -> dict[str, Path]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no weight_map; copy the checkpoint again")
    for name, file in where.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name} is in {file!r}, which is not a file beside the index")
    return {name: index.parent / file for name, file in where.items()}
