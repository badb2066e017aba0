"""Building a model for a checkpoint's tensors, without weights or with, but never with weights it made up itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgellm.checkpoints.weights import CheckpointWeights, Layout, TensorSource
from edgellm.errors import CheckpointError, ModelError
from edgellm.models.registry import Architecture

__all__ = ["assemble", "fill", "shared_names"]


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names in the model's state dict, those that name one and the same tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def assemble(
    architecture: Architecture, config: Any, source: TensorSource, layout: Layout, *, dtype: torch.dtype, path: Path
) -> tuple[nn.Module, CheckpointWeights]:
    """Build the model with its parameters on the meta device, and match it with what the source holds.

    Args:
        architecture: what to build.
        config: its configuration.
        source: the tensors.
        layout: how the source stores them.
        dtype: of the model's floating-point parameters.
        path: the checkpoint, for messages.

    Returns:
        The model in evaluation mode, and where its parameters are read from. Buffers that a checkpoint stores are few
        and small: those the model has already.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    try:
        with torch.device("meta"):
            model = architecture.build(config)
    except (ModelError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: its configuration gives no model ({error}); repair it") from error
    expected = model.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    weights = CheckpointWeights(shared_names(model), shapes, source, layout, dtype=dtype, path=path)
    buffers = {name: weights.read(name) for name, t in expected.items() if not isinstance(t, nn.Parameter)}
    model.load_state_dict(buffers, assign=True, strict=False)
    _give(model, lambda name: torch.empty(shapes[name], dtype=dtype, device="meta"))
    return model.eval(), weights


def fill(model: nn.Module, weights: CheckpointWeights) -> nn.Module:
    """Give a model of :func:`assemble` all its parameters.

    Args:
        model: changed in place.
        weights: where they are read from.

    Returns:
        The model.

    Raises:
        CheckpointError: a tensor is damaged or not finite.
    """
    _give(model, weights.read)
    return model


def _give(model: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    """New parameters for old, one object for all names of one: tied tensors stay tied."""
    expected = model.state_dict(keep_vars=True)
    new: dict[str, torch.Tensor] = {}
    for group in shared_names(model):
        if isinstance(expected[group[0]], nn.Parameter):
            new |= dict.fromkeys(group, nn.Parameter(read(group[0])))
    model.load_state_dict(new, assign=True, strict=False)
