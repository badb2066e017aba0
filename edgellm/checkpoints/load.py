"""Telling what kind of checkpoint a path is, and reading it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from edgellm.checkpoints.assemble import fill
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.gguf_file import open_gguf
from edgellm.checkpoints.hints import hint
from edgellm.checkpoints.huggingface import open_huggingface
from edgellm.checkpoints.marian import marian_config, marian_npz, open_marian, open_marian_npz
from edgellm.checkpoints.native import MANIFEST, checkpoint_directory, open_native
from edgellm.checkpoints.tensor_file import open_tensor_file
from edgellm.errors import CheckpointError

__all__ = ["load_checkpoint", "open_checkpoint"]

EXPECTED = "a directory with edgellm.json, a Hugging Face folder with config.json, or a .gguf or .pth file"


def load_checkpoint(path: Path, *, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read a checkpoint of any kind that edgellm knows.

    Args:
        path: a directory that :func:`save_checkpoint` wrote, a Hugging Face folder, a GGUF file, or a file of
            tensors alone, as authors of a family publish it.
        dtype: of the model's parameters, whatever the stored weights are in.

    Returns:
        The checkpoint, with every weight in memory.

    Raises:
        CheckpointError: there is none, it is damaged, or no architecture here computes what it describes.
    """
    opened = open_checkpoint(path, dtype=dtype)
    assert opened.weights is not None
    return dataclasses.replace(opened, model=fill(opened.model, opened.weights), weights=None)


def open_checkpoint(path: Path, *, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read everything in a checkpoint but its weights, so that memory does not grow with the model.

    Args:
        path: as for :func:`load_checkpoint`.
        dtype: what weights will be read as.

    Returns:
        The checkpoint, its model's parameters on the meta device, with ``weights`` to read them one by one.

    Raises:
        CheckpointError: as :func:`load_checkpoint`, for what the files' headers tell; reading a weight raises it for
            what is wrong with that weight.
    """
    path = checkpoint_directory(path)
    if path.is_dir():
        if (path / MANIFEST).exists():
            return open_native(path, dtype=dtype)
        if (path / "config.json").exists():
            return open_huggingface(path, dtype=dtype)
        if (config := marian_config(path)) is not None:
            return open_marian(config, dtype=dtype)
        if (weights := marian_npz(path)) is not None:
            return open_marian_npz(weights, dtype=dtype)
        raise CheckpointError(f"{path} holds no checkpoint; {hint(path) or f'expected {EXPECTED}'}")
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path, dtype=dtype)
    if path.is_file() and path.suffix == ".pth" and (found := open_tensor_file(path, dtype=dtype)) is not None:
        return found
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected {EXPECTED}")
    raise CheckpointError(f"{path} is no checkpoint; {hint(path) or f'expected {EXPECTED}'}")
