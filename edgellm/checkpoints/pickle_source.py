"""Tensors in the files that ``torch.save`` writes (.bin, .pt, .pth), of which only tensors are believed.

PyTorch's ``weights_only`` reader builds nothing but tensors and containers: no code of the file's runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgellm.errors import CheckpointError

__all__ = ["PickleSource"]

_DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.float8_e4m3fn: "F8_E4M3"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which trainers put the tensors


class PickleSource:
    """The tensors of some files of ``torch.save``; ``dtype`` is what most of their numbers are stored in.

    Args:
        files: each holds a state dict, alone or under a usual name.

    Raises:
        CheckpointError: a file is damaged, holds something else, or two hold tensors of one name.
    """

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, tuple[Path, Tensor]] = {}
        sizes: Counter[str] = Counter()
        for path in files:
            for name, tensor in _tensors(path).items():
                if name in self._where:
                    raise CheckpointError(f"{path}: tensor {name} is in {self._where[name][0].name} too; keep one")
                self._where[name] = (path, tensor)
                sizes[str(tensor.dtype).removeprefix("torch.")] += math.prod(tensor.shape)
        self.dtype = sizes.most_common(1)[0][0] if sizes else "empty"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {name: tuple(tensor.shape) for name, (_, tensor) in self._where.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor as stored, or the rows from one index up to another; a copy of what is mapped.

        Raises:
            CheckpointError: it holds something other than floating-point numbers.
        """
        path, tensor = self._where[name]
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}; edgellm reads floating-point weights")
        return self.raw(name, rows)

    def dtype_of(self, name: str) -> str:
        """What a tensor is stored in, as safetensors names it."""
        dtype = self._where[name][1].dtype
        return _DTYPES.get(dtype, str(dtype))

    def raw(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor of any dtype, or the rows from one index up to another; a copy of what is mapped."""
        _, tensor = self._where[name]
        return (tensor if rows is None else tensor[rows[0] : rows[1]]).detach().clone()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = _load(path)
    except Exception as error:  # the reader raises whatever goes wrong in it as it follows a damaged program
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is no file of tensors that can be read without running its code ({reason}); save it as safetensors"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise CheckpointError(f"{path} holds no state dict, names and tensors; save model.state_dict() there")
    return {str(name): tensor for name, tensor in found.items()}


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
