"""Hugging Face folders: config.json, safetensors, tokenizer.json and the files that say how to use them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from edgellm.checkpoints.assemble import assemble
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.files import read_json, read_text, read_tokenizer, token_ids
from edgellm.checkpoints.safetensors_source import SafetensorsSource
from edgellm.checkpoints.weights import Layout
from edgellm.errors import CheckpointError, ModelError
from edgellm.models.registry import Architecture, find_foreign

__all__ = ["open_huggingface"]


def open_huggingface(path: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face folder; arguments and errors as :func:`open_checkpoint`."""
    config = read_json(path / "config.json")
    architecture, ours = _translate(config, path / "config.json")
    source = SafetensorsSource.in_directory(path)
    assert architecture.hf_name is not None
    layout = Layout(name=architecture.hf_name, ignored=lambda name: name.endswith(".rotary_emb.inv_freq"))
    model, weights = assemble(architecture, ours, source, layout, dtype=dtype, path=path)
    settings = _read_optional(path / "tokenizer_config.json")
    tokenizer_json = read_tokenizer(path / "tokenizer.json")
    tokenizer = None if tokenizer_json is None else Tokenizer.from_str(tokenizer_json)
    generation = _read_optional(path / "generation_config.json")
    bos = _special(path, generation, config, settings, tokenizer, "bos")
    return Checkpoint(
        architecture=architecture.name,
        model=model,
        tokenizer_json=tokenizer_json,
        chat_template=_chat_template(path, settings),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_special(path, generation, config, settings, tokenizer, "eos"),
        add_bos=bool(bos) and _adds_bos(settings, tokenizer, bos[0]),
        source=f"Hugging Face {source.dtype}, {config['model_type']}",
        weights=weights,
    )


def _translate(config: Mapping[str, Any], path: Path) -> tuple[Architecture, Any]:
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config is set; use the model with its original float weights")
    try:
        architecture = find_foreign("hf", config.get("model_type", ""))
        assert architecture.config_from_hf is not None
        return architecture, architecture.config_from_hf(config)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path}: it is malformed ({error}); copy the checkpoint again") from error


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special(
    path: Path, generation: Mapping[str, Any], config: Mapping[str, Any], settings: Mapping[str, Any],
    tokenizer: Tokenizer | None, kind: str,
) -> tuple[int, ...]:  # fmt: skip
    """The ids of the token ``kind``: from generation_config.json, else config.json, else the tokenizer's settings."""
    key = f"{kind}_token_id"
    ids = token_ids(generation, key, path / "generation_config.json") or token_ids(config, key, path / "config.json")
    if ids or tokenizer is None:
        return ids
    token = settings.get(f"{kind}_token")
    content = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return () if found is None else (found,)


def _adds_bos(settings: Mapping[str, Any], tokenizer: Tokenizer | None, bos: int) -> bool:
    wanted = settings.get("add_bos_token")
    if wanted is not None or tokenizer is None:
        return bool(wanted)
    return bool(tokenizer.encode("a").ids[:1] == [bos])  # its own post-processor puts it there


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        return read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = {t["name"]: t["template"] for t in template if isinstance(t, dict) and {"name", "template"} <= t.keys()}
        template = named.get("default")
    return template if isinstance(template, str) else None
