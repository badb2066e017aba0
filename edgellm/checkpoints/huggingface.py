"""Hugging Face folders: config.json, weights and the files beside them that change what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgellm.checkpoints.adapter import adapted
from edgellm.checkpoints.assemble import assemble
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.files import read_json
from edgellm.checkpoints.find_weights import find_weights
from edgellm.checkpoints.huggingface_text import read_text_files
from edgellm.checkpoints.lora_source import ADAPTER_CONFIG, with_adapter
from edgellm.checkpoints.packed_source import PackedSource
from edgellm.checkpoints.quantized.find import KEYS, dequantized
from edgellm.checkpoints.shared_blocks import check_tables, shares_blocks
from edgellm.checkpoints.stacked_source import StackedSource
from edgellm.checkpoints.weights import Layout, TensorSource
from edgellm.errors import CheckpointError, ModelError, UnsupportedError
from edgellm.models.protocol import answers_sources
from edgellm.models.registry import Architecture, find_foreign

__all__ = ["open_huggingface"]


def open_huggingface(path: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face folder; arguments and errors as :func:`open_checkpoint`."""
    config = read_json(path / "config.json")
    architecture, ours, unknown = _translate(config, path / "config.json")
    source, kind, notes = _source(path, config)
    notes += [f"config.json has keys edgellm does not know: {', '.join(sorted(unknown))}"] if unknown else []
    changed: frozenset[str] = frozenset()
    beside = (path / ADAPTER_CONFIG).exists()
    by_name = beside and _shares_blocks(architecture, ours)  # files have such a block once, adapters each place
    if beside and not by_name:
        merged = with_adapter(source, path)
        source, changed = merged, merged.changed
        notes.append(f"the adapter beside the weights was merged into {len(changed)} tensors")
    layout = _layout(architecture, ours, config)
    source = _unpacked(source, architecture, ours)
    if (said := config.get("max_position_embeddings", 0)) > ours.max_context:
        notes.append(
            f"texts of over {ours.max_context} tokens, of {said}, would be rotated otherwise; the context ends there"
        )
    model, weights = assemble(architecture, ours, source, layout, dtype=dtype, path=path)
    try:
        check_tables(model, {own: name for own in model.state_dict() if (name := layout.name(own)) in changed})
    except CheckpointError as error:
        raise CheckpointError(f"{path / ADAPTER_CONFIG}: {error}") from error
    text = read_text_files(path, config)
    checkpoint = Checkpoint(
        architecture=architecture.name,
        model=model,
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        add_bos=text.add_bos,
        add_eos=text.add_eos and answers_sources(model),
        source=f"Hugging Face {kind}, {config['model_type']}",
        weights=weights,
        special_tokens=text.special_tokens,
        generation=text.generation,
        notes=(*notes, *text.notes),
    )
    return adapted(checkpoint, path) if by_name else checkpoint


def _shares_blocks(architecture: Architecture, config: Any) -> bool:
    with torch.device("meta"):
        return shares_blocks(architecture.build(config))


def _source(path: Path, config: Mapping[str, Any]) -> tuple[TensorSource, str, list[str]]:
    """The weights as floats, what they are stored in, and what to tell of it."""
    stored = find_weights(path)
    try:
        found = dequantized(config, stored, path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if found is None:
        return stored, stored.dtype, []
    return found.source, found.method, [found.note]


def _unpacked(source: TensorSource, architecture: Architecture, ours: Any) -> TensorSource:
    """What the file packs into one tensor, apart."""
    reader = architecture.huggingface
    assert reader is not None
    if reader.packed is not None:
        source = PackedSource(source, reader.packed(ours))
    return StackedSource(source, reader.stacked) if reader.stacked else source


def _layout(architecture: Architecture, ours: Any, config: Mapping[str, Any]) -> Layout:
    reader = architecture.huggingface
    assert reader is not None
    convert = reader.tensor

    def tensor(name: str, stored: Tensor) -> Tensor:
        return stored if convert is None else convert(ours, config, name, stored)

    return Layout(
        name=reader.names,
        tensor=tensor,
        ignored=lambda name: name.endswith((".rotary_emb.inv_freq", *reader.ignored)),  # of old files; computed here
        adapters=True,
    )


def _translate(config: Mapping[str, Any], path: Path) -> tuple[Architecture, Any, list[str]]:
    if config.get("auto_map"):
        raise UnsupportedError(
            f"{path}: auto_map says that code of the checkpoint's own computes the model, which edgellm does not run; "
            "remove the key if the code does what the model_type says"
        )
    try:
        architecture = find_foreign("huggingface", config.get("model_type", ""))
        assert architecture.huggingface is not None
        fields, unknown = architecture.huggingface.read({k: v for k, v in config.items() if k not in KEYS})
        return architecture, architecture.config(**fields), unknown
    except ModelError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: it is malformed ({error}); copy the checkpoint again") from error
