"""What each format of each weight is expected to cost: predicted KL divergence, additive over weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgellm.streaming import Weights
from edgellm_exporters.auto.fisher import Gathered, gather
from edgellm_exporters.auto.formats import FormatChoices
from edgellm_exporters.auto.trials import tried
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.in_range import in_range
from edgellm_exporters.quantize.plan import Scheme
from edgellm_exporters.quantize.rounded_products import round_rows
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_exporters.quantize.smooth import Smoothing
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.threads import thread_count

__all__ = ["GPTQ_FACTOR", "predicted", "sensitivities"]

# Of what rounding to nearest would cost: estimates, which verification replaces. The input of the projection to the
# vocabulary is a norm's output whose directions are few, which is where GPTQ gains most.
GPTQ_FACTOR, _GPTQ_FACTOR_HEAD = 0.6, 0.35
_TUNED_FACTOR = 0.7  # of GPTQ's, where codes are tuned: measured on two texts, docs/benchmarks.md
_TOKENS, _WINDOW = 1024, 256
_ROWS = 8192  # of a weight at a time: a vocabulary's error is as large as the table itself
Progress = Callable[[str, float], None]
Predictions = dict[str, dict[Scheme, float]]
Array = NDArray[np.float32]


def sensitivities(
    model: nn.Module, weights: Weights, candidates: Sequence[FormatChoices], smoothing: Smoothing,
    windows: Sequence[Sequence[int]], *, rounds_inputs: bool, tuned: bool = False, scratch: Path | None = None,
    progress: Progress = lambda what, share: None,
) -> Predictions:  # fmt: skip
    """Nats a token that each format of each weight adds to the KL divergence from the float model.

    Linear layers and embeddings by the Fisher information, from one pass forward and backward over about 1,000 tokens;
    what other weights cost is measured, with one of them rounded at a time, the float model in memory.

    Args:
        model: in eval mode; may be on the meta device.
        weights: where its parameters are read from.
        candidates: weights and their formats.
        smoothing: what has been done to the graph's weights.
        windows: rows of token ids.
        rounds_inputs: whether the target's kernels round what they multiply with to 8 bits.
        tuned: whether codes will be tuned.
        scratch: a directory for what is computed meanwhile; None for where temporary files are.
        progress: told what is done, and how much of it.
    """
    few, apart = _cut(windows), _OneAtATime(weights)
    seen = gather(model, weights, few, scratch, lambda share: progress("measuring gradients", share))
    give_back()
    aliases = _first_names(model)
    lengths = {name: len(p) for name, p in model.named_parameters() if p.dim()}
    sources = [_Source(c, apart, smoothing, seen, aliases, lengths) for c in candidates]
    found: Predictions = {}
    with ThreadPoolExecutor(thread_count()) as pool:
        done = pool.map(lambda s: s.costs(rounds_inputs, tuned), [s for s in sources if s.known])
        for number, (source, costs) in enumerate(zip([s for s in sources if s.known], done, strict=True)):
            found[source.name] = costs
            progress("measuring sensitivities", (number + 1) / len(sources))
    unknown = [c for s, c in zip(sources, candidates, strict=True) if not s.known]
    if unknown:
        found |= tried(model, _Kept(weights), unknown, few[0], lambda share: progress("trying other weights", share))
    return {c.name: found[c.name] for c in candidates}


def predicted(predictions: Predictions, schemes: Mapping[str, Scheme]) -> float:
    """The KL divergence of an assignment, as far as the estimate goes."""
    return sum(predictions[name][scheme] for name, scheme in schemes.items())


class _OneAtATime:
    """Weights that several threads ask for, of files that have one position; follows the protocol of weights."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._lock = weights, threading.Lock()

    def read(self, name: str) -> Tensor:
        """One parameter."""
        with self._lock:
            return self._weights.read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        with self._lock:
            return self._weights.rows(name, start, stop)


class _Kept:
    """Weights that are read once; follows the protocol of weights."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._held = weights, dict[str, Tensor]()

    def read(self, name: str) -> Tensor:
        """One parameter."""
        if name not in self._held:
            self._held[name] = self._weights.read(name)
        return self._held[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one parameter."""
        return self.read(name)[start:stop]


