"""A divergence as a picture: layers by steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from edgellm_exporters.errors import ExportError
from edgellm_runtime.checks.divergence import Divergence

__all__ = ["draw_map"]

_LOW, _HIGH = -7, 0  # decades


def draw_map(found: Divergence, title: str, path: Path) -> None:
    """Draw the relative difference of each layer's output at each step.

    Raises:
        ExportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ExportError("a picture needs matplotlib, which is not installed; pip install matplotlib, or use --html")
    from matplotlib.figure import Figure

    names = [row.name for row in found.layers]
    figure = Figure(figsize=(10, 1.5 + 0.22 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    decades = np.log10(np.clip(found.steps, 10.0**_LOW, 10.0**_HIGH))
    image = axes.imshow(decades, aspect="auto", interpolation="nearest", vmin=_LOW, vmax=_HIGH, cmap="inferno")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("step")
    axes.set_title(title)
    figure.colorbar(image, label="relative difference, log10")
    figure.savefig(path, dpi=120)
