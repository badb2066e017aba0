"""An adapter in a folder of its own, merged into a checkpoint of any kind as its weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from edgellm.checkpoints.assemble import shared_names
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.lora_source import ADAPTER_CONFIG, LoraSource, with_adapter
from edgellm.checkpoints.shared_blocks import check_tables, give_own
from edgellm.checkpoints.weights import CheckpointWeights, Layout
from edgellm.codes import CodeFormat, StoredCodes
from edgellm.errors import CheckpointError, ConfigError
from edgellm.models import registry

__all__ = ["adapted", "adapter_source"]


def adapted(checkpoint: Checkpoint, adapter: Path) -> Checkpoint:
    """The checkpoint with an adapter in PEFT's layout merged into its weights.

    Args:
        checkpoint: opened, its parameters on the meta device.
        adapter: a folder with ``adapter_config.json``, as PEFT or ``edgellm train --lora`` writes it.

    Raises:
        CheckpointError: there is no adapter, it is one of another base, or it cannot be merged.
    """
    source, ours = adapter_source(checkpoint, adapter)
    more = give_own(checkpoint.model, [ours[name] for name in source.changed])
    weights = CheckpointWeights(
        shared_names(checkpoint.model), {own: source.shapes[name] for name, own in ours.items()}, source,
        Layout(name=_foreign(checkpoint)), dtype=checkpoint.weights.dtype, path=adapter,  # type: ignore[union-attr]
    )  # fmt: skip
    notes = [f"the adapter {adapter.name} was merged into {len(source.changed)} tensors"]
    if more:
        notes.append(f"it changes shared blocks differently at each place, so {more} tensors were doubled")
    return dataclasses.replace(
        checkpoint, weights=weights, notes=(*checkpoint.notes, *notes), apart=checkpoint.apart or more > 0
    )


def adapter_source(checkpoint: Checkpoint, adapter: Path) -> tuple[LoraSource, Mapping[str, str]]:
    """A checkpoint's tensors in our layout with what an adapter changes, and our name of each.

    Raises:
        CheckpointError: as :func:`adapted`.
    """
    if not (adapter / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{adapter} has no {ADAPTER_CONFIG}; name the folder of an adapter in PEFT's layout")
    if checkpoint.weights is None:
        raise CheckpointError(f"{adapter}: transformers had to load the weights itself; merge the adapter with PEFT")
    weights, name = checkpoint.weights, _foreign(checkpoint)
    shapes = {ours: tuple(tensor.shape) for ours, tensor in checkpoint.model.state_dict().items()}
    ours = {name(own): own for own in shapes}
    source = with_adapter(_Named(weights, ours, shapes), adapter, lambda theirs, x: weights.in_layout(ours[theirs], x))
    try:
        check_tables(checkpoint.model, {ours[name]: name for name in source.changed})
    except CheckpointError as error:
        raise CheckpointError(f"{adapter}: {error}") from error
    return source, ours


class _Named:
    """A model's weights by the names that adapters know them by.

    Args:
        weights: by the model's names.
        ours: those, by the adapters'.
        shapes: by the model's.
    """

    def __init__(
        self, weights: CheckpointWeights, ours: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:  # fmt: skip
        self._weights, self._ours = weights, ours
        self.shapes: Mapping[str, tuple[int, ...]] = {name: shapes[own] for name, own in ours.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or the rows from one index up to another."""
        own = self._ours[name]
        return self._weights.read(own) if rows is None else self._weights.rows(own, *rows)

    def code_format(self, name: str) -> CodeFormat | None:
        """See :class:`edgellm.codes.CodedWeights`."""
        return self._weights.code_format(self._ours[name])

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        return self._weights.codes(self._ours[name])


def _foreign(checkpoint: Checkpoint) -> Callable[[str], str]:
    """Our name of a parameter to the one that adapters have for it: Hugging Face's, where the family has such."""
    try:
        reader = registry.find(checkpoint.architecture).huggingface
    except ConfigError:  # taken over from transformers, whose own model is a part of ours
        return lambda name: name.removeprefix("model.")
    return (lambda name: name) if reader is None else reader.names
