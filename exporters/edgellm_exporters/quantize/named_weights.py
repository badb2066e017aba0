"""A model's weights by the names that a captured graph gives them, parametrized ones as what they stand for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["is_parametrized", "named_weights"]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, those that are tied under each of their names; and weights that PyTorch computes from others.

    A module under :func:`torch.nn.utils.parametrizations.weight_norm` has parts for parameters; the weight that they
    make has the name that it would have without.
    """
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if is_parametrized(module):
            assert isinstance(module.parametrizations, nn.ModuleDict)
            found |= {".".join(filter(None, (path, name))): getattr(module, name) for name in module.parametrizations}
    return found


def is_parametrized(module: nn.Module) -> bool:
    """Whether PyTorch computes a weight of a module anew each time that it is read."""
    return parametrize.is_parametrized(module)
