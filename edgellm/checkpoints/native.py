"""edgellm's own checkpoint: a directory with edgellm.json, model.safetensors and the tokenizer's files.

``edgellm.json`` holds ``format`` (1), ``architecture``, ``config``, ``bos_token_id``, ``eos_token_ids``, ``add_bos``,
``special_tokens`` (the tokenizer's names, may be absent), ``generation`` (options, may be absent), ``task`` (null or a
:class:`edgellm_runtime.task_spec.TaskSpec`) and ``written_by``. Others may put files of their own beside these. A
directory is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from edgellm import __version__
from edgellm.checkpoints.assemble import assemble, shared_names
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.files import read_json, read_text, read_tokenizer, token_ids
from edgellm.checkpoints.find_weights import find_weights
from edgellm.checkpoints.safetensors_source import SINGLE
from edgellm.checkpoints.weights import Layout
from edgellm.errors import CheckpointError, ConfigError
from edgellm.models import registry
from edgellm.models.config import check_kinds
from edgellm_runtime.errors import OptionError
from edgellm_runtime.option_ranges import check_defaults
from edgellm_runtime.spec import SpecError
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["FORMAT", "MANIFEST", "checkpoint_directory", "open_native", "save_checkpoint"]

FORMAT = 1
MANIFEST = "edgellm.json"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"


def checkpoint_directory(path: Path) -> Path:
    """Where the checkpoint called ``path`` is: there, or where a crash while it was being replaced left the old one."""
    previous = _previous(Path(path))
    return previous if not Path(path).exists() and previous.is_dir() else Path(path)


def save_checkpoint(
    directory: Path, model: Any, *, architecture: str, tokenizer_json: str | None, chat_template: str | None = None,
    bos_token_id: int | None = None, eos_token_ids: Sequence[int] = (), add_bos: bool = False, add_eos: bool = False,
    special_tokens: Mapping[str, str] | None = None, generation: Mapping[str, Any] | None = None,
    task: TaskSpec | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint, replacing the one that is there; until it is complete, the old one stays.

    Args:
        directory: its path; what is there already must be a checkpoint that edgellm wrote.
        model: an ``nn.Module`` with ``config``.
        architecture: its name in the registry.
        tokenizer_json: the text of a ``tokenizer.json``, or None.
        chat_template: Jinja source, or None.
        bos_token_id: as in :class:`Checkpoint`.
        eos_token_ids: as in :class:`Checkpoint`.
        add_bos: as in :class:`Checkpoint`.
        add_eos: likewise.
        special_tokens: as in :class:`Checkpoint`.
        generation: as in :class:`Checkpoint`.
        task: what the model was trained to do, or None.
        extra: writes further files into the directory it is given, before the checkpoint appears.

    Raises:
        CheckpointError: something else is at ``directory``, or it cannot be written.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not (directory / MANIFEST).exists() and not _is_empty(directory):
        raise CheckpointError(f"{directory} is not a checkpoint that edgellm wrote; choose another path")
    manifest = {
        "format": FORMAT,
        "architecture": architecture,
        "config": model.config.to_json(),
        "bos_token_id": bos_token_id,
        "eos_token_ids": list(eos_token_ids),
        "add_bos": add_bos,
        **({"add_eos": True} if add_eos else {}),
        "special_tokens": dict(special_tokens or {}),
        **({"generation": dict(generation)} if generation else {}),
        "task": None if task is None else task.to_json(),
        "written_by": f"edgellm {__version__}",
    }
    described = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    texts = {MANIFEST: described, TOKENIZER: tokenizer_json, TEMPLATE: chat_template}
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in texts.items():
            if text is not None:
                (partial / name).write_text(text, encoding="utf-8", newline="")
        stored = model.state_dict()
        tensors = {names[0]: stored[names[0]].contiguous() for names in shared_names(model)}
        save_file(tensors, partial / SINGLE, metadata={"format": "pt"})
        (partial / SINGLE).chmod((partial / MANIFEST).stat().st_mode)  # safetensors leaves the umask aside
        if extra is not None:
            extra(partial)
        _publish(partial, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be written ({error}); free space or choose another path") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_native(path: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read what :func:`save_checkpoint` wrote; arguments and errors as :func:`open_checkpoint`."""
    manifest = path / MANIFEST
    data = read_json(manifest)
    found = data.get("format")
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise CheckpointError(f"{manifest}: format {found!r}, this edgellm reads up to {FORMAT}; update edgellm")
    try:
        architecture = registry.find(data["architecture"])
        check_kinds(architecture.config, data["config"])
        config = architecture.config.from_json(data["config"])
        task = None if data.get("task") is None else TaskSpec.from_json(data["task"])
    except KeyError as error:
        raise CheckpointError(f"{manifest} has no {error}; copy the checkpoint again") from error
    except (ConfigError, SpecError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest}: {error}") from error
    source = find_weights(path)
    model, weights = assemble(architecture, config, source, Layout(), dtype=dtype, path=path)
    bos = token_ids(data, "bos_token_id", manifest)
    template = path / TEMPLATE
    return Checkpoint(
        architecture=architecture.name,
        model=model,
        tokenizer_json=read_tokenizer(path / TOKENIZER),
        chat_template=read_text(template) if template.exists() else None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=token_ids(data, "eos_token_ids", manifest),
        add_bos=bool(data.get("add_bos", False)),
        add_eos=bool(data.get("add_eos", False)),
        source=f"edgellm {source.dtype}, {architecture.name}",
        weights=weights,
        task=task,
        special_tokens=_texts(data.get("special_tokens", {}), manifest),
        generation=_options(data.get("generation", {}), config.vocab_size, manifest),
    )


def _texts(value: Any, manifest: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{manifest}: special_tokens is {value!r}; it must be names and texts")
    return value


def _options(value: Any, vocab_size: int, manifest: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{manifest}: generation is {value!r}; it must be options and their values")
    try:
        return check_defaults(value, vocab_size)
    except OptionError as error:
        raise CheckpointError(f"{manifest}: generation: {error}") from error


def _previous(directory: Path) -> Path:
    directory = directory.resolve()
    return directory.with_name(f".{directory.name}.previous")


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _publish(partial: Path, directory: Path) -> None:
    """Put ``partial`` at ``directory``; at every moment there or at ``_previous`` is a whole checkpoint."""
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    previous = _previous(directory)
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
        directory.rename(previous)
    partial.rename(directory)
    _flush(directory.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
