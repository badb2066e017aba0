"""A folder's weights under the names of transformers' own model, each read and converted when it is asked for.

What a file calls a tensor, and how its numbers are laid out, transformers says itself: by the renamings and conversions
with which it loads and PEFT reads. Here they are applied to one tensor at a time, so that nothing is held.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgellm.checkpoints.assemble import shared_names
from edgellm.checkpoints.weights import CheckpointWeights, Layout, TensorSource
from edgellm.codes import CodedWeights, CodeFormat, StoredCodes
from edgellm.errors import CheckpointError

__all__ = ["CannotStream", "Converted", "built_without_weights", "renamed", "weights_of"]


class CannotStream(Exception):
    """The installed transformers loads such a folder in a way that cannot be followed tensor by tensor."""


@contextmanager
def built_without_weights() -> Iterator[None]:
    """Let every parameter that a module is given be on the meta device; buffers are what they are."""

    def emptied(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # one that is tied stays the very parameter
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook: Any = emptied  # what it gives is taken, whatever PyTorch's annotation says
    handle = nn.modules.module.register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Converted:
    """A source's tensors by the model's names; follows :class:`TensorSource`.

    Args:
        source: the tensors as they are stored.
        model: of transformers, its parameters on the meta device.

    Raises:
        CannotStream: transformers has no such conversions, or one that needs more than tensors.
    """

    def __init__(self, source: TensorSource, model: Any) -> None:
        self._source, self._model = source, model
        self._renamed: dict[str, str] = {}  # a model's name to the stored one
        self._converted: dict[str, _Group] = {}  # a model's name to what makes it, maybe others too
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, transform, stored in _plan(model, list(source.shapes)):
            if transform is None:
                self._renamed[name], self._shapes[name] = stored[0][1], source.shapes[stored[0][1]]
                continue
            group = _Group(name, transform, stored)
            for each, tensor in self._run(group, _shape_only).items():
                self._converted[each], self._shapes[each] = group, tuple(tensor.shape)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return self._shapes

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """As the source's, in float32 where tensors are put together."""
        if name in self._renamed:
            return self._source.read(self._renamed[name], rows)
        made = self._run(self._converted[name], lambda source, stored: source.read(stored).float())[name]
        return made if rows is None else made[rows[0] : rows[1]]

    def stored_whole(self, name: str) -> bool:
        """Whether a tensor is stored as it is, so that some of its rows are read alone."""
        return name in self._renamed

    def code_format(self, name: str) -> CodeFormat | None:
        """See :class:`edgellm.codes.CodedWeights`; none of what is put together."""
        if name not in self._renamed or not isinstance(self._source, CodedWeights):
            return None
        return self._source.code_format(self._renamed[name])

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        assert isinstance(self._source, CodedWeights)
        return self._source.codes(self._renamed[name])

    def _run(self, group: _Group, read: Any) -> dict[str, Tensor]:
        """All that a group makes, of what ``read`` gives for a stored name."""
        transform = copy.deepcopy(group.transform)
        for pattern, stored in group.stored:
            transform.add_tensor(group.first, stored, pattern, read(self._source, stored))
        try:
            made = transform.convert(group.first, model=self._model, config=self._model.config)
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError, NotImplementedError) as error:
            raise CannotStream(f"{group.first}: {error}") from error
        return {name: found[0] if isinstance(found, list) else found for name, found in made.items()}


class _Group:
    """Stored tensors, each with the pattern that it matched, that one conversion makes tensors of the model from."""

    def __init__(self, first: str, transform: Any, stored: list[tuple[str, str]]) -> None:
        self.first, self.transform, self.stored = first, transform, stored


def _shape_only(source: TensorSource, stored: str) -> Tensor:
    return torch.empty(source.shapes[stored], device="meta")


def _plan(model: Any, names: list[str]) -> Iterator[tuple[str, Any, list[tuple[str, str]]]]:
    """What transformers makes each of a model's tensors from: its name, a conversion or None, and stored tensors.

    Stored tensors that the model has no place for come last, by their own names, but for those that it says to ignore.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        known, prefix = model.state_dict(), model.base_model_prefix
        places = {}
        for stored in sorted(names, key=dot_natural_key):  # a list's tensors in their order
            place = rename_source_key(stored, renamings, converters, prefix, known)
            if place[0] not in known and stored in known:
                place = rename_source_key(stored, [], [], prefix, known)
            places[stored] = place
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise CannotStream(str(error)) from error
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for stored, (name, pattern) in places.items():
        if name not in known:
            continue
        transform = None if pattern is None else of_pattern[pattern]
        found = groups.setdefault(name, (transform, []))
        if found[1] and transform is None:
            raise CheckpointError(f"tensors {found[1][0][1]} and {stored} are both {name}; keep one")
        found[1].append((pattern or stored, stored))
    yield from ((name, transform, stored) for name, (transform, stored) in groups.items())
    ignored = _ignored(model)
    for stored, (name, _) in places.items():
        if name not in known and not (ignored and re.search(ignored, name)):
            yield stored, None, [(stored, stored)]


def _ignored(model: Any) -> str:
    """What a model says of stored tensors that mean nothing to it, as one pattern."""
    said = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    # of old files: tables that are computed here, and positions
    return "|".join(f"({pattern})" for pattern in sorted({*said, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"}))


def weights_of(model: Any, stored: TensorSource, path: Path) -> tuple[Converted, CheckpointWeights]:
    """Where the weights of a model that was built without are; buffers that are stored are read into it.

    Args:
        model: of transformers, its parameters on the meta device.
        stored: the folder's tensors.
        path: the folder, for messages.

    Returns:
        The tensors, and the model's parameters among them.

    Raises:
        CannotStream: as :class:`Converted`.
        CheckpointError: a tensor is missing, unknown, or of another shape.
    """
    source = Converted(stored, model)
    weights = CheckpointWeights(*_expected(model, source), source, Layout(), dtype=torch.float32, path=path)
    buffers = {name: t for name, t in model.state_dict().items() if not t.is_meta and name in source.shapes}
    if odd := next((name for name, tensor in buffers.items() if not tensor.is_floating_point()), None):
        raise CannotStream(f"{odd} is a buffer of {buffers[odd].dtype}")
    model.load_state_dict({name: weights.read(name) for name in buffers}, assign=True, strict=False)
    return source, weights


def renamed(model: nn.Module, source: TensorSource, inside: str, path: Path) -> CheckpointWeights:
    """The same weights by the names of a module that has the model inside.

    Args:
        model: the module.
        source: of the model's tensors.
        inside: what the module calls the model.
        path: the folder, for messages.
    """
    # what has no place in the model was told before; a module may since have been replaced by what it computes
    layout = Layout(name=lambda name: name.removeprefix(f"{inside}."), ignored=lambda _: True)
    return CheckpointWeights(*_expected(model, source, layout), source, layout, dtype=torch.float32, path=path)


def _expected(
    model: nn.Module, source: TensorSource, layout: Layout | None = None
) -> tuple[list[list[str]], dict[str, tuple[int, ...]]]:
    """A model's parameters and the buffers that are stored: names of one tensor together, and their shapes."""
    name_of = (layout or Layout()).name
    tensors = model.state_dict()
    groups = [g for g in shared_names(model) if tensors[g[0]].is_meta or name_of(g[0]) in source.shapes]
    return groups, {name: tuple(tensors[name].shape) for group in groups for name in group}
