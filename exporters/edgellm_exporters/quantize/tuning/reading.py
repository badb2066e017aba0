"""How a model on the meta device runs with weights that are made when a function takes them.

Unlike :func:`edgellm.streaming.resident` it leaves products to the source of the weights, so that these can be learned,
or multiplied in another dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Reading", "Source", "fast_dtype", "fast_products"]


class Source(Protocol):
    """Weights by a model's names for them."""

    def name_of(self, value: Any) -> str | None:
        """The name of a parameter on the meta device; None for anything else."""
        ...

    def product(self, x: Tensor, name: str) -> Tensor:
        """X (..., columns) times the transpose of a weight (rows, columns)."""
        ...

    def rows(self, name: str, some: Tensor) -> Tensor:
        """Some rows of a table."""
        ...

    def read(self, name: str) -> Tensor:
        """One parameter."""
        ...


class Reading(TorchFunctionMode):
    """Gives functions real weights in place of parameters on the meta device.

    Args:
        source: of the weights.
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        name = self._source.name_of(args[1]) if len(args) > 1 else None
        if func is F.linear and name is not None:
            bias = self._real(args[2] if len(args) > 2 else kwargs.get("bias"))
            y = self._source.product(args[0], name)
            return y if bias is None else y + bias
        if func is F.embedding and name is not None and not kwargs.get("max_norm"):
            found, places = torch.unique(args[0], return_inverse=True)
            return F.embedding(places, self._source.rows(name, found))
        if func == Tensor.device.__get__ and self._source.name_of(args[0]) is not None:
            return torch.device("cpu")
        if func == Tensor.dtype.__get__:  # type: ignore[attr-defined]
            return func(*args, **kwargs)
        return func(*self._real(args), **self._real(kwargs))

    def _real(self, value: Any) -> Any:
        name = self._source.name_of(value)
        if name is not None:
            return self._source.read(name)
        if type(value) is dict:
            return {key: self._real(each) for key, each in value.items()}
        return type(value)(map(self._real, value)) if type(value) in (list, tuple) else value


def fast_dtype() -> torch.dtype:
    """What products are quickest in without losing what gradients need: bfloat16 where the processor multiplies it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32


@contextmanager
def fast_products() -> Iterator[None]:
    """Multiply float32 matrices in :func:`fast_dtype`, added up in float32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or fast_dtype() != torch.bfloat16:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
