"""Quantized models in PyTorch: the reference that quantized graphs are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgellm.streaming import Weights
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.named_weights import is_parametrized, named_weights
from edgellm_exporters.quantize.plan import ROW, Plan, Scheme
from edgellm_exporters.quantize.smooth import by_part

__all__ = ["RoundedWeights", "quantized_model", "quantized_stream", "round_blocks", "round_rows", "round_whole"]


def quantized_model(
    model: nn.Module, plan: Plan, *, integer_products: bool = True, block_products: bool = False
) -> nn.Module:
    """A copy that computes with the very numbers that a plan's graph computes with.

    Weights hold what their codes stand for, smoothing taken out again; layers whose products are integer products round
    what they read, as smoothed. What kernels for weights in blocks round by themselves is in it where it is asked for.

    Args:
        model: any model in float32; it is left as it was.
        plan: made for its graph.
        integer_products: whether the target rounds what such layers read; standard ONNX operators do not.
        block_products: whether its kernels round to 8 bits what products with weights in blocks read, with one scale
            for each such block.

    Raises:
        QuantizeError: the plan quantizes nothing, or a weight that the forward computes, or rounds what a weight reads
            that is not an ``nn.Linear``'s.
    """
    numbers = _Numbers(model, plan)
    rounded = _without_parametrizations(copy.deepcopy(model))
    by_name = dict(rounded.named_parameters(remove_duplicate=False))
    numbers.check(by_name)
    with torch.no_grad():
        for name in numbers.schemes:
            by_name[name].copy_(numbers.of(name, by_name[name]))
    _round_products(rounded, numbers, integer_products=integer_products, block_products=block_products)
    return rounded


def quantized_stream(
    model: nn.Module, weights: Weights, plan: Plan, *, integer_products: bool = True, block_products: bool = False
) -> tuple[nn.Module, RoundedWeights]:
    """The same of a model on the meta device: a copy that is there too, and where its numbers are read one by one.

    Args:
        model: its parameters are on the meta device; it is left as it was.
        weights: where they are read.
        plan: as for :func:`quantized_model`.
        integer_products: so too.
        block_products: so too.

    Raises:
        QuantizeError: as :func:`quantized_model` does.
    """
    numbers = _Numbers(model, plan)
    numbers.check(dict(model.named_parameters(remove_duplicate=False)))
    rounded = copy.deepcopy(model)
    _round_products(rounded, numbers, integer_products=integer_products, block_products=block_products)
    return rounded, RoundedWeights(weights, numbers, model)


class _Numbers:
    """What a plan makes of a model's own weights, by the names that the model has for them.

    Args:
        model: of whose graph the plan was made.
        plan: with codes to compute.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        if plan.quantize is None or not plan.schemes:
            raise QuantizeError("the plan leaves weights as they are; compare with the model itself")
        self._quantize = plan.quantize
        self.schemes = {part: scheme for name, scheme in plan.schemes.items() for part in parts_of(name)}
        self.inputs = {part: scale for name, scale in plan.inputs.items() for part in parts_of(name)}
        self.by_rows = {part for name in plan.by_rows for part in parts_of(name)}
        self._columns = {part: f for name, f in plan.smoothing.columns.items() for part in parts_of(name)}
        self._rows = by_part(plan.smoothing.rows, {name: len(w) for name, w in named_weights(model).items()})

    def check(self, found: Mapping[str, Any]) -> None:
        """Refuse a plan for weights that the model has no parameter for."""
        if unknown := sorted(self.schemes.keys() - found.keys()):
            raise QuantizeError(f"{unknown[0]} is computed in the forward; hold its bundle against the model itself")

    def column(self, name: str, columns: int) -> Tensor:
        """What a weight's columns were multiplied with, (columns,)."""
        return torch.from_numpy(self._columns[name]) if name in self._columns else torch.ones(columns)

    def of(self, name: str, weight: Tensor, start: int = 0) -> Tensor:
        """The numbers that stand for a weight, or for those of its rows that begin at ``start``."""
        column = self.column(name, weight.shape[1])
        row = torch.ones(len(weight))
        if name in self._rows:
            row = torch.from_numpy(self._rows[name])[start : start + len(weight)]
        smoothed = (weight * column * row[:, None]).numpy()
        codes = self._quantize(name, smoothed, self.schemes[name])
        return torch.from_numpy(codes.dequantize()) / column / row[:, None]