def _cut(windows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Short windows from the beginning of each: attention's share of memory grows with their square."""
    most = max(1, _TOKENS // min(_WINDOW, len(windows[0])))
    spread = windows[:: max(1, len(windows) // most)][:most]
    return [list(window[:_WINDOW]) for window in spread]


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each of the model's names for a parameter, to the first of them."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


@dataclass(frozen=True)
class _Source:
    """What is known of one weight."""

    candidates: FormatChoices
    weights: Weights
    smoothing: Smoothing
    seen: Gathered
    aliases: Mapping[str, str]
    lengths: Mapping[str, int]

    @property
    def name(self) -> str:
        return self.candidates.name

    @property
    def _parts(self) -> list[str]:
        return [self.aliases.get(part, part) for part in parts_of(self.name)]

    @property
    def known(self) -> bool:
        """Whether gradients were gathered for all of it."""
        products = all(part in self.seen.products for part in self._parts)
        return products or (len(self._parts) == 1 and self._parts[0] in self.seen.lookups)

    def costs(self, rounds_inputs: bool, tuned: bool) -> dict[Scheme, float]:
        """Predicted KL of each format; the weight and its outputs' gradients are read some rows at a time."""
        x, lookup = self._inputs(), self._lookup()
        each = {scheme: _Effects(x, lookup) for scheme in self.candidates.schemes}
        back = torch.zeros_like(x) if x is not None and rounds_inputs else None  # (tokens, columns)
        for start in range(0, self.candidates.shape[0], _ROWS):
            weight = self._rows(start, min(start + _ROWS, self.candidates.shape[0]))
            gradient = None if x is None else self._gradients(start, start + len(weight))
            for scheme, effects in each.items():
                effects.add(weight, scheme, start, gradient)
            if back is not None and gradient is not None:
                back.addmm_(gradient, torch.from_numpy(weight))
        rounded = {}
        if back is not None and x is not None:
            rounded = _input_costs(back, x, self.candidates.schemes)
        factor = _GPTQ_FACTOR_HEAD if self.candidates.role == "head" else GPTQ_FACTOR
        factor *= _TUNED_FACTOR if tuned else 1.0
        found = {}
        for scheme, effects in each.items():
            direct, looked_up = effects.squares()
            gptq = scheme.bits < 8 and not scheme.shifted
            total = (factor if gptq else 1.0) * direct + looked_up + rounded.get(scheme.block, 0.0)
            found[scheme] = total / (2 * self.seen.tokens)
        return found

    def _rows(self, start: int, stop: int) -> Array:
        """Some rows of the weight as smoothed."""
        found = [self.weights.rows(part, *some).float().numpy() for part, some in self._within(start, stop)]
        weight = np.concatenate(found) if len(found) > 1 else found[0]
        columns, rows = self.smoothing.columns.get(self.name), self.smoothing.rows.get(self.name)
        weight = weight if columns is None else weight * columns
        weight = weight if rows is None else weight * rows[start:stop, None]
        return in_range(self.name, np.asarray(weight, dtype=np.float32))

    def _within(self, start: int, stop: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """The parts that some rows of the weight are in, and which rows of theirs these are."""
        before = 0
        for part in self._parts:
            after = before + self.lengths[part]
            first, last = max(start, before), min(stop, after)
            if first < last:
                yield part, (first - before, last - before)
            before = after

    def _inputs(self) -> Tensor | None:
        """What the product reads, as smoothed: (tokens, columns); None for what is only looked up in."""
        if self._parts[0] not in self.seen.products:
            return None
        x, columns = self.seen.products[self._parts[0]].read().float(), self.smoothing.columns.get(self.name)
        return x if columns is None else x / torch.from_numpy(np.asarray(columns, dtype=np.float32))

    def _lookup(self) -> tuple[Tensor, Tensor] | None:
        """Token ids, and the gradients of the rows that were looked up; None for what is not looked up in."""
        found = self.seen.lookups.get(self._parts[0])
        return None if found is None else (found.read(), found.gradients())

    def _gradients(self, start: int, stop: int) -> Tensor:
        """Gradients of some of the product's outputs as smoothed, (tokens, outputs)."""
        found = [self.seen.products[part].gradients(some) for part, some in self._within(start, stop)]
        some, rows = torch.cat(found, dim=1).float(), self.smoothing.rows.get(self.name)
        return some if rows is None else some / torch.from_numpy(np.asarray(rows[start:stop], dtype=np.float32))


class _Effects:
    """What a weight's error in one format does at each token, in products and in lookups."""

    def __init__(self, x: Tensor | None, lookup: tuple[Tensor, Tensor] | None) -> None:
        self._x, self._lookup = x, lookup
        self._product = torch.zeros(0 if x is None else len(x))
        self._looked_up = torch.zeros(0 if lookup is None else len(lookup[0]))

    def add(self, weight: Array, scheme: Scheme, start: int, gradient: Tensor | None) -> None:
        """Count further rows of the weight, those from ``start``, with the gradients of what they make."""
        error = torch.from_numpy(round_to_nearest(weight, scheme).dequantize() - weight)
        if gradient is not None and self._x is not None:
            self._product += ((gradient @ error) * self._x).sum(-1)
        if self._lookup is not None:
            ids, gradients = self._lookup
            here = ((ids >= start) & (ids < start + len(weight))).nonzero()[:, 0]
            self._looked_up[here] = (gradients[here].float() * error[ids[here] - start]).sum(-1)

    def squares(self) -> tuple[float, float]:
        """Sums over tokens of the squared effect, in products and in lookups."""
        return float(self._product.square().sum()), float(self._looked_up.square().sum())


def _input_costs(back: Tensor, x: Tensor, schemes: Sequence[Scheme]) -> dict[int, float]:
    """Sums over tokens of the squared effect of rounding a product's inputs, by the size of the blocks.

    Args:
        back: gradients of the inputs (tokens, columns).
        x: the inputs.
        schemes: that have the blocks.
    """
    found = {}
    for block in {scheme.block for scheme in schemes}:
        blocks = x.reshape(len(x), -1, block or x.shape[1])
        error = round_rows(blocks).reshape(x.shape) - x
        found[block] = float((back * error).sum(-1).square().sum())
    return found
