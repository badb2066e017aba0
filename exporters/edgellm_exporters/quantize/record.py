"""What a manifest says of how a model was quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgellm_exporters.quantize.plan import Plan

__all__ = ["recorded"]


def recorded(plan: Plan, method: str) -> dict[str, Any]:
    """The manifest's ``quantization``.

    Args:
        plan: of the bundle's graph.
        method: what was asked for.
    """
    cache = plan.caches.record
    if not plan.schemes:
        return {"method": "none", **cache}
    counted = dict(Counter(map(str, plan.schemes.values())))
    rounding = "GPTQ" if plan.calibrated else "round to nearest"
    floats = {"floats": {name: list(shape) for name, shape in sorted(plan.floats.items())}} if plan.floats else {}
    kept: dict[str, Any] = {"kept": len(plan.kept)} if plan.kept else {}
    if plan.left:
        kept["left"] = dict(sorted(plan.left.items()))
    if plan.tuned:
        kept["tuning"] = dict(plan.tuned)
    return {"method": method, "rounding": rounding, "weights": counted, **kept, **floats, **cache}
