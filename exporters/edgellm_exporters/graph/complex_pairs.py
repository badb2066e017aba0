"""Complex numbers while a model is traced: pairs of real tensors, because graphs have no other form of them.

Rotations are often written so: pairs of features seen as one complex number, times the cosine and sine of an angle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAKERS", "Pair"]


class Pair:
    """A complex tensor as its real and its imaginary part, as far as rotations go.

    Args:
        real: of any shape.
        imag: of the same.
    """

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = real, imag

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What PyTorch's own functions do with one."""
        if func in _OF_PAIRS and not kwargs:
            return _OF_PAIRS[func](*args)
        raise TypeError(f"complex numbers have no form in a graph for {getattr(func, '__name__', func)}")

    @property
    def shape(self) -> torch.Size:
        return self.real.shape

    @property
    def device(self) -> torch.device:
        return self.real.device

    @property
    def ndim(self) -> int:
        return self.real.dim()

    def __mul__(self, other: Any) -> Pair:
        if not isinstance(other, Pair):
            return Pair(self.real * other, self.imag * other)
        return Pair(self.real * other.real - self.imag * other.imag, self.real * other.imag + self.imag * other.real)

    __rmul__ = __imul__ = __mul__

    def __getitem__(self, at: Any) -> Pair:
        return Pair(self.real[at], self.imag[at])

    def to(self, *args: Any, **keywords: Any) -> Pair:
        """On a device; it is never turned into another dtype."""
        return self

    def __getattr__(self, name: str) -> Callable[..., Pair]:
        if name not in _SHAPING:
            raise AttributeError(f"complex numbers have no form in a graph for {name}")
        return lambda *args, **keywords: Pair(
            getattr(self.real, name)(*args, **keywords), getattr(self.imag, name)(*args, **keywords)
        )


_SHAPING = (
    "contiguous",
    "expand",
    "flatten",
    "permute",
    "repeat",
    "reshape",
    "squeeze",
    "transpose",
    "unsqueeze",
    "view",
)


def _seen_as_real(x: Pair) -> Tensor:
    return torch.stack([x.real, x.imag], dim=-1)


_OF_PAIRS: Mapping[Any, Callable[..., Any]] = {
    torch.view_as_real: _seen_as_real,
    torch.mul: lambda a, b: a * b if isinstance(a, Pair) else b * a,
    Tensor.__mul__: lambda a, b: b * a,
    Tensor.mul: lambda a, b: b * a,
}
# PyTorch's functions that make complex numbers of real ones.
MAKERS: Mapping[Any, Callable[..., Pair]] = {
    torch.view_as_complex: lambda x: Pair(x[..., 0], x[..., 1]),
    torch.complex: Pair,
    torch.polar: lambda size, angle: Pair(size * torch.cos(angle), size * torch.sin(angle)),
}
