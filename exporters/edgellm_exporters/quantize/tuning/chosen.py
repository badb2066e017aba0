"""A model's weights with codes in the place of some, as PyTorch reads them while others are still being learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgellm.streaming import Weights
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.in_range import in_range
from edgellm_exporters.quantize.named_weights import named_weights
from edgellm_exporters.quantize.plan import ROW, Codes, Plan, Scheme
from edgellm_exporters.quantize.smooth import by_part

__all__ = ["ChosenWeights", "CodedWeight", "RememberedRows", "coded_weights"]


@dataclass(frozen=True)
class CodedWeight:
    """One weight's codes and the factors that it had when they were chosen.

    Args:
        name: the plan's name for it, of those that the model may have.
        scheme: its format.
        codes: its numbers.
        column: (columns,).
        row: (rows,).
    """

    name: str
    scheme: Scheme
    codes: Codes
    column: Tensor
    row: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """What some rows of codes stand for, without the factors."""
        c = self.codes
        some = Codes(c.codes[start:stop], c.scales[start:stop], c.zeros[start:stop], c.columns, c.floating)
        return torch.from_numpy(some.dequantize()) / self.column / self.row[start:stop, None]

    def with_codes(self, codes: Codes) -> CodedWeight:
        """The same weight with other numbers."""
        return dataclasses.replace(self, codes=codes)

    @property
    def tunable(self) -> bool:
        """Whether it is in blocks of whole numbers without shifts, which is what can be learned."""
        return self.scheme.block != ROW and not self.scheme.shifted


def coded_weights(model: nn.Module, weights: Weights, plan: Plan) -> dict[str, CodedWeight]:
    """All that a plan quantizes, by each name that the model has for it; codes are computed here.

    Args:
        model: of whose graph the plan was made.
        weights: where its parameters are read.
        plan: with codes to compute.
    """
    assert plan.quantize is not None
    sizes = {name: len(w) for name, w in named_weights(model).items()}
    columns = {part: f for name, f in plan.smoothing.columns.items() for part in parts_of(name)}
    rows = by_part(plan.smoothing.rows, sizes)
    schemes = {part: scheme for name, scheme in plan.schemes.items() for part in parts_of(name)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, CodedWeight] = {}
    for name, scheme in schemes.items():
        if name not in parameters:
            continue  # the forward computes it
        weight = weights.read(name).float()
        column = torch.from_numpy(columns[name]) if name in columns else torch.ones(weight.shape[1])
        row = torch.from_numpy(rows[name]) if name in rows else torch.ones(len(weight))
        codes = plan.chosen_of(name)
        if codes is None:
            codes = plan.quantize(name, in_range(name, (weight * column * row[:, None]).numpy()), scheme)
        found[id(parameters[name])] = CodedWeight(name, scheme, codes, column, row)
    return {name: found[id(p)] for name, p in parameters.items() if id(p) in found}


@dataclass
class ChosenWeights:
    """Follows :class:`edgellm.streaming.Weights`.

    Args:
        weights: the float ones.
        coded: what is read in the place of some.
    """

    weights: Weights
    coded: Mapping[str, CodedWeight] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """One parameter."""
        coded = self.coded.get(name)
        return self.weights.read(name) if coded is None else coded.rows(0, len(coded.row))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        coded = self.coded.get(name)
        return self.weights.rows(name, start, stop) if coded is None else coded.rows(start, stop)


class RememberedRows:
    """Weights whose single rows are remembered: a vocabulary's table is looked up again for each minibatch.

    Follows :class:`edgellm.streaming.Weights`.

    Args:
        weights: where they are.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._rows: dict[tuple[str, int], Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One parameter."""
        return self._weights.read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        if stop - start != 1:
            return self._weights.rows(name, start, stop)
        if (name, start) not in self._rows:
            self._rows[name, start] = self._weights.rows(name, start, stop).clone()
        return self._rows[name, start]
