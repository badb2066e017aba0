"""Building a model from a source of named tensors, one tensor at a time, without ever initialising its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgellm.errors import CheckpointError, ModelError
from edgellm.models.registry import Architecture

__all__ = ["Layout", "TensorSource", "assemble", "shared_names"]


class TensorSource(Protocol):
    """Named tensors in a file or several."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor in a floating-point dtype.

        Raises:
            CheckpointError: it cannot be read, or holds something other than floating-point numbers.
        """
        ...


def _same(name: str) -> str:
    return name


def _as_stored(_name: str, tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Layout:
    """How a source stores an architecture's tensors.

    Args:
        name: our parameter name to the source's tensor name.
        tensor: our parameter name and a tensor as stored, to the tensor in our layout and of the same shape.
        ignored: whether a tensor of that name means nothing to the model.
    """

    name: Callable[[str], str] = _same
    tensor: Callable[[str, Tensor], Tensor] = _as_stored
    ignored: Callable[[str], bool] = lambda _: False


def shared_names(model: nn.Module) -> list[list[str]]:
    """The names in the model's state dict, those that name one and the same tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def assemble(
    architecture: Architecture, config: Any, source: TensorSource, layout: Layout, *, dtype: torch.dtype, path: Path
) -> nn.Module:
    """Build the model and give it every tensor from the source.

    Args:
        architecture: what to build.
        config: its configuration.
        source: the tensors.
        layout: how the source stores them.
        dtype: of the model's floating-point parameters.
        path: the checkpoint, for messages.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or not finite.
    """
    try:
        with torch.device("meta"):
            model = architecture.build(config)
    except (ModelError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: its configuration gives no model ({error}); repair it") from error
    groups, expected = shared_names(model), model.state_dict(keep_vars=True)
    _check_no_others(source.shapes, {layout.name(name) for group in groups for name in group}, layout, path)
    loaded: dict[str, Tensor] = {}
    for group in groups:
        tensor = _take(group, tuple(expected[group[0]].shape), source, layout, dtype, path)
        if isinstance(expected[group[0]], nn.Parameter):
            tensor = nn.Parameter(tensor)
        loaded |= dict.fromkeys(group, tensor)  # one object for all names: tied tensors stay tied
    model.load_state_dict(loaded, assign=True)
    return model.eval()


def _check_no_others(found: Collection[str], expected: Collection[str], layout: Layout, path: Path) -> None:
    others = sorted(name for name in found if name not in expected and not layout.ignored(name))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise CheckpointError(
            f"{path}: tensors {', '.join(others[:3])}{more} have no place in the model that its configuration "
            "describes; use a checkpoint of that model"
        )


def _take(
    group: list[str], shape: tuple[int, ...], source: TensorSource, layout: Layout, dtype: torch.dtype, path: Path
) -> Tensor:
    stored = [name for name in group if layout.name(name) in source.shapes]
    if not stored:
        raise CheckpointError(
            f"{path}: tensor {layout.name(group[0])} of shape {shape} is missing; the checkpoint is incomplete"
        )
    for name in stored:
        found = source.shapes[layout.name(name)]
        if found != shape:
            raise CheckpointError(
                f"{path}: tensor {layout.name(name)} has shape {found}, its configuration says {shape}; the two do not "
                "belong together"
            )
    first, *others = [layout.tensor(name, source.read(layout.name(name))) for name in stored]
    if any(not torch.equal(first, other) for other in others):
        raise CheckpointError(
            f"{path}: tensors {' and '.join(layout.name(n) for n in stored)} differ, its configuration says that they "
            "are one; correct the configuration"
        )
    tensor = first.to(dtype)
    low_and_high = torch.stack(tensor.aminmax())  # NaN if any is; needs no second tensor of that size
    if not bool(low_and_high.isfinite().all()):
        raise CheckpointError(f"{path}: tensor {layout.name(stored[0])} is not finite as {dtype}; use sound weights")
    return tensor
