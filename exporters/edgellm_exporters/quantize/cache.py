"""The key/value cache in 16 bits, or in 8: one scale for each feature of each head, found on real text.

Keys are cached after their rotation, so what is seen in the state is what will be stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from edgellm.models.protocol import LanguageModel, Step, empty_state
from edgellm.ops.schema import Op, View, views
from edgellm.streaming import Weights, resident
from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_runtime.spec import StateSpec

__all__ = ["cache_scales", "cached_states", "half_caches", "narrowed"]

_HEADROOM = 1.25  # what the text did not show: larger values are cut off
_CODES = 127
_LARGEST_HALF = 65504.0


def narrowed(
    dtype: str, graph: ir.Model, model: LanguageModel, weights: Weights, ops: Sequence[Op],
    rows: Sequence[Sequence[int]],
) -> NarrowCaches:  # fmt: skip
    """All states that can be kept in fewer bits, so kept.

    Args:
        dtype: ``float16`` or ``int8``.
        graph: as for :func:`cached_states`.
        model: in eval mode; may be on the meta device.
        weights: where its parameters are read from.
        ops: as for :func:`cached_states`.
        rows: as for :func:`cache_scales`.

    Raises:
        QuantizeError: there is no such state, or what real text puts into one cannot be held so.
    """
    names, left = cached_states(graph, model.state_specs(), ops)
    with resident(model, weights):
        if dtype == "float16":
            return NarrowCaches(halves=half_caches(model, names, left, rows), left=left)
        return NarrowCaches(scales=cache_scales(model, names, left, rows), left=left)


def cached_states(
    graph: ir.Model, specs: Sequence[StateSpec], ops: Sequence[Op]
) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """Which states can be kept in fewer bits, and why the others cannot.

    A state can if tokens are appended to it, and one node of an op whose kernel holds its caches so is all that reads
    it and all that knows what it becomes; and only together with the other caches of that node.

    Args:
        graph: of canonical ops, after the target's passes.
        specs: of the model.
        ops: whose caches the target's kernels hold so.

    Returns:
        The names of those that can, and by name the reasons of those that cannot. A recurrence is of neither.
    """
    appended = {spec.past_name: spec for spec in specs if spec.update == "append"}
    held = {
        appended[str(past.name)].name
        for view in (views(graph.graph, *ops) if ops else ())
        if all(_is_cache_of(view, name, appended) for name in view.op.caches)
        for past in view.all(view.op.caches)
    }
    kernels = " or ".join(op.name for op in ops)
    left = {
        spec.name: f"update {spec.update}" if spec.update != "append" else f"not a cache of {kernels} alone"
        for spec in specs
        if spec.update != "replace" and spec.name not in held
    }
    return [spec.name for spec in specs if spec.name in held], left


def _is_cache_of(view: View, name: str, appended: Mapping[str, StateSpec]) -> bool:
    past, present = getattr(view, name), getattr(view, view.op.caches[name])
    spec = appended.get(str(past.name)) if past is not None and past.is_graph_input() else None
    return (
        spec is not None
        and len(past.uses()) == 1
        and present.is_graph_output()
        and present.name == spec.present_name
        and not present.uses()
    )


def cache_scales(
    model: LanguageModel, names: Sequence[str], left: Mapping[str, str], rows: Sequence[Sequence[int]]
) -> Mapping[str, NDArray[np.float32]]:
    """The scale of each feature of each head.

    Args:
        model: in eval mode; able to run.
        names: of its states (batch, heads, capacity, head_dim).
        left: those that stay as they are, with the reasons, for messages.
        rows: token ids of one length, each read from an empty state.

    Returns:
        By state name, (heads * head_dim,).

    Raises:
        QuantizeError: there is no cache, or it holds something that is not finite.
    """
    found = _largest(model, names, left, rows)
    return {name: np.maximum(most * _HEADROOM / _CODES, 1e-8).astype(np.float32) for name, most in found.items()}


@torch.no_grad()
def _largest(
    model: LanguageModel, names: Sequence[str], left: Mapping[str, str], rows: Sequence[Sequence[int]]
) -> dict[str, NDArray[np.float32]]:
    """The largest number of each feature of each head on real text; arguments as for :func:`cache_scales`."""
    if not names and left:
        shown = ", ".join(f"{name} ({why})" for name, why in list(left.items())[:3])
        raise QuantizeError(f"no state can be kept in fewer bits: {shown}; leave the cache's precision out")
    if not names:
        raise QuantizeError("the model keeps no keys and values; leave the cache's precision out")
    tokens = torch.tensor([list(row) for row in rows])
    state: Mapping[str, Any] = empty_state(model, *tokens.shape)
    last = Step.whole(tokens)._replace(logit_positions=torch.full((len(tokens), 1), tokens.shape[1] - 1))
    _, state = model(tokens, state, last)
    found: dict[str, NDArray[np.float32]] = {}
    for name in names:
        largest = state[name].float().abs().amax(dim=(0, 2)).reshape(-1).numpy()  # (heads * head_dim,)
        if not np.isfinite(largest).all():
            raise QuantizeError(f"{name}: real text gives NaN or infinite keys or values; check the checkpoint")
        found[name] = largest
    return found


def half_caches(
    model: LanguageModel, names: Sequence[str], left: Mapping[str, str], rows: Sequence[Sequence[int]]
) -> frozenset[str]:
    """The states that are kept in float16: all of these, whose numbers are looked at as :func:`cache_scales` does.

    Raises:
        QuantizeError: as there, or one has numbers that float16 does not hold.
    """
    found = _largest(model, names, left, rows)
    for name, most in found.items():
        if (largest := float(most.max())) * _HEADROOM > _LARGEST_HALF:
            raise QuantizeError(
                f"{name}: real text gives keys or values of up to {largest:.0f}, and float16 holds up to "
                f"{_LARGEST_HALF:.0f}, which is less than {_HEADROOM:g} times as much; leave the cache's precision out"
            )
    return frozenset(found)
