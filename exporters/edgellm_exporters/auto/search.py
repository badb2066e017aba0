"""Choosing a format for each weight: the least cost within a budget of KL divergence and bytes.

Both add up over weights, so a price on each turns the choice into one for each weight alone (Lagrange multipliers); the
prices are found by bisection. What prices cannot reach, exchanges of one or two formats do, and a search for each
format of the largest weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgellm_exporters.auto.formats import COSTS, FormatChoices
from edgellm_exporters.auto.rates import Rates
from edgellm_exporters.quantize.plan import Scheme

__all__ = ["QUALITY", "Choice", "Table", "front", "search", "table_of"]

Array = NDArray[np.float64]
Picked = NDArray[np.int64]
QUALITY = "quality"  # to minimise nothing but the KL divergence
_STEPS = 60  # of bisection
_PRICES = 1e9  # the largest price, and one over the smallest, of a scaled quantity
_ROUNDS = 200
_HEAVIEST, _HEAVY = 2, 0.05  # how many weights, and of what share of all bytes, are worth a search for each format


@dataclass(frozen=True)
class Choice:
    """A format for each weight, and what that is expected to cost.

    Args:
        schemes: by weight's name.
        kl: predicted, nats a token.
        nbytes: of the quantized weights.
        cost: in the unit of what is minimised.
    """

    schemes: Mapping[str, Scheme]
    kl: float
    nbytes: float
    cost: float


@dataclass(frozen=True)
class Table:
    """Every format of every weight; weights with fewer formats than others repeat their first.

    Args:
        names: of the weights.
        schemes: each weight's formats.
        kl: (weights, formats), predicted nats a token.
        nbytes: (weights, formats).
        cost: (weights, formats), what is to be minimised.
    """

    names: tuple[str, ...]
    schemes: tuple[tuple[Scheme, ...], ...]
    kl: Array
    nbytes: Array
    cost: Array

    def choice(self, picked: Picked) -> Choice:
        """The assignment with those formats."""
        schemes = {n: s[i] for n, s, i in zip(self.names, self.schemes, picked, strict=True)}
        return Choice(schemes, _sum(self.kl, picked), _sum(self.nbytes, picked), _sum(self.cost, picked))


def table_of(
    candidates: Sequence[FormatChoices], predictions: Mapping[str, Mapping[Scheme, float]], minimise: str,
    rates: Rates | None = None,
) -> Table:  # fmt: skip
    """The numbers to search in.

    Args:
        candidates: weights and their formats.
        predictions: KL of each format of each weight.
        minimise: a key of :data:`edgellm_exporters.auto.formats.COSTS`, or :data:`QUALITY`.
        rates: of formats, where they were measured.
    """
    width = max(len(c.schemes) for c in candidates)
    schemes = tuple((*c.schemes, *[c.schemes[0]] * (width - len(c.schemes))) for c in candidates)

    def numbers(of: Callable[[FormatChoices, Scheme], float]) -> Array:
        return np.array([[of(c, s) for s in own] for c, own in zip(candidates, schemes, strict=True)], dtype=np.float64)

    kl = numbers(lambda c, s: predictions[c.name][s])
    cost = kl if minimise == QUALITY else numbers(lambda c, s: COSTS[minimise](c, s, rates))
    nbytes = numbers(lambda c, s: COSTS["size"](c, s, None))
    return Table(tuple(c.name for c in candidates), schemes, kl, nbytes, cost)


def search(table: Table, max_kl: float, max_bytes: float = math.inf) -> Choice | None:
    """The cheapest assignment within both limits; among equals, the smallest. None if there is none.

    Args:
        table: the numbers.
        max_kl: of the sum of predictions.
        max_bytes: of the quantized weights.
    """
    found = [c for c in (_search(t, max_kl, max_bytes) for t in _with_heaviest_fixed(table)) if c is not None]
    return min(found, key=lambda c: (c.cost * (1 + 1e-9 * c.nbytes / _size(table.nbytes)), c.nbytes), default=None)


def _search(table: Table, max_kl: float, max_bytes: float) -> Choice | None:
    picked = _priced(table, max_kl, max_bytes)
    if picked is None:  # of few weights prices may miss what little there is
        picked = _smallest(table, max_kl, max_bytes)
    return None if picked is None else table.choice(_exchanged(table, picked, max_kl, max_bytes))


def _with_heaviest_fixed(table: Table) -> list[Table]:
    """A table for each combination of formats of the vocabulary's and other huge weights.

    What one of them saves or costs, no price spreads evenly: it takes many of the others to make up for it.
    """
    sizes = table.nbytes.max(axis=1)
    heavy = [int(i) for i in np.argsort(-sizes, kind="stable")[:_HEAVIEST] if sizes[i] > _HEAVY * sizes.sum()]
    tables = [table]
    for weight in heavy:
        tables = [_fixed(t, weight, i) for t in tables for i in range(len(set(table.schemes[weight])))]
    return tables


def _fixed(table: Table, weight: int, scheme: int) -> Table:
    def repeated(values: Array) -> Array:
        values = values.copy()
        values[weight] = values[weight, scheme]
        return values

    schemes = list(table.schemes)
    schemes[weight] = (schemes[weight][scheme],) * len(schemes[weight])
    return Table(table.names, tuple(schemes), *map(repeated, (table.kl, table.nbytes, table.cost)))


def front(table: Table, points: int = 40) -> list[Choice]:
    """Assignments from the finest to the cheapest, none of which any other beats in both KL and cost."""
    ends = [table.choice(_pick(table, price, 0.0)).kl for price in (_PRICES, 0.0)]
    found: list[Choice] = []
    for limit in np.geomspace(max(ends[0], 1e-12) * (1 + 1e-9), max(ends[1], 1e-12) * (1 + 1e-9), points):
        choice = search(table, float(limit))
        if choice is not None and (not found or choice.cost < found[-1].cost):
            found.append(choice)
    return found


def _sum(values: Array, picked: Picked) -> float:
    return float(values[np.arange(len(picked)), picked].sum())


def _pick(table: Table, kl_price: float, byte_price: float) -> Picked:
    """Each weight's cheapest format at these prices. Quantities are scaled to be of one size."""
    total = kl_price * table.kl / _size(table.kl) + (1 + 1e-9) * table.cost / _size(table.cost)
    total = total + (byte_price + 1e-9) * table.nbytes / _size(table.nbytes)  # ties go to the smaller
    return np.asarray(total.argmin(axis=1))


