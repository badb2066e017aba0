"""A model's float weights, read once and held in 16 bits where the processor multiplies such."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from edgellm.streaming import Weights
from edgellm_exporters.quantize.tuning.reading import fast_dtype

__all__ = ["HeldWeights"]


class HeldWeights:
    """Follows :class:`edgellm_exporters.quantize.tuning.reading.Source`.

    Args:
        shell: the model, its parameters on the meta device.
        weights: where they are read, each once.
    """

    def __init__(self, shell: nn.Module, weights: Weights) -> None:
        self._names = {id(p): name for name, p in shell.named_parameters()}
        self._weights, self._dtype = weights, fast_dtype()
        self._held: dict[str, Tensor] = {}

    def name_of(self, value: Any) -> str | None:
        """See :class:`Source`."""
        return self._names.get(id(value))

    def product(self, x: Tensor, name: str) -> Tensor:
        """See :class:`Source`."""
        return (x.to(self._dtype) @ self._matrix(name).t()).float()

    def rows(self, name: str, some: Tensor) -> Tensor:
        """See :class:`Source`."""
        return self._matrix(name)[some].float()

    def read(self, name: str) -> Tensor:
        """See :class:`Source`."""
        found = self._matrix(name)
        return found.float() if found.dim() > 1 else found

    def _matrix(self, name: str) -> Tensor:
        if name not in self._held:
            found = self._weights.read(name).detach().float()
            self._held[name] = found.to(self._dtype) if found.dim() > 1 else found
        return self._held[name]
