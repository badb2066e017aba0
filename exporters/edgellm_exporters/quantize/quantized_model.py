"""Quantized models in PyTorch: the reference that quantized graphs are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgellm.streaming import OwnWeights, Weights
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.codes_on_disk import ChosenCodes, CodesOnDisk
from edgellm_exporters.quantize.in_range import in_range
from edgellm_exporters.quantize.named_weights import is_parametrized, named_weights
from edgellm_exporters.quantize.plan import ROW, Codes, Plan, Scheme
from edgellm_exporters.quantize.rounded_products import (
    ProductRounding,
    round_blocks,
    round_cache,
    round_linear,
    round_recurrence,
    round_rows,
    round_whole,
)
from edgellm_exporters.quantize.smooth import by_part

__all__ = ["RoundedWeights", "SameNumbers", "quantized_model", "quantized_stream", "same_numbers"]


@dataclass(frozen=True)
class SameNumbers:
    """A model that computes with a plan's numbers.

    Args:
        model: a copy.
        weights: where its parameters are read, where it is on the meta device.
    """

    model: nn.Module
    weights: Weights


def same_numbers(
    model: nn.Module, weights: Weights, plan: Plan, *, rounds: bool, noise: Callable[[Tensor], Tensor],
    scratch: Path | None = None,
) -> SameNumbers:  # fmt: skip
    """A copy with a plan's numbers, whether its parameters are in memory or read one by one; its cache, too.

    Args:
        model: any model in float32; it is left as it was.
        weights: where its parameters are read.
        plan: made for its graph.
        rounds: whether the target's kernels round what products read.
        noise: what such products read passes it first.
        scratch: a directory in which codes may be kept from one reading to the next; None to compute them each time.

    Raises:
        QuantizeError: as :func:`quantized_model` does.
    """
    numbers = _Numbers(model, plan, None if scratch is None else CodesOnDisk(scratch)) if plan.schemes else None
    streamed = any(p.is_meta for p in model.parameters())
    copied = copy.deepcopy(model)
    if numbers is not None:
        if streamed:
            numbers.check(dict(model.named_parameters(remove_duplicate=False)))
            weights = RoundedWeights(weights, numbers, model)
        else:
            copied = _with_numbers(copied, numbers)
        _round_products(copied, numbers, integer_products=rounds, block_products=rounds, noise=noise)
    if plan.caches:
        round_cache(copied, plan.caches, noise)
    return SameNumbers(copied, weights if streamed else OwnWeights(copied))


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
        QuantizeError: the plan quantizes nothing, or a weight that the forward computes. The copy's forward raises it
            where a weight that is neither an ``nn.Linear``'s nor a recurrence's should have its inputs rounded.
    """
    numbers = _Numbers(model, plan)
    rounded = _with_numbers(copy.deepcopy(model), numbers)
    _round_products(rounded, numbers, integer_products=integer_products, block_products=block_products, noise=_as_it_is)
    return rounded


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _with_numbers(model: nn.Module, numbers: _Numbers) -> nn.Module:
    """A model in memory with the numbers in the place of its weights."""
    model = _without_parametrizations(model)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    numbers.check(by_name)
    with torch.no_grad():
        for name in numbers.schemes:
            weight = by_name[name]
            weight.copy_(numbers.of(name, weight.detach, 0, len(weight)))
        for name, factor in numbers.vectors.items():
            by_name[name].mul_(factor)
    return model


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
    _round_products(rounded, numbers, integer_products=integer_products, block_products=block_products, noise=_as_it_is)
    return rounded, RoundedWeights(weights, numbers, model)


class _Numbers:
    """What a plan makes of a model's own weights, by the names that the model has for them.

    Args:
        model: of whose graph the plan was made.
        plan: with codes to compute.
        kept: where codes that were computed are found again; None to compute them each time.
    """

    def __init__(self, model: nn.Module, plan: Plan, kept: CodesOnDisk | None = None) -> None:
        if plan.quantize is None or not plan.schemes:
            raise QuantizeError("the plan leaves weights as they are; compare with the model itself")
        self._quantize, self._kept, self._chosen = plan.quantize, kept, plan.chosen
        self.schemes = {part: scheme for name, scheme in plan.schemes.items() for part in parts_of(name)}
        self.inputs = {part: scale for name, scale in plan.inputs.items() for part in parts_of(name)}
        self.by_rows = {part for name in plan.by_rows for part in parts_of(name) if part not in plan.chosen}
        self._columns = {part: f for name, f in plan.smoothing.columns.items() for part in parts_of(name)}
        self.orders = {name: torch.from_numpy(order) for name, order in plan.orders.items()}
        self.vectors = {name: torch.from_numpy(factor) for name, factor in plan.vectors.items()}
        self._shifts: dict[str, Tensor] = {}
        self._rows = by_part(plan.smoothing.rows, {name: len(w) for name, w in named_weights(model).items()})

    def check(self, found: Mapping[str, Any]) -> None:
        """Refuse a plan for weights that the model has no parameter for."""
        if unknown := sorted(self.schemes.keys() - found.keys()):
            raise QuantizeError(f"{unknown[0]} is computed in the forward; hold its bundle against the model itself")

    def column(self, name: str, columns: int) -> Tensor:
        """What a weight's columns were multiplied with, (columns,)."""
        return torch.from_numpy(self._columns[name]) if name in self._columns else torch.ones(columns)

    def of(
        self, name: str, read: Callable[[], Tensor], start: int, stop: int, some: tuple[int, int] | None = None
    ) -> Tensor:  # fmt: skip
        """The numbers that stand for some of a weight's rows.

        Args:
            name: of the weight.
            read: gives these rows of the float weight; not called where their codes are kept.
            start: the first row whose codes are computed together.
            stop: the one after the last.
            some: of these rows, which are wanted; None for all.
        """
        scheme, column, row = self.schemes[name], self._columns.get(name), self._rows.get(name)
        columns = None if column is None else torch.from_numpy(column)
        rows = None if row is None else torch.from_numpy(row)[start:stop, None]

        def compute() -> Codes:
            if name in self._chosen:
                return self._chosen[name]
            weight = _times(_times(read(), columns), rows)
            return self._quantize(name, in_range(name, weight.numpy()), scheme)

        cut = None if scheme.shifted and name not in self._shifts else some  # products ask for the shifts of all rows
        if isinstance(self._chosen, ChosenCodes) and name in self._chosen:
            codes = self._chosen.rows(name, *cut or (start, stop))
        elif self._kept is not None:
            codes = self._kept.get((name, start, stop), scheme.kernel_bits, compute, cut)
        else:
            codes = compute() if cut is None else compute().of_rows(*cut)
        if codes.columns and cut is None:
            self._shifts[name] = torch.from_numpy(codes.shifts().copy())
        codes = codes if cut == some else codes.of_rows(*some or (start, stop))
        found = torch.from_numpy(codes.dequantize())
        if name in self.orders:
            found = found[:, self.orders[name].argsort()]
        for scale in (columns, rows if rows is None or some is None else rows[slice(*some)]):
            found = found if scale is None else found.div_(scale)
        return found

    def rounding(
        self, name: str, shape: Sequence[int], kernel: Callable[[Tensor], Tensor], noise: Callable[[Tensor], Tensor]
    ) -> ProductRounding:
        """What a product with a weight of that shape does to what it reads."""
        scheme, (rows, columns) = self.schemes[name], shape
        row = torch.from_numpy(self._rows[name]) if name in self._rows else torch.ones(rows)
        shifts = (lambda: self._shifts[name]) if scheme.shifted else None  # known when the weight has been read
        return ProductRounding(scheme, kernel, self.column(name, columns), row, shifts, noise)


