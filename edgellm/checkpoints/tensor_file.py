"""Files of tensors alone, as the authors of some families publish them: what they are of, names and shapes tell."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from edgellm.checkpoints.assemble import assemble
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.files import read_tokenizer
from edgellm.checkpoints.find_weights import StoredTensors
from edgellm.checkpoints.pickle_source import PickleSource
from edgellm.checkpoints.weights import Layout
from edgellm.errors import CheckpointError, ModelError
from edgellm.models.foreign import TensorFile
from edgellm.models.registry import find_foreign, foreign_names

__all__ = ["open_tensor_file"]


def open_tensor_file(path: Path, *, dtype: torch.dtype) -> Checkpoint | None:
    """Read a file of ``torch.save``; None where it is no such file, or of no family that has files of this kind.

    Args:
        path: the file; the ``tokenizer.json`` beside it is taken, if there is one.
        dtype: what weights will be read as.

    Raises:
        CheckpointError: as :func:`edgellm.checkpoints.open_checkpoint`.
    """
    try:
        source = StoredTensors(PickleSource([path]))
    except CheckpointError:
        return None
    mark = next((name for name in foreign_names("tensors") if name in source.shapes), None)
    if mark is None:
        return None
    architecture = find_foreign("tensors", mark)
    reader = architecture.tensors
    assert reader is not None
    try:
        config = architecture.config(**reader.sizes(source.shapes))
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model, weights = assemble(architecture, config, source, _layout(reader), dtype=dtype, path=path)
    return Checkpoint(
        architecture=architecture.name, model=model, tokenizer_json=read_tokenizer(path.parent / "tokenizer.json"),
        chat_template=None, bos_token_id=None, eos_token_ids=(reader.end,), add_bos=False,
        source=f"tensors in {source.dtype}, {architecture.name}", weights=weights,
    )  # fmt: skip


def _layout(reader: TensorFile) -> Layout:
    def tensor(name: str, stored: Tensor) -> Tensor:
        if name.endswith(reader.by_columns):
            stored = stored.reshape(stored.shape[::-1]).T.contiguous()
        return reader.tensor(name, stored)

    return Layout(
        name=reader.names,
        tensor=tensor,
        ignored=lambda name: name in reader.ignored,
        reshaped=lambda name: name.endswith((*reader.reshaped, *reader.by_columns)),
    )