class RoundedWeights:
    """A model's parameters as a plan's codes hold them, each computed when it is read.

    Follows :class:`edgellm.streaming.Weights`.

    Args:
        weights: the float ones.
        numbers: what stands for them.
        model: tells which of its names are one parameter's.
    """

    def __init__(self, weights: Weights, numbers: _Numbers, model: nn.Module) -> None:
        self._weights, self._numbers = weights, numbers
        named = {id(p): n for n, p in model.named_parameters(remove_duplicate=False) if n in numbers.schemes}
        self._planned = {n: named[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in named}

    def read(self, name: str) -> Tensor:
        """One parameter."""
        found = self._weights.read(name)
        return self._numbers.of(self._planned[name], found) if name in self._planned else found

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter; of codes that were chosen for the whole of it, all are made first."""
        if name not in self._planned:
            return self._weights.rows(name, start, stop)
        planned = self._planned[name]
        if planned not in self._numbers.by_rows:
            return self.read(name)[start:stop]
        return self._numbers.of(planned, self._weights.rows(name, start, stop), start)


def _round_products(model: nn.Module, numbers: _Numbers, *, integer_products: bool, block_products: bool) -> None:
    """Have layers round what they read as the target's kernels do."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for name, scheme in numbers.schemes.items():
        rounding = _rounding(scheme, numbers.inputs.get(name), integer_products, block_products)
        if rounding is None:
            continue
        column = numbers.column(name, by_name[name].shape[1])
        for layer in _layers(model, name, by_name[name]):
            _round_inputs(layer, column, rounding)


def _rounding(
    scheme: Scheme, fixed: Any, integer_products: bool, block_products: bool
) -> Callable[[Tensor], Tensor] | None:
    if fixed is not None:
        return partial(round_whole, scale=float(fixed), floating=scheme.floating)
    if scheme.block == ROW:
        return round_rows if integer_products else None
    return partial(round_blocks, block=scheme.block) if block_products else None


def _layers(model: nn.Module, name: str, weight: Tensor) -> list[nn.Linear]:
    """The linear layers that multiply with a weight; a lookup of it rounds nothing."""
    owners = [m for m in model.modules() if any(p is weight for p in m.parameters(recurse=False))]
    if any(type(m) not in (nn.Linear, nn.Embedding) for m in owners):
        raise QuantizeError(
            f"{name} is multiplied outside an nn.Linear, where this reference rounds no inputs; compare with a "
            "method that leaves them floats"
        )
    return [m for m in owners if isinstance(m, nn.Linear)]


def _without_parametrizations(model: nn.Module) -> nn.Module:
    """Weights that PyTorch computes become parameters of the same name, in place."""
    for module in list(model.modules()):
        if is_parametrized(module):
            made = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
            # not by PyTorch's own function, which would change the class that copies share
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, weight in made.items():
                module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    return model


def _round_inputs(layer: nn.Module, column: Tensor, rounding: Callable[[Tensor], Tensor]) -> None:
    def hook(_module: nn.Module, inputs: Any) -> Any:
        return (rounding(inputs[0] / column) * column,)

    layer.register_forward_pre_hook(hook)


def round_rows(x: Tensor) -> Tensor:
    """What 8 bits hold of x, with one scale for each row (its last axis)."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    return (x / largest * 127).round() * (largest / 127)


def round_blocks(x: Tensor, *, block: int) -> Tensor:
    """What 8 bits hold of x, with one scale for so many neighbours in a row."""
    return round_rows(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)


def round_whole(x: Tensor, *, scale: float, floating: bool) -> Tensor:
    """What 8 bits hold of x with one scale for all of it, as whole numbers or as floats (E4M3); the rest is cut off."""
    if floating:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return (x / scale).round().clamp(-128, 127) * scale