def _times(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight * scale


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
        found = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if n in numbers.schemes]
        named, self._lengths = {id(p): n for n, p in found}, {n: len(p) for n, p in found}
        self._planned = {n: named[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in named}

    def read(self, name: str) -> Tensor:
        """One parameter."""
        if name not in self._planned:
            return _times(self._weights.read(name), self._numbers.vectors.get(name))
        planned = self._planned[name]
        return self._numbers.of(planned, lambda: self._weights.read(name), 0, self._lengths[planned])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter, of memory of their own; codes that were chosen for the whole of it are cut."""
        if name not in self._planned:
            return self._weights.rows(name, start, stop)
        planned = self._planned[name]
        if planned not in self._numbers.by_rows:
            length = self._lengths[planned]
            return self._numbers.of(planned, lambda: self._weights.read(name), 0, length, (start, stop))
        return self._numbers.of(planned, lambda: self._weights.rows(name, start, stop), start, stop)


def _round_products(
    model: nn.Module, numbers: _Numbers, *, integer_products: bool, block_products: bool,
    noise: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """Have layers round what they read as the target's kernels do."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    apart: dict[nn.Module, dict[str, str]] = {}  # modules that are no linear layers: own name of a weight, and its name
    roundings: dict[str, ProductRounding] = {}
    own_classes: list[tuple[str, str, set[str]]] = []
    for name, scheme in numbers.schemes.items():
        kernel = _rounding(scheme, numbers.inputs.get(name), integer_products, block_products)
        if kernel is None:
            continue
        if name in numbers.orders:
            kernel = partial(_in_order, kernel, numbers.orders[name])
        roundings[name] = numbers.rounding(name, by_name[name].shape, kernel, noise)
        for module, own in _owners(model, by_name[name]):
            if isinstance(module, nn.Linear):
                of_layer = set[str]()
                own_classes += [] if type(module).forward is nn.Linear.forward else [(name, own, of_layer)]
                round_linear(module, roundings[name], of_layer)
            elif type(module) is not nn.Embedding:
                apart.setdefault(module, {})[own] = name
    met = {module: set[str]() for module in apart}
    for module, names in apart.items():
        round_recurrence(module, {own: roundings[name] for own, name in names.items()}, met[module])
    expected = [(name, own, met[module]) for module, names in apart.items() for own, name in names.items()]
    if expected := [*own_classes, *expected]:
        _check_met(model, expected)


def _in_order(kernel: Callable[[Tensor], Tensor], order: Tensor, x: Tensor) -> Tensor:
    """What a kernel makes of an input whose features are put into an order before, in the order that they had."""
    return kernel(x[..., order])[..., order.argsort()]


def _check_met(model: nn.Module, expected: Sequence[tuple[str, str, set[str]]]) -> None:
    """Have a model's forward refuse, at its end, weights that it has multiplied with where nothing was rounded."""
    forward = model.forward

    def checked(*given: Any, **named: Any) -> Any:
        found = forward(*given, **named)
        for name, own, met in expected:
            if own not in met:
                raise QuantizeError(
                    f"{name} is multiplied outside an nn.Linear and a recurrence, where this reference rounds no "
                    "inputs; compare with a method that leaves them floats"
                )
        return found

    model.forward = checked


def _rounding(
    scheme: Scheme, fixed: Any, integer_products: bool, block_products: bool
) -> Callable[[Tensor], Tensor] | None:
    if fixed is not None:
        return partial(round_whole, scale=float(fixed), floating=scheme.floating)
    if scheme.block == ROW:
        return round_rows if integer_products else None
    return partial(round_blocks, block=scheme.block) if block_products else None


def _owners(model: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str]]:
    """The modules that have a weight, each with its own name for it."""
    return [(m, name) for m in model.modules() for name, p in m.named_parameters(recurse=False) if p is weight]


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
