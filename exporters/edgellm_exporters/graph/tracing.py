"""What makes tracing quick and light: parameters without numbers, and canonical ops straight away.

Nothing here knows an architecture or a target.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from edgellm.ops.schema import OPS, Op
from edgellm_exporters.graph.complex_pairs import MAKERS, Pair
from edgellm_exporters.graph.decompose import writes

__all__ = ["CanonicalFunctions", "canonical", "fake_parameters", "no_collection"]


@contextmanager
def fake_parameters(model: nn.Module) -> Iterator[None]:
    """Put tensors without storage in the place of a model's parameters; tied ones stay tied."""
    kept = list(model.named_parameters(remove_duplicate=False))
    with FakeTensorMode():
        fakes = {
            id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cpu"), requires_grad=False) for _, p in kept
        }
    try:
        for name, parameter in kept:
            _set(model, name, fakes[id(parameter)])
        yield
    finally:
        for name, parameter in kept:
            _set(model, name, parameter)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold back the garbage collector: tracing makes millions of objects and drops few."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _captured(*, operators: bool) -> dict[Any, Callable[..., Tensor]]:
    """What ops stand for: with ``operators`` those that programs consist of, else the functions that models call."""
    every = {function: make for op in OPS.values() for function, make in op.functions.items()}
    return {function: make for function, make in every.items() if isinstance(function, OpOverload) == operators}


class CanonicalFunctions(TorchFunctionMode):
    """Emits canonical nodes for the functions that models call, as soon as they are called.

    Args:
        but: an op whose own functions are left alone, for its reference may be made of them.
    """

    def __init__(self, but: Op | None = None) -> None:
        super().__init__()
        self._found: dict[Any, Callable[..., Any]] = {
            f: make for f, make in _captured(operators=False).items() if but is None or f not in but.functions
        } | dict(MAKERS)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        if any(isinstance(x, Pair) for x in args):
            return Pair.__torch_function__(func, types, args, kwargs)
        return self._found.get(func, func)(*args, **(kwargs or {}))


def canonical(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Make canonical what came from within PyTorch's own functions, and give each written tensor a new value.

    There is nothing of either kind, as a rule, and then this costs nothing.
    """
    operators = _captured(operators=True)
    if any(node.target in operators or writes(node) for node in program.graph.nodes):
        decomposed: torch.export.ExportedProgram = program.run_decompositions(operators)
        return decomposed
    return program
