"""Engines of a finished bundle, built anew on the device: no PyTorch, and the bundle is whole at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from edgellm_exporters.atomic import check_destination, whole_directory
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.tensorrt import Progress, add_engines, check_engine_options
from edgellm_exporters.errors import EngineError
from edgellm_runtime.bundle import MANIFEST, Bundle, Manifest

__all__ = ["build_engines", "same_file"]

_MAX_BATCH = 8


def build_engines(
    path: Path, options: Callable[[int], EngineOptions | None], progress: Progress = lambda what, share: None
) -> Manifest:
    """Replace a bundle's engines by new ones.

    Args:
        path: the bundle's directory.
        options: from the most rows that the engines before took to what to build.
        progress: told what is done, and how much of it.

    Returns:
        The new manifest.

    Raises:
        BundleError: it is no sound bundle.
        EngineError: it is for another target, or no engine can be built here.
        ExportError: the disk is full, a directory may not be written, or it holds files beside the bundle.
    """
    progress("checking files", 0.0)
    bundle = Bundle(path)
    check_destination(path, force=True)  # nothing is beside the bundle that would be lost
    if not bundle.manifest.graphs:
        raise EngineError(
            f"{path}: is for target {bundle.manifest.target['name']}, which has no engines; export the model with "
            "--target tensorrt"
        )
    most = max(
        (e.profile["tokens"].max[0] for e in bundle.manifest.engines if "tokens" in e.profile), default=_MAX_BATCH
    )
    wanted = options(most) or EngineOptions(max_batch=most)
    check_engine_options(wanted, bundle.manifest.quantization)
    with whole_directory(path, force=True) as scratch:
        for name in bundle.manifest.files.keys() - bundle.manifest.engine_files:
            same_file(path / name, scratch / name)
        manifest = add_engines(scratch, bundle.manifest, wanted, progress)
        (scratch / MANIFEST).write_text(
            json.dumps(manifest.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    return manifest


def same_file(source: Path, destination: Path) -> None:
    """Another name for a file, for weights may be many gigabytes; a copy where the disk has no second names."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
