"""Quantized models in PyTorch: the reference that quantized graphs are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.named_weights import is_parametrized, named_weights
from edgellm_exporters.quantize.plan import ROW, Plan
from edgellm_exporters.quantize.smooth import by_part

__all__ = ["quantized_model", "round_rows", "round_whole"]


def quantized_model(model: nn.Module, plan: Plan, *, integer_products: bool = True) -> nn.Module:
    """A copy that computes with the very numbers that a plan's graph computes with.

    Weights hold what their codes stand for, smoothing taken out again; layers whose products are integer products round
    what they read, as smoothed. The rounding that 4-bit and 8-bit kernels do by themselves to what they read is left
    out.

    Args:
        model: any model in float32; it is left as it was.
        plan: made for its graph.
        integer_products: whether the target rounds what such layers read; standard ONNX operators do not.

    Raises:
        QuantizeError: the plan quantizes nothing, or a weight that the forward computes, or rounds what a weight reads
            that is not an ``nn.Linear``'s.
    """
    if plan.quantize is None or not plan.schemes:
        raise QuantizeError("the plan leaves weights as they are; compare with the model itself")
    schemes = {part: scheme for name, scheme in plan.schemes.items() for part in parts_of(name)}
    inputs = {part: scale for name, scale in plan.inputs.items() for part in parts_of(name)}
    columns = {part: f for name, f in plan.smoothing.columns.items() for part in parts_of(name)}
    rows = by_part(plan.smoothing.rows, {name: len(w) for name, w in named_weights(model).items()})
    rounded = _without_parametrizations(copy.deepcopy(model))
    by_name = dict(rounded.named_parameters(remove_duplicate=False))
    if unknown := sorted(schemes.keys() - by_name.keys()):
        raise QuantizeError(f"{unknown[0]} is computed in the forward; hold its bundle against the model itself")
    with torch.no_grad():
        for name, scheme in schemes.items():
            column = torch.from_numpy(columns[name]) if name in columns else torch.ones(by_name[name].shape[1])
            row = (torch.from_numpy(rows[name]) if name in rows else torch.ones(len(by_name[name])))[:, None]
            codes = plan.quantize(name, (by_name[name] * column * row).numpy(), scheme)
            by_name[name].copy_(torch.from_numpy(codes.dequantize()) / column / row)
            if name in inputs:
                fixed = partial(round_whole, scale=float(inputs[name]), floating=scheme.floating)
                _round_inputs(_layer(rounded, name), column, fixed)
            elif scheme.block == ROW and integer_products:
                _round_inputs(_layer(rounded, name), column, round_rows)
    return rounded


def _layer(model: nn.Module, weight: str) -> nn.Module:
    """The linear layer that a weight is of."""
    path, _, last = weight.rpartition(".")
    layer = model.get_submodule(path)
    if last != "weight" or not isinstance(layer, nn.Linear):
        raise QuantizeError(
            f"{weight} is multiplied outside an nn.Linear, where this reference rounds no inputs; compare with a "
            "method that leaves them floats"
        )
    return layer


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


def round_whole(x: Tensor, *, scale: float, floating: bool) -> Tensor:
    """What 8 bits hold of x with one scale for all of it, as whole numbers or as floats (E4M3); the rest is cut off."""
    if floating:
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return (x / scale).round().clamp(-128, 127) * scale
