"""What a model computes layer by layer, one layer's weights in memory and one layer's outputs on disk.

A layer's call is had by running the model around it: the layers before it give what is stored of the last of them, and
at the layer itself the run ends. So nothing here knows what a model does between its layers, and minibatches of any
windows can be run through one layer.
"""

from __future__ import annotations

import copy
import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgellm.models.protocol import answers_sources, read_rows
from edgellm.streaming import Weights, resident
from edgellm_exporters.errors import QuantizeError

__all__ = ["GROUP", "Call", "LayerStream", "check_layers", "hidden_of", "layers_called", "shell_of"]

_NO_LAYERS = "the model has no stack of layers (an nn.ModuleList that it calls); leave --tune out"
GROUP = 8  # windows that are run at a time


@dataclass(frozen=True)
class Call:
    """What a layer was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Called(Exception):
    """The layer was reached; its call is what was wanted."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def shell_of(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device, tied as the model's are; buffers are copies."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def check_layers(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse what is seen to be no stack of layers without running it.

    Args:
        model: any.
        paths: of its layers.

    Raises:
        QuantizeError: there is none, or the model answers sources.
    """
    if hasattr(model, "state_specs") and answers_sources(model):
        raise QuantizeError("a model that answers sources cannot be tuned layer by layer; leave --tune out")
    if not paths:
        raise QuantizeError(_NO_LAYERS)


def layers_called(shell: nn.Module, weights: Weights, tokens: Tensor, paths: Sequence[str]) -> list[str]:
    """Those layers that a forward calls, in the order in which it does.

    Args:
        shell: the model, its parameters on the meta device.
        weights: where they are read.
        tokens: (batch, time), a few.
        paths: of the layers.

    Raises:
        QuantizeError: there is none, one is called twice, or :func:`check_layers` refuses.
    """
    check_layers(shell, paths)
    order: list[str] = []
    hooks = [
        shell.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: order.append(path)) for path in paths
    ]
    try:
        with torch.no_grad(), resident(shell, weights):
            read_rows(shell, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        raise QuantizeError(_NO_LAYERS)
    if len(set(order)) < len(order):
        twice = next(path for path in order if order.count(path) > 1)
        raise QuantizeError(f"{twice} is called more than once a step, and is tuned for one place; leave --tune out")
    return order


class LayerStream:
    """Windows of text on their way through a model, with one set of weights.

    Args:
        shell: the model, its parameters on the meta device; changed while a call is looked for, and put back.
        weights: where they are read.
        tokens: (windows, time), a multiple of ``group`` windows.
        order: paths of the layers, as they are called.
        file: where a layer's outputs are kept, from which names for two are made.
        group: windows that are run at a time.
    """

    def __init__(
        self, shell: nn.Module, weights: Weights, tokens: Tensor, order: Sequence[str], file: Path, group: int = GROUP
    ) -> None:  # fmt: skip
        self._shell, self._weights, self._tokens, self._order, self._file = shell, weights, tokens, order, file
        self._group = group
        self._templates: list[Any] = []
        self._bare = {path: copy.deepcopy(shell.get_submodule(path)) for path in order}
        self._outputs: Tensor | None = None  # of the last layer that was passed

    @property
    def passed(self) -> int:
        """How many layers the windows have passed."""
        return len(self._templates)

    def passed_outputs(self) -> Tensor:
        """What the last layer that was passed gave, (windows, time, width)."""
        assert self._outputs is not None
        return self._outputs

    @property
    def groups(self) -> list[range]:
        """All windows, as many together as are run at a time."""
        return [range(start, start + self._group) for start in range(0, len(self._tokens), self._group)]

    def call(self, windows: Sequence[int], path: str | None = None) -> Call:
        """What the next layer is called with for some windows, one of :attr:`groups`.

        Args:
            windows: their places.
            path: of a module to ask for instead, which is called after the layers that were passed.

        Raises:
            QuantizeError: it reads more of the layers before it than what the last of them gave.
        """
        path = path or self._order[self.passed]
        given = {p: _replay(template) for p, template in zip(self._order, self._templates, strict=False)}
        if self._outputs is not None:
            given[self._order[self.passed - 1]] = _replay(self._templates[-1], self._outputs[list(windows)])
        with torch.no_grad(), resident(self._shell, self._weights), _replaced(self._shell, {**given, path: _caught}):
            try:
                read_rows(self._shell, self._tokens[list(windows)])
            except _Called as reached:
                found = reached.call
            else:
                raise AssertionError(f"{path} was not called")
        if any(t.is_floating_point() and t.isnan().any() for t in _tensors((found.args, dict(found.kwargs)))):
            raise QuantizeError(
                f"{path} reads NaN, or more of the layers before it than the last one's output; leave --tune out"
            )
        return found

    def logits(self, windows: Sequence[int]) -> Tensor:
        """What the model makes of the last layer's outputs, once all are passed, (batch, count, vocabulary)."""
        assert self.passed == len(self._order) and self._outputs is not None
        given = {p: _replay(template) for p, template in zip(self._order, self._templates, strict=True)}
        given[self._order[-1]] = _replay(self._templates[-1], self._outputs[list(windows)])
        with torch.no_grad(), resident(self._shell, self._weights), _replaced(self._shell, given):
            return read_rows(self._shell, self._tokens[list(windows)])[0]

    def run(self, call: Call, parameters: Mapping[str, Tensor]) -> Any:
        """What the next layer gives.

        Args:
            call: of :meth:`call`.
            parameters: the layer's, by its own names for them.
        """
        return functional_call(self._bare[self._order[self.passed]], dict(parameters), call.args, dict(call.kwargs))

    @torch.no_grad()
    def call_inside(self, windows: Sequence[int], inner: str, weights: Weights) -> Call | None:
        """What a module of the next layer is called with; None: the layer does not call it.

        Args:
            windows: one of :attr:`groups`.
            inner: its path in the layer.
            weights: where the layer's parameters are read, by their names in the model.
        """
        path, call = self._order[self.passed], self.call(windows)
        bare, config = self._bare[path], cast(Any, self._shell).config
        with resident(bare, _Inside(weights, path), vocab_size=config.vocab_size), _replaced(bare, {inner: _caught}):
            try:
                bare(*call.args, **call.kwargs)
            except _Called as reached:
                return reached.call
        return None

    def parameters(self, weights: Weights) -> dict[str, Tensor]:
        """The next layer's parameters, by its own names for them."""
        path = self._order[self.passed]
        return {name: weights.read(f"{path}.{name}").detach() for name, _ in self._bare[path].named_parameters()}

    @torch.no_grad()
    def advance(self, parameters: Mapping[str, Tensor]) -> None:
        """Pass the next layer with all windows.

        Args:
            parameters: the layer's, by its own names for them.
        """
        count, outputs, template = len(self._tokens), None, None
        path = self._file.with_name(f"{self._file.name}.{self.passed % 2}")
        for windows in self.groups:
            given = self.run(self.call(windows), parameters)
            hidden = hidden_of(given, self._order[self.passed])
            if outputs is None:
                outputs = _room_for(path, (count, *hidden.shape[1:]))
                template = _mapped(given, partial(_kept, hidden))
            outputs[list(windows)] = hidden.float()
        self._templates.append(template)
        self._outputs = outputs


@dataclass(frozen=True)
class _Inside:
    """A layer's parameters by its own names for them; follows :class:`edgellm.streaming.Weights`."""

    weights: Weights
    path: str

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self.weights.read(f"{self.path}.{name}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        return self.weights.rows(f"{self.path}.{name}", start, stop)


def hidden_of(given: Any, path: str) -> Tensor:
    """The (batch, time, width) that a layer gives, alone or first in a tuple.

    Raises:
        QuantizeError: there is none.
    """
    parts = given if isinstance(given, tuple) else (given,)
    for part in parts:
        if isinstance(part, Tensor) and part.dim() == 3 and part.is_floating_point():
            return part
    raise QuantizeError(f"{path} gives no (batch, time, width) to learn from; leave --tune out")


def _room_for(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A new file's numbers, in memory as far as they are used.

    Raises:
        OSError: the disk is full. Said of a page that is written to later, it would end the process.
    """
    path.unlink(missing_ok=True)  # what was mapped before stays as it was
    with path.open("wb") as file:
        nbytes = 4 * math.prod(shape)
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot reserve
                raise
        file.truncate(nbytes)
    return torch.from_numpy(np.memmap(path, np.float32, "r+", shape=shape))


class _Hidden:
    """Stands for a layer's hidden state in what it gives."""


_HIDDEN = _Hidden()


def _nothing_of(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes no memory, and of NaN, so that it is seen where it is read."""
    value = float("nan") if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)


def _kept(hidden: Tensor, tensor: Tensor) -> Any:
    return _HIDDEN if tensor is hidden else _nothing_of(tensor)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _mapped(each, change) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(each, change) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(each, change) for each in value)
    return change(value) if isinstance(value, (Tensor, _Hidden)) else value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(each: Any) -> Any:
        found.append(each)
        return each

    _mapped(value, keep)
    return found


def _replay(template: Any, hidden: Tensor | None = None) -> Callable[..., Any]:
    """A forward that gives what a layer gave; without ``hidden``, NaN in its place."""
    nothing = torch.full((), float("nan")).expand(1, 1, 1)
    given = _mapped(template, lambda t: (nothing if hidden is None else hidden) if t is _HIDDEN else t)
    return lambda *_, **__: given


def _caught(*args: Any, **kwargs: Any) -> Any:
    raise _Called(Call(args, kwargs))


@contextmanager
def _replaced(shell: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Have modules compute something else."""
    with ExitStack() as undo:
        for path, forward in forwards.items():
            module = shell.get_submodule(path)
            module.forward = forward
            undo.callback(delattr, module, "forward")
        yield
