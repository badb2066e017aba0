"""The bounds of a finished bundle on processors of the export's kind: measured, never constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from edgellm_exporters.proof.far_row import FarRow, far_bounds
from edgellm_exporters.proof.layer_bounds import layer_bounds
from edgellm_exporters.proof.same_numbers import ExactTraces, measured_exactly
from edgellm_exporters.proof.traces import Trace
from edgellm_runtime.bundle import Bundle, Manifest
from edgellm_runtime.checks.verify import EXACT, exact_bounds

__all__ = ["with_measured_bounds"]


def with_measured_bounds(
    scratch: Path, manifest: Manifest, same: ExactTraces, trace: Trace, layers: Sequence[str], far: FarRow | None
) -> tuple[Manifest, dict[str, float]]:
    """The manifest with bounds for the same numbers, the layers and the far row; and what was measured for the first.

    Args:
        scratch: the bundle, its goldens written.
        manifest: of it.
        same: what PyTorch computes with its numbers.
        trace: the float model's, of the first row.
        layers: whose outputs the graph names.
        far: PyTorch's row that begins far into the context.
    """
    measured: dict[str, float] = {}
    if same.rows:
        found = measured_exactly(scratch, same.others)
        manifest = dataclasses.replace(manifest, exact_bounds=exact_bounds(found))
        measured = {f"{EXACT}.{name}": value for name, value in found.items()}
    bundle = Bundle(scratch, checksums=False)
    if layers:
        first = (same.rows or [trace])[0]
        manifest = dataclasses.replace(manifest, layers=layer_bounds(bundle, layers, first, same.layers, trace))
    if far is not None:
        others = {} if far.float_inputs else manifest.exact_bounds  # which are wide where inputs are rounded
        manifest = dataclasses.replace(manifest, far=far_bounds(bundle, others))
    return manifest, measured
