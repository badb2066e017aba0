"""A model whose weights are not in memory: where they are read from, and how PyTorch runs all the same.

The module itself stays on the meta device. Nothing here knows an architecture: what is read, and when, follows from
which module owns a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["BLOCK_BYTES", "OwnWeights", "Weights", "resident", "row_blocks"]

BLOCK_BYTES = 16 << 20  # of a table, read at a time


class Weights(Protocol):
    """A model's parameters by the names that it gives them, read when they are asked for."""

    def read(self, name: str) -> Tensor:
        """One parameter, finite and in the model's dtype and layout."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        ...


class OwnWeights:
    """The parameters that a model holds itself; follows :class:`Weights`.

    Args:
        model: whose parameters are in memory, and stay the same tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))

    def read(self, name: str) -> Tensor:
        """One parameter; not a copy."""
        return self._parameters[name].detach()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter; not a copy."""
        return self.read(name)[start:stop]


def row_blocks(shape: torch.Size, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Where to cut a matrix so that no part is much larger than :data:`BLOCK_BYTES`: starts and stops of its rows."""
    rows = max(1, BLOCK_BYTES // max(1, shape[1:].numel() * dtype.itemsize))
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


@contextmanager
def resident(model: Any, weights: Weights, *, vocab_size: int | None = None) -> Iterator[None]:
    """Let a model on the meta device run: each module's weights are read when it is entered, dropped when it is left.

    Hooks that others put on modules meanwhile see a module's real weights, and may replace them until it is left.
    Weights that a function takes while their module is not running, and the vocabulary's tables, are read for that one
    function; tables by rows where it is a lookup or a product. Tensors that are not on the meta device are left alone.

    Args:
        model: an ``nn.Module``.
        weights: the source of its parameters.
        vocab_size: rows of a table; None for the model's ``config.vocab_size``.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.is_meta}
    tables = {id(p) for p in model.parameters() if p.is_meta and _is_table(p, vocab_size or model.config.vocab_size)}
    held: list[_Holder] = []
    with ExitStack() as undo:
        for module in model.modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) in names and id(p) not in tables}
            if own:
                undo.callback(_Holder(module, own, {n: names[id(p)] for n, p in own.items()}, weights, held).close)
        if names:
            undo.enter_context(_ReadWhenUsed(names, tables, weights))
        yield


def _is_table(parameter: Tensor, vocab: int) -> bool:
    shape = parameter.shape
    return len(shape) == 2 and shape[0] == vocab and len(row_blocks(shape, parameter.dtype)) > 1


class _Holder:
    """Gives one module its weights while it runs.

    Args:
        module: the module.
        own: its parameters by its own names for them, on the meta device: the very ones that tie modules together.
        names: what the model calls them.
        weights: where they are.
        held: holders whose module has run.
    """

    def __init__(
        self, module: nn.Module, own: Mapping[str, nn.Parameter], names: Mapping[str, str], weights: Weights,
        held: list[_Holder],
    ) -> None:  # fmt: skip
        self._module, self._own, self._names, self._weights, self._held = module, own, names, weights, held
        self._depth = 0
        self._hooks = [
            module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave, always_call=True)
        ]  # fmt: skip

    def _enter(self, _module: nn.Module, _inputs: Any) -> None:
        for other in [h for h in self._held if not h._depth]:  # a later hook may have put real weights back
            other._restore()
            self._held.remove(other)
        self._depth += 1
        if self._depth == 1:
            for name, full in self._names.items():
                setattr(self._module, name, nn.Parameter(self._weights.read(full), requires_grad=False))
            self._held.append(self)

    def _leave(self, _module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._restore()

    def _restore(self) -> None:
        for name, parameter in self._own.items():
            setattr(self._module, name, parameter)

    def close(self) -> None:
        """Leave the module as it was."""
        for hook in self._hooks:
            hook.remove()
        self._restore()


# What can be asked of a parameter without its numbers: properties that are no views of it, and a few methods.
_VIEWS = {getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real", "imag")}
# Nor is a parameter read to be told whether it needs gradients: what would be told is not the parameter.
_FACTS = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size, Tensor.__len__,
    Tensor.requires_grad_,
}  # fmt: skip


def _asks_for_numbers(func: Any) -> bool:
    return func not in _FACTS and (func.__name__ != "__get__" or func in _VIEWS)


class _ReadWhenUsed(TorchFunctionMode):
    """Reads a weight for a function that takes it.

    Args:
        names: of parameters on the meta device, by id.
        tables: which of them are too large to be read whole.
        weights: where they are.
    """

    def __init__(self, names: Mapping[int, str], tables: Set[int], weights: Weights) -> None:
        super().__init__()
        self._names, self._tables, self._weights = names, tables, weights

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if not any(id(x) in self._names for x in _flat((args, kwargs))):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return torch.device("cpu")
        if not _asks_for_numbers(func):
            return func(*args, **kwargs)
        if func in _BY_ROWS and len(args) > 1 and id(args[1]) in self._tables:
            rows = partial(self._weights.rows, self._names[id(args[1])])
            return _BY_ROWS[func](rows, *args, **self._real(kwargs))
        return func(*self._real(args), **self._real(kwargs))

    def _real(self, value: Any) -> Any:
        if id(value) in self._names:
            return self._weights.read(self._names[id(value)])
        if type(value) is dict:
            return {key: self._real(each) for key, each in value.items()}
        return type(value)(map(self._real, value)) if type(value) in (list, tuple) else value


def _flat(value: Any) -> Iterator[Any]:
    if type(value) in (list, tuple, dict):
        for each in value.values() if type(value) is dict else value:
            yield from _flat(each)
    else:
        yield value


Rows = Callable[[int, int], Tensor]


def _lookup(
    rows: Rows, tokens: Tensor, table: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    """``F.embedding`` of a table that is read by rows."""
    if max_norm is not None:
        return F.embedding(tokens, rows(0, table.shape[0]), padding_idx, max_norm)
    found, places = torch.unique(tokens, return_inverse=True)
    return F.embedding(places, torch.cat([rows(i, i + 1) for i in found.tolist()]))


def _product(rows: Rows, x: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with a table that is read by rows; where gradients are wanted, they are read again for these."""
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _TableProduct.apply(x, rows, table, bias)  # type: ignore[no-untyped-call]
        return product
    y = x.new_empty(*x.shape[:-1], table.shape[0])
    for start, stop in row_blocks(table.shape, table.dtype):
        y[..., start:stop] = F.linear(x, rows(start, stop), None if bias is None else bias[start:stop])
    return y


class _TableProduct(torch.autograd.Function):
    """:func:`_product` of what needs gradients: pieces that autograd put together would each be a copy of the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, table: Tensor, bias: Tensor | None) -> Tensor:
        """(..., columns) to (..., rows)."""
        ctx.rows, ctx.blocks = rows, row_blocks(table.shape, table.dtype)
        with torch.no_grad():
            return _product(rows, x, table, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Of the input alone."""
        total: Tensor | None = None
        for start, stop in reversed(ctx.blocks):
            part = gradients[0][..., start:stop] @ ctx.rows(start, stop)
            total = part if total is None else total.add_(part)
        return total, None, None, None


_BY_ROWS: Mapping[Any, Callable[..., Tensor]] = {F.embedding: _lookup, F.linear: _product}
