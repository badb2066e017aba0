"""PyTorch with a quantized bundle's very numbers: what its graph must equal to rounding, whatever its formats cost.

Where kernels round what products read, a sum in another order can move a value across the border between two codes.
How far that reaches is measured, on copies of the rows whose products read inputs with float32's own noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from edgellm.models.protocol import LanguageModel
from edgellm.streaming import Weights, resident
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.proof.far_row import FarRow, FarStart, far_row
from edgellm_exporters.proof.goldens import golden_of
from edgellm_exporters.proof.layer_bounds import LayerDistance, furthest, layer_distances
from edgellm_exporters.proof.opened import open_proof
from edgellm_exporters.proof.traces import Sources, Trace, traces
from edgellm_exporters.quantize.plan import Plan
from edgellm_exporters.quantize.quantized_model import same_numbers
from edgellm_exporters.quantize.rounded_products import rounding_nothing
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.goldens import Golden
from edgellm_runtime.checks.verify import EXACT, distance, exact_figures, read_goldens

__all__ = ["ExactTraces", "exact_traces", "measured_exactly"]

_THREADS = (1, 2)
_COPIES, _NOISE = 3, 4 * torch.finfo(torch.float32).eps
_TARGETS = {"cpu": True, "onnx": False}  # whether kernels round what products read


@dataclass(frozen=True)
class ExactTraces:
    """What PyTorch computes with a bundle's own numbers.

    Args:
        rows: the trace of each row.
        others: how far copies of the rows, as sums in another order might make them, are from these: a copy's figures.
        layers: how far the layers of the first row's copies are from the row's, by path.
        far: a row that begins far into the context.
    """

    rows: Sequence[Trace] = ()
    others: Sequence[Mapping[str, float]] = ()
    layers: Mapping[str, LayerDistance] = field(default_factory=dict)
    far: FarRow | None = None

    def without_logits(self) -> ExactTraces:
        """What is left when goldens are written."""
        return dataclasses.replace(self, rows=[row.without_logits() for row in self.rows])


def exact_traces(
    model: LanguageModel, weights: Weights, plan: Plan, target: str, rows: Sequence[Sequence[int]],
    sources: Sources = None, start: FarStart | None = None, scratch: Path | None = None,
) -> ExactTraces:  # fmt: skip
    """What PyTorch computes with a plan's numbers, weights read one by one where the model's are.

    Args:
        model: the float model, in eval mode; it is left as it was.
        weights: where its parameters are read.
        plan: of the bundle.
        target: the bundle's.
        rows: token ids.
        sources: what they answer, where the model answers sources.
        start: of a row far into the context, or None for no such row.
        scratch: a directory for what is computed once and read in several passes; None to compute it in each.

    Raises:
        QuantizeError: this reference cannot be had, and why.
    """
    assert isinstance(model, nn.Module)
    _check(target)
    rounds = _TARGETS[target]
    found = same_numbers(
        model, weights, plan, rounds=rounds, noise=_Noise() if rounds else lambda x: x, scratch=scratch
    )
    times = 1 + _COPIES if rounds else 1
    repeated = [row for row in rows for _ in range(times)]
    theirs = None if sources is None else [source for source in sources for _ in range(times)]
    kept, others, layers = list[Trace](), list[dict[str, float]](), dict[str, LayerDistance]()
    with resident(found.model, found.weights):
        # first, for what it takes is given back before there are logits
        far = None if start is None else _far(found.model, start, plan)
        give_back()
        for i, trace in enumerate(traces(found.model, repeated, theirs)):  # type: ignore[arg-type]
            floats = {n: x for n, x in trace.state.items() if n not in plan.caches.scales}
            own = dataclasses.replace(trace, state=floats)
            if i % times == 0:
                kept.append(own.alone())
                continue
            others.append(_distance(kept[-1], own))
            if len(kept) == 1:
                layers = furthest(layers, layer_distances(kept[0], own.layers))
    return ExactTraces(kept, others, layers, far)


def _distance(row: Trace, copy: Trace) -> dict[str, float]:
    state = {name: tensor.numpy() for name, tensor in copy.state.items()}
    hidden = None if copy.hidden is None else copy.hidden.numpy()
    return distance(golden_of(row), copy.logits.numpy(), state, hidden)


def _far(model: nn.Module, start: FarStart, plan: Plan) -> FarRow | None:
    """The row far into the context; of products that round nothing, unless what a cache keeps is rounded anyway."""
    if plan.caches:
        return far_row(model, start, plan.caches)  # type: ignore[arg-type]
    with rounding_nothing():
        return far_row(model, start, float_inputs=True)  # type: ignore[arg-type]


class _Noise:
    """What another order of sums might have made of a tensor."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x * (1 + _NOISE * torch.randn(x.shape, generator=self._generator))


def _check(target: str) -> None:
    if target not in _TARGETS:
        raise QuantizeError(f"what target {target}'s kernels round is not known on this machine")


def measured_exactly(scratch: Path, others: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How far a bundle is from its goldens of the same numbers, at most, over numbers of threads and those copies.

    Args:
        scratch: the bundle, its goldens written.
        others: figures of copies, of :class:`ExactTraces`.
    """
    bundle = Bundle(scratch, checksums=False)
    goldens = read_goldens(bundle, EXACT)
    found = [_figures(bundle, goldens, count) for count in _THREADS]
    names = [name for name in found[0] if name != "state" or any(golden.state for golden in goldens)]
    return {name: max(figures[name] for figures in (*found, *others)) for name in names}


def _figures(bundle: Bundle, goldens: Sequence[Golden], threads: int) -> dict[str, float]:
    """Of a session on so many threads, which is gone before another is made."""
    give_back()
    return exact_figures(open_proof(bundle, threads), goldens)
