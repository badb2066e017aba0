"""What makes tracing quick and light: parameters without numbers, and canonical ops straight away.

Nothing here knows an architecture or a target.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from edgellm.ops.canonical import emit
from edgellm_exporters.errors import CaptureError
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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return emit("Linear", [x, weight, bias], [(x.dtype, (*x.shape[:-1], weight.shape[0]))])[0]


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    return emit("Embedding", [weight, indices], [(weight.dtype, (*indices.shape, weight.shape[1]))])[0]


def _looked_up(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **more: Any,
) -> Tensor:
    if max_norm is not None:  # it changes the table
        return F.embedding(indices, weight, padding_idx, max_norm, *rest, **more)
    return _embedding(weight, indices)


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if len(shape) != 1:
        raise CaptureError(f"rms_norm over {len(shape)} axes cannot be exported; normalise the last axis only")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    weight = torch.ones(shape[0], dtype=x.dtype) if weight is None else weight
    return emit("RMSNorm", [x, weight], [(x.dtype, x.shape)], {"epsilon": eps})[0]


# PyTorch's own ops that stay whole in the graph, so that quantizers and targets see them as they were written.
_OPS = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.embedding.default: _embedding,
    torch.ops.aten.rms_norm.default: _rms_norm,
}
_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    F.embedding: _looked_up,
    torch.embedding: _embedding,
    torch.rms_norm: _rms_norm,
    F.rms_norm: _rms_norm,
}


class CanonicalFunctions(TorchFunctionMode):
    """Emits canonical nodes for the functions that models call, as soon as they are called."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        return _FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


def canonical(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Make canonical what came from within PyTorch's own functions, and give each written tensor a new value.

    There is nothing of either kind, as a rule, and then this costs nothing.
    """
    if any(node.target in _OPS or writes(node) for node in program.graph.nodes):
        decomposed: torch.export.ExportedProgram = program.run_decompositions(_OPS)
        return decomposed
    return program
