"""A profile as JSON: every figure that the table, the page and the timeline are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgellm_runtime.checks import machine
from edgellm_runtime.checks.bench import versions
from edgellm_runtime.checks.kernel_times import Spent, grouped
from edgellm_runtime.checks.profile import Phase, Profile
from edgellm_runtime.checks.roofline import Roof
from edgellm_runtime.checks.traffic import Traffic
from edgellm_runtime.threads import available_cores

__all__ = ["FORMAT", "report"]

FORMAT = "edgellm profile 1"
_NOISY = 0.1


def report(found: Profile, bundle: str) -> dict[str, Any]:
    """What was found, in numbers and words.

    Args:
        found: from :func:`~edgellm_runtime.checks.profile.profile`.
        bundle: its path, as it was given.
    """
    work, roof = found.workload, found.roof
    return {
        "format": FORMAT, "bundle": bundle, "device": found.device, "threads": found.threads,
        "processor": machine.processor_name(), "load": machine.other_load(), "versions": versions(),
        "prompt_tokens": work.prompt_tokens, "new_tokens": work.new_tokens, "depth": work.depth,
        "rounds": len(found.phases[0].plain_rounds_ms), "doubts": _doubts(found),
        "roof": None if roof is None else {
            "gb_per_s": round(roof.bytes_per_s / 1e9, 2), "gflop_per_s": round(roof.operations_per_s / 1e9, 1),
            "array_mb": roof.array_bytes >> 20, "threads": roof.threads,
        },
        "phases": {phase.name: _phase(phase, found) for phase in found.phases},
    }  # fmt: skip


def _phase(phase: Phase, found: Profile) -> dict[str, Any]:
    everything = phase.kernels_ms
    layers = {spent.name: spent for spent in grouped(phase.kernels, lambda kernel: kernel.layer)}
    nothing = [Spent(name, "", name, 0, 0.0, Traffic(), 0.0, 0.0) for name in found.layers if name not in layers]
    layers |= {spent.name: spent for spent in nothing}
    rows = [
        {**_part(layers[name], everything, found.roof), "nodes": nodes, "operators": _operators(phase, name)}
        for name, nodes in found.layers.items()
    ]
    inside = None if phase.run_ms is None else round(phase.run_ms, 4)
    (step,) = grouped(phase.kernels, lambda _: "step")
    return {
        "tokens": phase.tokens, "plain_rounds_ms": _rounded(phase.plain_rounds_ms),
        "profiled_rounds_ms": _rounded(phase.profiled_rounds_ms), "plain_ms": round(phase.plain_ms, 4),
        "step_ms": round(phase.step_ms, 4), "library_ms": inside, "kernels_ms": round(everything, 4),
        "between_kernels_ms": None if inside is None else round(inside - everything, 4),
        "outside_library_ms": None if inside is None else round(phase.step_ms - inside, 4),
        "profiler_overhead": round(phase.overhead, 4),
        "step": _whole(step, phase),
        "operators": [_part(s, everything, found.roof) for s in grouped(phase.kernels, lambda kernel: kernel.op)],
        "layers": rows,
        "kernels": [
            {**_part(kernel, everything, found.roof), "operator": kernel.op, "layer": kernel.layer}
            for kernel in phase.kernels
        ],
    }  # fmt: skip


def _doubts(found: Profile) -> list[str]:
    """What speaks against the figures."""
    told = []
    if any(max(r) > (1 + _NOISY) * min(r) for p in found.phases for r in (p.plain_rounds_ms, p.profiled_rounds_ms)):
        told.append("rounds differ by more than 10%: the machine is busy, or its clock changes")
    load, cores = machine.other_load(), available_cores()
    if load is not None and load > max(cores, found.threads) + 1:
        told.append(f"{load} processes wanted to run in the minute before, on {cores} cores")
    return told


def _whole(step: Spent, phase: Phase) -> dict[str, Any]:
    """All kernels together against a step that is not profiled."""
    plain = phase.plain_ms
    return {
        "bytes": _bytes(step),
        "gb_per_s": None if step.unknown_ms else _figure(step.traffic.bytes / plain / 1e6),
        "least_ms": _figure(step.least_ms), "roof_share": _figure(step.least_ms and step.least_ms / plain),
    }  # fmt: skip


def _operators(phase: Phase, layer: str) -> dict[str, float]:
    """Milliseconds of a layer by operator."""
    inside = [kernel for kernel in phase.kernels if kernel.layer == layer]
    return {spent.name: round(spent.ms, 4) for spent in grouped(inside, lambda kernel: kernel.op)}


def _part(spent: Spent, everything: float, roof: Roof | None) -> dict[str, Any]:
    operations = spent.traffic.operations
    return {
        "name": spent.name, "count": round(spent.count, 3), "ms": round(spent.ms, 4),
        "share": round(spent.ms / everything, 4) if everything else 0.0, "bytes": _bytes(spent),
        "bytes_not_known_ms": round(spent.unknown_ms, 4), "gb_per_s": _figure(spent.gb_per_s),
        "flops": None if operations is None else round(operations),
        "gflop_per_s": None if operations is None or not spent.ms else _figure(operations / spent.ms / 1e6),
        "least_ms": _figure(spent.least_ms), "roof_share": _figure(spent.roof_share),
        "bound": roof.bound(spent.traffic) if roof is not None and spent.roof_share is not None else None,
    }  # fmt: skip


def _bytes(spent: Spent) -> dict[str, int] | None:
    """Bytes by what they are of, as far as they are known; None if nothing is."""
    if spent.unknown_ms and spent.unknown_ms >= spent.ms:
        return None
    traffic = spent.traffic
    return {
        "weights": round(traffic.weights), "state": round(traffic.state), "activations": round(traffic.activations)
    }  # fmt: skip


def _figure(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
