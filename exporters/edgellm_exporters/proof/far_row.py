"""PyTorch's side of a row that begins far into the context, over a made-up past."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.models.protocol import LanguageModel, Step
from edgellm.ops import ATTENTION
from edgellm.ops.attention import attention_reference
from edgellm.ops.schema import computed_by
from edgellm_exporters.proof.opened import open_floats, open_proof
from edgellm_exporters.proof.traces import Trace
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.weights.memory import give_back
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.far import (
    FAR,
    far_distances,
    far_golden,
    made_up,
    page_by_page,
    reads_floats,
    written_slots,
)
from edgellm_runtime.checks.goldens import goldens_file
from edgellm_runtime.checks.verify import MARGIN
from edgellm_runtime.spec import StateSpec

__all__ = ["FarRow", "FarStart", "far_bounds", "far_row", "far_start"]

_TOKENS = 12
# Of a row's past, what grows with it is as far into the context as this goes. Most of it is zeros, which take no memory
# and are read once a step; a cache in fewer bits is kept by a reference that holds all of it as floats, twice.
_STATE_BYTES, _KEPT_BYTES = 512 << 20, 64 << 20
_SPREAD = 3**-0.5  # the standard deviation of what is even between -1 and 1
_GENTLE = 0.25  # of a state's own spread: made-up keys as large as real ones make attention choose at random
_TELLS = 0.1  # a KL divergence of the bundle from the very same numbers at which a far row proves nothing
_FLOORS: Mapping[str, Mapping[str, float]] = {  # what sums in another order cost
    "float32": {"logits": 1e-4, "kl": 1e-6, "state": 1e-4}, "float16": {"logits": 0.02, "kl": 1e-4, "state": 0.01},
}  # fmt: skip


@dataclass(frozen=True)
class FarStart:
    """Where a far row begins: tokens before it, the scales of its made-up state, and what it reads."""

    past: int
    scales: Mapping[str, float]
    tokens: Sequence[int]


@dataclass(frozen=True)
class FarRow:
    """What PyTorch computes for such a row; the trace's state is what its tokens write.

    ``float_inputs``: by products that round nothing they read, whatever the bundle's kernels round.
    """

    start: FarStart
    trace: Trace
    float_inputs: bool = False


def far_start(model: LanguageModel, trace: Trace, max_context: int, *, rounds: bool = False) -> FarStart | None:
    """Where a far row may begin; None where the context is too short, or a state holds no float32 numbers.

    Args:
        model: the float model.
        trace: of a short row; made-up numbers are as large as those of its state.
        max_context: of the bundle.
        rounds: whether the bundle keeps its cache in fewer bits than the model.
    """
    specs, tokens = model.state_specs(), trace.tokens[:_TOKENS]
    if not specs or any(spec.dtype != "float32" for spec in specs):
        return None
    grows = sum(spec.nbytes(1, 2) - spec.nbytes(1, 1) for spec in specs)
    most = _KEPT_BYTES if rounds else _STATE_BYTES
    past = min(max_context - len(tokens), most // grows if grows else max_context)
    if past <= len(trace.tokens) // 2:
        return None
    return FarStart(past, {spec.name: _scale(trace.state[spec.name]) for spec in specs}, tokens)


def _scale(tensor: Tensor) -> float:
    """A power of two, so that every dtype holds the made-up numbers."""
    found = float(tensor.double().std(correction=0)) if tensor.numel() else 0.0
    return 2.0 ** round(math.log2(_GENTLE * found / _SPREAD)) if found > 1e-6 and math.isfinite(found) else 1.0


@torch.no_grad()
def far_row(
    model: LanguageModel, start: FarStart, caches: NarrowCaches | None = None, *, float_inputs: bool = False
) -> FarRow | None:  # fmt: skip
    """Run a far row; None where it gives no finite logits, for the model may not be made for such a past.

    Args:
        model: able to run.
        start: of the row.
        caches: that the bundle keeps in fewer bits; None for none.
        float_inputs: whether the model rounds nothing where the bundle's kernels would.
    """
    length, specs, caches = len(start.tokens), model.state_specs(), caches or NarrowCaches()
    tokens = torch.tensor([list(start.tokens)])
    lengths = torch.tensor([length], dtype=torch.int32)
    step = Step(torch.tensor([start.past], dtype=torch.int32), lengths, torch.arange(length)[None])
    past = {spec.name: _past(spec, start, length, caches) for spec in specs}
    with computed_by({ATTENTION.name: _only_written(past, start.past)}):
        logits, state = model(tokens, past, step)
    if not bool(logits.isfinite().all()):
        return None
    written = {
        s.name: tensor[written_slots(s, start.past, length) if tensor.shape == past[s.name].shape else ()][0].clone()
        for s in specs
        for tensor in (state[s.name],)
    }
    trace = Trace(list(start.tokens), logits[0], {n: t for n, t in written.items() if n not in caches.scales})
    return FarRow(start, trace, float_inputs)


def _only_written(past: Mapping[str, Tensor], start: int) -> Callable[..., Any]:
    """Attention that gives of a state's caches what it wrote alone: of whole ones, memory would hold a copy each."""
    ours = {id(tensor) for tensor in past.values()}

    def attention(q: Tensor, k: Tensor, v: Tensor, past_k: Any, past_v: Any, *rest: Any, **more: Any) -> Any:
        y, *present = attention_reference(q, k, v, past_k, past_v, *rest, **more)
        written = slice(start, start + q.shape[1])
        return y, *(
            new[:, :, written].clone() if new is not None and id(old) in ours else new
            for old, new in zip((past_k, past_v), present, strict=True)
        )

    return attention


def _past(spec: StateSpec, start: FarStart, length: int, caches: NarrowCaches) -> Tensor:
    whole = page_by_page(spec.resolve(1, start.past + length), np.float32)
    if (scales := caches.scales.get(spec.name)) is None:
        where, numbers = made_up(spec, start.past, start.scales[spec.name])
    else:
        where, numbers = made_up(dataclasses.replace(spec, dtype="int8"), start.past, 1.0)
        numbers = numbers * scales.reshape(1, whole.shape[1], 1, whole.shape[3])
    whole[where] = numbers.astype(np.float16) if spec.name in caches.halves else numbers
    return torch.from_numpy(whole)


def far_bounds(bundle: Bundle, bounds: Mapping[str, float]) -> dict[str, float]:
    """What a finished bundle is held to at its far row: as the short rows are, or as far as measured with a margin.

    Nothing, where a model takes a made-up past so badly that rounding alone moves it by more than a bound could tell.

    Args:
        bundle: its goldens written.
        bounds: of the short rows' goldens, where they were measured.
    """
    data = goldens_file(bundle)[FAR]
    found = [figures for threads in (1, 2) for figures in _figures(bundle, data, threads)]
    floors = _FLOORS[bundle.manifest.dtype]
    if not max(f["kl"] for f in found) <= _TELLS:
        return {}
    names = [name for name in floors if name != "state" or data["state"]]
    return {n: max(MARGIN * max(f[n] for f in found), bounds.get(n, 0.0), floors[n]) for n in names}


def _figures(bundle: Bundle, data: Mapping[str, Any], threads: int) -> list[dict[str, float]]:
    """How far a bundle is from its far row, all at once and token by token; its session goes before another is made."""
    give_back()
    session = open_floats(bundle, threads) if reads_floats(bundle, data) else open_proof(bundle, threads)
    far = far_golden(data, bundle.manifest.width, session)
    return far_distances(session, far)
