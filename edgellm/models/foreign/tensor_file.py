"""How a family reads a file that holds tensors and nothing else, as its authors publish it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.models.foreign.gguf import Shapes
from edgellm.models.foreign.names import Names

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TensorFile"]


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """How a family reads such a file.

    Args:
        mark: a tensor that every such file has, and no other family's.
        sizes: the fields of our configuration, from the names and shapes of the tensors; raises a
            :class:`edgellm.errors.ModelError` for shapes that give none.
        names: our parameter names to the file's.
        tensor: our parameter name and a tensor as stored, with our shape, to the tensor in our layout.
        reshaped: ends of our names of parameters that are stored as the same numbers in another shape.
        by_columns: ends of our names of matrices that are stored by columns.
        ignored: names of tensors that mean nothing to the model.
        end: the token that ends a text.
    """

    mark: str
    sizes: Callable[[Shapes], Mapping[str, Any]]
    names: Names
    tensor: Callable[[str, Tensor], Tensor]
    reshaped: tuple[str, ...] = ()
    by_columns: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    end: int
