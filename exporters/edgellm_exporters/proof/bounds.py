"""Which bounds hold a bundle: those of its method, without what the model itself gives no ground for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgellm_exporters.proof.stand_in import bounds_in
from edgellm_exporters.proof.traces import Trace
from edgellm_exporters.quantize.methods import find_method
from edgellm_runtime.spec import Signature

__all__ = ["bounds_with_a_favourite", "held_by"]

_FAVOURITE = 1e-3  # mean probability of the most likely token; a model that was trained has a hundred times as much


def held_by(bounds: Mapping[str, float], signature: Signature, dtype: str) -> Mapping[str, float]:
    """A method's bounds; of float weights, those of what rounds as much as their cache does, if that has fewer bits.

    For codes these are the bounds of 8-bit weights, for float16 those of a graph in float16, which rounds no less.
    Codes are not compared.
    """
    kept = {spec.dtype for spec in signature.state} - {dtype}
    if not kept & {"int8", "float16"}:
        return bounds
    found = bounds
    if bounds == find_method("none").bounds:
        found = find_method("int8").bounds if "int8" in kept else bounds_in(bounds, "float16")
    compared = any(spec.dtype != "int8" for spec in signature.state)
    return {name: bound for name, bound in found.items() if compared or name != "state"}


def bounds_with_a_favourite(bounds: Mapping[str, float], traces: Sequence[Trace]) -> dict[str, float]:
    """Without the bound on the most likely token, where the model itself prefers none: a random one with a large
    vocabulary. The KL divergence is bounded all the same, and so are the logits of float weights.
    """
    tops = [float(t.logits.float().log_softmax(-1).amax(-1).exp().mean()) for t in traces]
    return {n: b for n, b in bounds.items() if n != "top1" or not tops or np.mean(tops) >= _FAVOURITE}
