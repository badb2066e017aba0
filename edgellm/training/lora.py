"""Low-rank adapters: a frozen model learns through two thin matrices beside each of its linear layers.

y = W x + (alpha / rank) B A x, Hu et al. 2021, arXiv:2106.09685. Checkpoints hold the merged weights; the
adapters themselves are a folder beside them, see :mod:`edgellm.training.adapter_files`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgellm.errors import TrainingError

__all__ = ["AdaptedLinear", "adapt", "adapted_layers", "is_adapted", "merged"]


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter beside it; without training it computes what the layer computes.

    Args:
        layer: frozen.
        rank: features between the two matrices.
        alpha: the adapter counts ``alpha / rank``.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, alpha / rank
        self.down = nn.Parameter(torch.empty(rank, layer.in_features).normal_(std=layer.in_features**-0.5))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        y: Tensor = self.layer(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scale
        return y

    def merged(self) -> nn.Linear:
        """One plain layer that computes the same."""
        layer = nn.Linear(
            self.layer.in_features, self.layer.out_features, bias=self.layer.bias is not None, device="meta"
        )
        with torch.no_grad():
            layer.weight = nn.Parameter(self.layer.weight + self.scale * self.up @ self.down)
        layer.bias = self.layer.bias
        return layer


def adapt(model: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a model and put an adapter beside each linear layer whose weight nothing else uses.

    Args:
        model: changed in place.
        rank: of the adapters; at least 1.
        alpha: how much they count, as a multiple of 1 / rank.

    Raises:
        TrainingError: a rank below 1, or no linear layer.
    """
    if rank < 1:
        raise TrainingError(f"the adapters' rank is {rank}; it must be at least 1")
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    model.requires_grad_(False)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m.weight) not in shared]
    if not layers:
        raise TrainingError("the model has no linear layer of its own to put an adapter beside; train it whole")
    for name, layer in layers:
        _put(model, name, AdaptedLinear(layer, rank, alpha))


def is_adapted(model: nn.Module) -> bool:
    """Whether a model learns through adapters."""
    return bool(adapted_layers(model))


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model as a plain one of its architecture, for as long as the context lasts."""
    adapted = adapted_layers(model)
    for name, layer in adapted.items():
        _put(model, name, layer.merged())
    try:
        yield model
    finally:
        for name, layer in adapted.items():
            _put(model, name, layer)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers that learn through adapters, by their name in the model without them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
