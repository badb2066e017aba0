"""A loaded bundle of each family, exported once a process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from families import make

from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load
from edgellm_runtime.model import Model


@functools.cache
def model_of(kind: str, seed: int = 0) -> Model:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    export(make(kind, seed), folder / "bundle", options=ExportOptions(target="onnx"))
    return load(folder / "bundle", threads=1)
