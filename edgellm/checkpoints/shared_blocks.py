"""Blocks that a model uses at several places, as one module for each place: what adapters change is one place's own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

from torch import nn

from edgellm.checkpoints.assemble import shared_names
from edgellm.errors import CheckpointError

__all__ = ["check_tables", "give_own", "separate", "shares_blocks"]


def shares_blocks(model: nn.Module) -> bool:
    """Whether parameters other than a vocabulary's table have several names."""
    tables = _tables(model)
    return any(len(group) > 1 and not tables & set(group) for group in shared_names(model))


def separate(model: nn.Module) -> None:
    """Put a module of its own at every place of one that is used at several; parameters stay shared.

    Args:
        model: changed in place; what it computes stays.
    """
    _separate(model, set())


def _separate(parent: nn.Module, met: set[nn.Module]) -> None:
    for name, child in list(parent._modules.items()):  # named_children leaves out what comes again
        if child is None:
            continue
        if child in met:
            kept = {id(tensor): tensor for tensor in (*child.parameters(), *child.buffers())}
            parent.add_module(name, copy.deepcopy(child, kept))
        else:
            met.add(child)
            _separate(child, met)


def give_own(model: nn.Module, names: Collection[str]) -> int:
    """Give parameters that several places share, under the names that are given, to these places alone.

    Args:
        model: changed in place.
        names: of parameters; those that nothing shares stay as they are.

    Returns:
        How many parameters there are more.
    """
    shared = [name for group in shared_names(model) if len(group) > 1 for name in group if name in names]
    if shared:
        separate(model)
    before = len(shared_names(model))
    for name in shared:
        path, _, last = name.rpartition(".")
        old = model.get_parameter(name)
        setattr(model.get_submodule(path), last, nn.Parameter(old.detach(), requires_grad=old.requires_grad))
    return len(shared_names(model)) - before


def check_tables(model: nn.Module, names: Mapping[str, str]) -> None:
    """Refuse changes of a vocabulary's table that is the head too: which of both is meant, adapters do not say.

    Args:
        model: whose parameters they are.
        names: what an adapter calls the parameters that it changes.

    Raises:
        CheckpointError: one of them is such a table.
    """
    tables = _tables(model)
    for group in shared_names(model):
        if len(group) > 1 and tables & set(group) and (both := [names[name] for name in group if name in names]):
            raise CheckpointError(f"it changes {both[0]}, which is tied to another tensor; untie them first")


def _tables(model: nn.Module) -> set[str]:
    return {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
