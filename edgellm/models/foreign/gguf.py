"""How a family reads a GGUF file's metadata and names its tensors.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from edgellm.errors import CheckpointError
from edgellm.models.foreign.keys import METADATA, Fields, Key, Values, Variant, neutral, read_keys, refuse
from edgellm.models.foreign.names import Names

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GGUF", "has", "lacks", "rows_of"]

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_MOST_NUMBERS = 4096  # of a tensor that a configuration holds: half a head's features, in the field 64
_COMMON: Mapping[str, Key] = {
    "vocab_size": METADATA,  # the embedding says it
    "tensor_data_layout": METADATA,
    "rope.scaling.type": neutral("none"),
    "rope.scaling.factor": neutral(0, 1),
    "rope.scale_linear": neutral(0, 1),
    "expert_count": neutral(0),
    "expert_used_count": neutral(0),
    "attention.causal": neutral(True),
    "use_parallel_residual": neutral(False),
}


def has(name: str) -> Callable[[Shapes], bool]:
    """Whether the file has a tensor of that name."""
    return lambda shapes: name in shapes


def lacks(name: str) -> Callable[[Shapes], bool]:
    """Whether the file has no tensor of that name."""
    return lambda shapes: name not in shapes


def rows_of(name: str) -> Callable[[Shapes], int]:
    """How many rows a tensor has."""

    def rows(shapes: Shapes) -> int:
        if not shapes.get(name):
            raise CheckpointError(f"tensor {name} is missing; convert the model again")
        return shapes[name][0]

    return rows


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """How a family reads GGUF files.

    Args:
        types: each ``general.architecture`` and what it has for itself.
        keys: of the metadata under the architecture's name, without it, read in this order; a key may use the fields
            that were read before it. A key that is not listed is refused: a file holds few, and each has a meaning.
        names: our parameter names to the file's.
        tensors: fields that the names and shapes of the file's tensors tell.
        tensor: from the configuration, the metadata, our parameter name and the tensor as stored, the tensor of the
            same shape in our layout; where the two do not differ, the very tensor it was given. None: all are stored
            as we do.
        numbers: fields that are the numbers of a small tensor, where the file has it.
        reshaped: ends of our names of parameters that are stored as the same numbers in another shape.
    """

    types: Mapping[str, Variant]
    keys: Mapping[str, Key]
    names: Names
    tensors: Mapping[str, Callable[[Shapes], Any]] = field(default_factory=dict)
    tensor: Callable[[Any, Values, str, Tensor], Tensor] | None = None
    numbers: Mapping[str, str] = field(default_factory=dict)
    reshaped: tuple[str, ...] = ()

    def read(self, metadata: Values, shapes: Shapes, numbers: Callable[[str], Sequence[float]]) -> Fields:
        """The fields of our configuration.

        Args:
            metadata: of a file of one of these architectures.
            shapes: of the file's tensors.
            numbers: reads a small tensor.

        Raises:
            CheckpointError: as :func:`read_keys`, or a key that is not known.
        """
        kind = metadata["general.architecture"]
        values = {k.removeprefix(f"{kind}."): v for k, v in metadata.items() if k.startswith(f"{kind}.")}
        if values.get("rope.scaling.type") == "none":
            values = {k: v for k, v in values.items() if not k.startswith("rope.scaling.")}
        variant = self.types[kind]
        keys: dict[str, Any] = {**self.keys, **variant.keys}
        keys |= {name: key for name, key in _COMMON.items() if name not in keys}
        fields, unknown = read_keys(keys, values)
        if unknown:
            raise refuse(unknown[0], values[unknown[0]])
        fields |= {name: told(shapes) for name, told in self.tensors.items()}
        for name, tensor in self.numbers.items():
            if tensor in shapes:
                if len(shapes[tensor]) != 1 or shapes[tensor][0] > _MOST_NUMBERS:
                    raise CheckpointError(f"tensor {tensor} has shape {shapes[tensor]}; convert the model again")
                fields[name] = numbers(tensor)
        return fields | dict(variant.fields)