def _size(values: Array) -> float:
    return float(values.max(axis=1).sum()) or 1.0


def _priced(table: Table, max_kl: float, max_bytes: float) -> Picked | None:
    """The assignment at the lowest prices that keep to both limits."""

    def within(byte_price: float) -> Picked | None:
        return _lowest(lambda price: _pick(table, price, byte_price), lambda p: _sum(table.kl, p) <= max_kl)

    if within(0.0) is None:
        return None
    return _lowest(within, lambda p: p is not None and _sum(table.nbytes, p) <= max_bytes)


def _smallest(table: Table, max_kl: float, max_bytes: float) -> Picked | None:
    """The smallest assignment within a KL divergence, if it is small enough."""
    sizes = replace(table, cost=table.nbytes)
    picked = _priced(sizes, max_kl, math.inf)
    picked = None if picked is None else _exchanged(sizes, picked, max_kl, math.inf)
    return None if picked is None or _sum(table.nbytes, picked) > max_bytes else picked


def _lowest(make: Callable[[float], Picked | None], holds: Callable[[Picked], bool]) -> Picked | None:
    """What ``make`` gives at the lowest price at which it holds, None if it does not at the highest."""
    free = make(0.0)
    if free is not None and holds(free):
        return free
    low, high = -math.log(_PRICES), math.log(_PRICES)
    best = make(math.exp(high))
    if best is None or not holds(best):
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = make(math.exp(middle))
        if found is not None and holds(found):
            best, high = found, middle
        else:
            low = middle
    return best


def _exchanged(table: Table, picked: Picked, max_kl: float, max_bytes: float) -> Picked:
    """Change one or two weights' formats as long as that lowers the cost and keeps to the limits."""
    picked = picked.copy()
    for _ in range(_ROUNDS):
        found = _best_exchange(table, picked, max_kl, max_bytes)
        if not found:
            break
        for weight, scheme in found:
            picked[weight] = scheme
    return picked


def _best_exchange(table: Table, picked: Picked, max_kl: float, max_bytes: float) -> list[tuple[int, int]]:
    """The one or two changes that lower the cost most, or none."""
    weights, formats = table.kl.shape
    here = np.arange(weights)
    kl, nbytes, cost = ((t - t[here, picked][:, None]).ravel() for t in (table.kl, table.nbytes, table.cost))
    cost = cost / _size(table.cost) + 1e-9 * nbytes / _size(table.nbytes)
    spare_kl, spare_bytes = max_kl - _sum(table.kl, picked), max_bytes - _sum(table.nbytes, picked)
    owner = np.repeat(here, formats)
    # a change of nothing is among them: a pair with it is a single change
    same = np.tile(np.arange(formats), weights) == picked[owner]
    useful = np.flatnonzero((cost < 0) | (kl < 0) | (nbytes < 0) | same)
    cheaper = np.flatnonzero(cost < -1e-12)
    if not len(cheaper):
        return []
    total = cost[cheaper, None] + cost[useful]
    allowed = (kl[cheaper, None] + kl[useful] <= spare_kl) & (nbytes[cheaper, None] + nbytes[useful] <= spare_bytes)
    allowed &= owner[cheaper, None] != owner[useful]
    total = np.where(allowed, total, 0.0)
    one, two = np.unravel_index(total.argmin(), total.shape)
    if total[one, two] >= -1e-12:
        return []
    return [(int(i // formats), int(i % formats)) for i in (cheaper[one], useful[two])]
