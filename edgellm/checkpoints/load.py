"""Telling what kind of checkpoint a path is, and reading it."""

from __future__ import annotations

from pathlib import Path

import torch

from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.gguf_file import load_gguf
from edgellm.checkpoints.huggingface import load_huggingface
from edgellm.checkpoints.native import MANIFEST, checkpoint_directory, load_native
from edgellm.errors import CheckpointError

__all__ = ["load_checkpoint"]

EXPECTED = "a directory with edgellm.json, a Hugging Face folder with config.json, or a .gguf file"


def load_checkpoint(path: Path, *, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read a checkpoint of any kind that edgellm knows.

    Args:
        path: a directory that :func:`save_checkpoint` wrote, a Hugging Face folder, or a GGUF file.
        dtype: of the model's parameters, whatever the stored weights are in.

    Raises:
        CheckpointError: there is none, it is damaged, or no architecture here computes what it describes.
    """
    path = checkpoint_directory(path)
    if path.is_dir():
        if (path / MANIFEST).exists():
            return load_native(path, dtype=dtype)
        if (path / "config.json").exists():
            return load_huggingface(path, dtype=dtype)
        raise CheckpointError(f"{path} holds no checkpoint; expected {EXPECTED}")
    if path.is_file() and path.suffix == ".gguf":
        return load_gguf(path, dtype=dtype)
    raise CheckpointError(f"{path} {'is no checkpoint' if path.exists() else 'does not exist'}; expected {EXPECTED}")
