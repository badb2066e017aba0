"""Adapters that stay apart from a checkpoint's weights: a state says which of them counts for a row.

Each adapted module adds x A B of its row's adapter to what it gives; the first place of a stack is all zeros, for rows
without one. W + scale B A, Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.checkpoints.adapter import adapter_source
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.shared_blocks import separate, shares_blocks
from edgellm.codes import CodedWeights, CodeFormat, StoredCodes
from edgellm.errors import CheckpointError
from edgellm.models.protocol import State, Step, answers_sources
from edgellm.streaming import OwnWeights, Weights
from edgellm_runtime.spec import ADAPTER, ADAPTER_NAME, StateSpec, adapter_spec

__all__ = ["Switchable", "switchable"]

_BASE = "base."


class Switchable(nn.Module):
    """A model with several adapters; follows :class:`edgellm.models.protocol.LanguageModel`.

    Args:
        base: the model.
        adapters: their names; the first is number 1 in the state, and 0 means none.
        stacks: by the name of an adapted module, A (adapters + 1, in_features, rank) and B (adapters + 1, rank,
            out_features), the scale in one of them.
    """

    def __init__(self, base: nn.Module, adapters: Sequence[str], stacks: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.base, self.adapters = base, tuple(adapters)
        self.config: Any = base.config
        self._numbers: Tensor | None = None  # of a step that is under way, (batch,)
        for number, (module, (down, up)) in enumerate(stacks.items()):
            self.register_buffer(f"down{number}", down, persistent=False)
            self.register_buffer(f"up{number}", up, persistent=False)
            base.get_submodule(module).register_forward_hook(partial(self._add, number))

    def state_specs(self) -> list[StateSpec]:
        """The model's, and the number of each row's adapter."""
        base: Any = self.base
        return [*base.state_specs(), adapter_spec()]

    def forward(
        self, tokens: Tensor, state: State | None = None, step: Step | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's step, with the adapters that the state names; a row without a state has none."""
        numbers = (state or {}).get(ADAPTER)
        if numbers is None:
            numbers = torch.zeros(len(tokens), 1, dtype=torch.int32, device=tokens.device)
        self._numbers = numbers[:, 0].clamp(0, len(self.adapters))
        try:
            logits, present = self.base(tokens, state, step)
        finally:
            self._numbers = None
        return logits, present | {ADAPTER: numbers.clone()}

    def _add(self, number: int, _module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        assert self._numbers is not None
        down, up = (getattr(self, f"{name}{number}").index_select(0, self._numbers) for name in ("down", "up"))
        added: Tensor = (inputs[0] @ down) @ up
        return y + added


class _Prefixed:
    """A model's weights by the names that they have in a :class:`Switchable`; follows :class:`CodedWeights`."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    @property
    def dtype(self) -> torch.dtype:
        """What tensors are read as."""
        found: torch.dtype = getattr(self._weights, "dtype", torch.float32)
        return found

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self._weights.read(name.removeprefix(_BASE))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        return self._weights.rows(name.removeprefix(_BASE), start, stop)

    def code_format(self, name: str) -> CodeFormat | None:
        """See :class:`edgellm.codes.CodedWeights`."""
        coded = isinstance(self._weights, CodedWeights)
        return self._weights.code_format(name.removeprefix(_BASE)) if coded else None  # type: ignore[attr-defined]

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        assert isinstance(self._weights, CodedWeights)
        return self._weights.codes(name.removeprefix(_BASE))


def switchable(checkpoint: Checkpoint, adapters: Mapping[str, Path]) -> Checkpoint:
    """The checkpoint with adapters that a state switches.

    Args:
        checkpoint: opened.
        adapters: folders in PEFT's layout by the names that they are to have.

    Raises:
        CheckpointError: a name or an adapter that cannot be one, or a model that answers sources.
    """
    if bad := next((name for name in adapters if not ADAPTER_NAME.fullmatch(name)), None):
        raise CheckpointError(f"{bad!r} is no name of an adapter; use letters, digits, '.', '_' and '-', at most 64")
    if answers_sources(checkpoint.model):
        raise CheckpointError("a model with an encoder has no switchable adapters; merge one with --adapter DIR")
    found = {name: _matrices(checkpoint, path) for name, path in adapters.items()}
    if shares_blocks(checkpoint.model):
        separate(checkpoint.model)  # such a block may be changed differently at each place
    model = Switchable(checkpoint.model, list(adapters), _stacked(checkpoint.model, list(found.values())))
    weights: Any = _Prefixed(checkpoint.weights or OwnWeights(checkpoint.model))
    note = f"adapters that can be switched: {', '.join(adapters)}"
    return dataclasses.replace(checkpoint, model=model.eval(), weights=weights, notes=(*checkpoint.notes, note))


def _matrices(checkpoint: Checkpoint, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By module, A (rank, in_features) and B (out_features, rank) with its scale."""
    source, ours = adapter_source(checkpoint, path)
    found = {}
    for name in sorted(source.changed):
        module, _, last = ours[name].rpartition(".")
        if last != "weight" or not source.keeps(name):
            raise CheckpointError(f"{path}: it has {name} as a whole, which cannot be switched; merge it")
        if isinstance(checkpoint.model.get_submodule(module), nn.Embedding):
            raise CheckpointError(f"{path}: it changes the table {name}, which cannot be switched; merge it")
        if name in source.merged:
            found[module] = source.matrices(name)
    return found


def _stacked(
    model: nn.Module, found: Sequence[Mapping[str, tuple[Tensor, Tensor]]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """All adapters' matrices of a module in two tensors; those of less rank, and of adapters without it, are zeros."""
    stacks = {}
    for module in sorted({module for matrices in found for module in matrices}):
        rows, columns = model.get_submodule(module).weight.shape  # type: ignore[misc]
        rank = max(len(matrices[module][0]) for matrices in found if module in matrices)
        down, up = torch.zeros(len(found) + 1, columns, rank), torch.zeros(len(found) + 1, rank, rows)
        for number, matrices in enumerate(found, start=1):
            if module in matrices:
                a, b = matrices[module]
                down[number, :, : len(a)], up[number, : len(a)] = a.T, b.T
        stacks[module] = down, up
    return stacks
