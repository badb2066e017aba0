"""Hugging Face folders: config.json, weights and the files beside them that change what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgellm.checkpoints.assemble import assemble
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.files import read_json
from edgellm.checkpoints.huggingface_text import read_text_files
from edgellm.checkpoints.safetensors_source import SafetensorsSource
from edgellm.checkpoints.weights import Layout
from edgellm.errors import CheckpointError, ModelError
from edgellm.models.registry import Architecture, find_foreign

__all__ = ["open_huggingface"]

_ADAPTER = "adapter_config.json"


def open_huggingface(path: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face folder; arguments and errors as :func:`open_checkpoint`."""
    config = read_json(path / "config.json")
    architecture, ours, unknown = _translate(config, path / "config.json")
    stored = SafetensorsSource.in_directory(path)
    notes = [f"config.json has keys edgellm does not know: {', '.join(sorted(unknown))}"] if unknown else []
    if (path / _ADAPTER).exists():
        raise CheckpointError(f"{path / _ADAPTER}: an adapter changes these weights; merge it into them first")
    layout = _layout(architecture, ours, config)
    model, weights = assemble(architecture, ours, stored, layout, dtype=dtype, path=path)
    text = read_text_files(path, config)
    return Checkpoint(
        architecture=architecture.name,
        model=model,
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        add_bos=text.add_bos,
        source=f"Hugging Face {stored.dtype}, {config['model_type']}",
        weights=weights,
        special_tokens=text.special_tokens,
        notes=(*notes, *text.notes),
    )


def _layout(architecture: Architecture, ours: Any, config: Mapping[str, Any]) -> Layout:
    reader = architecture.huggingface
    assert reader is not None
    convert = reader.tensor

    def tensor(name: str, stored: Tensor) -> Tensor:
        return stored if convert is None else convert(ours, config, name, stored)

    return Layout(
        name=reader.names,
        tensor=tensor,
        ignored=lambda name: name.endswith(".rotary_emb.inv_freq"),  # of old files; computed here
    )


def _translate(config: Mapping[str, Any], path: Path) -> tuple[Architecture, Any, list[str]]:
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config is set; use the model with its original float weights")
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path}: auto_map says that code of the checkpoint's own computes the model, which edgellm does not run; "
            "remove the key if the code does what the model_type says"
        )
    try:
        architecture = find_foreign("huggingface", config.get("model_type", ""))
        assert architecture.huggingface is not None
        fields, unknown = architecture.huggingface.read(config)
        return architecture, architecture.config(**fields), unknown
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path}: it is malformed ({error}); copy the checkpoint again") from error
