"""Which architectures there are, and what is known of each before its module, and PyTorch, is imported.

An architecture's module offers ``ARCHITECTURE``, an :class:`Architecture`. To add one: write that module and enter it
in :data:`ENTRIES`; a test holds the entry to what the module says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgellm.errors import CheckpointError, ConfigError
from edgellm.models.foreign import GGUF, HuggingFace, Marian, TensorFile

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ENTRIES", "Architecture", "Entry", "describe", "find", "find_foreign", "foreign_names", "preset_names"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What help texts, documents and readers ask of an architecture without importing it.

    Args:
        module: where its ``ARCHITECTURE`` is.
        about: what it is, in two or three words.
        presets: the names of its named configurations.
        huggingface: ``model_type`` values of the Hugging Face folders that it loads.
        gguf: ``general.architecture`` values of the GGUF files that it loads.
        marian: decoders of Marian's files that it loads.
        tensors: marks of the files of tensors alone that it loads.
    """

    module: str
    about: str
    presets: tuple[str, ...] = ()
    huggingface: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()
    marian: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


ENTRIES: Mapping[str, Entry] = {
    "hybrid": Entry(
        module="edgellm.models.hybrid", about="recurrence and attention", presets=("reference", "tiny"),
    ),
    "decoder": Entry(
        module="edgellm.models.decoder", about="transformer", presets=("tiny",),
        huggingface=(
            "llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "seed_oss",
        ),
        gguf=("llama", "qwen2", "qwen3"),
    ),
    "bamba": Entry(
        module="edgellm.models.bamba", about="state space and attention", presets=("tiny",), huggingface=("bamba",),
    ),
    "falcon_h1": Entry(
        module="edgellm.models.falcon_h1", about="state space beside attention", presets=("tiny",),
        huggingface=("falcon_h1",),
    ),
    "gemma2": Entry(
        module="edgellm.models.gemma2", about="transformer with windows and soft caps", presets=("tiny",),
        huggingface=("gemma2",), gguf=("gemma2",),
    ),
    "granitemoehybrid": Entry(
        module="edgellm.models.granitemoehybrid", about="state space, attention, experts", presets=("tiny",),
        huggingface=("granitemoehybrid",),
    ),
    "jamba": Entry(
        module="edgellm.models.jamba", about="selective state space, attention, experts", presets=("tiny",),
        huggingface=("jamba",),
    ),
    "lfm2": Entry(
        module="edgellm.models.lfm2", about="short convolutions and attention", presets=("tiny",),
        huggingface=("lfm2",), gguf=("lfm2",),
    ),
    "mamba": Entry(
        module="edgellm.models.mamba", about="selective state space", presets=("tiny",),
        huggingface=("mamba", "falcon_mamba"), gguf=("mamba",),
    ),
    "mamba2": Entry(
        module="edgellm.models.mamba2", about="state space", presets=("tiny",), huggingface=("mamba2",),
        gguf=("mamba2",),
    ),
    "nemotron_h": Entry(
        module="edgellm.models.nemotron_h", about="state space, attention, MLP or experts", presets=("tiny",),
        huggingface=("nemotron_h",),
    ),
    "qwen3_next": Entry(
        module="edgellm.models.qwen3_next", about="gated delta rule and attention", presets=("tiny",),
        huggingface=("qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"),
    ),
    "recurrent_gemma": Entry(
        module="edgellm.models.recurrent_gemma", about="linear recurrences and windows", presets=("tiny",),
        huggingface=("recurrent_gemma",),
    ),
    "rwkv": Entry(
        module="edgellm.models.rwkv", about="fading averages", presets=("tiny",), huggingface=("rwkv",),
    ),
    "rwkv7": Entry(
        module="edgellm.models.rwkv7", about="memories corrected and fading by feature", presets=("tiny",),
        huggingface=("rwkv7", "rwkv7_fla"), tensors=("blocks.0.att.r_k",),
    ),
    "zamba2": Entry(
        module="edgellm.models.zamba2", about="state space, shared attention", presets=("tiny",),
        huggingface=("zamba2",),
    ),
    "xlstm": Entry(
        module="edgellm.models.xlstm", about="matrix memories", presets=("tiny",), huggingface=("xlstm",),
    ),
    "encoder_decoder": Entry(
        module="edgellm.models.encoder_decoder", about="encoder, recurrent or attentive decoder",
        presets=("tiny", "recurrent"),
    ),
    "tagger": Entry(
        module="edgellm.models.tagger", about="labels for tokens read both ways", presets=("tiny", "recurrent"),
    ),
    "bart": Entry(
        module="edgellm.models.bart", about="encoder and decoder, positions added", presets=("tiny",),
        huggingface=("bart", "marian"), marian=("self-attention",),
    ),
    "bergamot": Entry(
        module="edgellm.models.bergamot", about="encoder, simple recurrent decoder, shortlist", presets=("tiny",),
        marian=("ssru",),
    ),
    "t5": Entry(
        module="edgellm.models.t5", about="encoder and decoder, biases by distance", presets=("tiny",),
        huggingface=("t5",),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One architecture, as its module declares it.

    Args:
        name: what checkpoints call it, as in :data:`ENTRIES`.
        config: its configuration class, with ``to_json`` and ``from_json``.
        build: makes the model with fresh weights.
        presets: named configurations.
        huggingface: how it reads Hugging Face folders, or None.
        gguf: how it reads GGUF files, or None.
        marian: how it reads Marian's files, or None.
        tensors: how it reads files of tensors alone, or None.
    """

    name: str
    config: Any
    build: Callable[[Any], nn.Module]
    presets: Mapping[str, Any]
    huggingface: HuggingFace | None = None
    gguf: GGUF | None = None
    marian: Marian | None = None
    tensors: TensorFile | None = None


def find(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ENTRIES:
        raise ConfigError(f"unknown architecture {name!r}; known: {', '.join(ENTRIES)}")
    architecture: Architecture = importlib.import_module(ENTRIES[name].module).ARCHITECTURE
    return architecture


def find_foreign(kind: Literal["huggingface", "gguf", "marian", "tensors"], name: str) -> Architecture:
    """The architecture that loads a foreign checkpoint.

    Args:
        kind: of checkpoint.
        name: what the checkpoint calls its architecture.

    Raises:
        CheckpointError: none does.
    """
    for ours, entry in ENTRIES.items():
        if name in getattr(entry, kind):
            return find(ours)
    raise CheckpointError(f"unknown architecture {name!r}; edgellm loads {', '.join(foreign_names(kind))}")


def foreign_names(kind: Literal["huggingface", "gguf", "marian", "tensors"]) -> list[str]:
    """Every foreign architecture that some of ours loads, sorted."""
    return sorted({name for entry in ENTRIES.values() for name in getattr(entry, kind)})


def describe() -> str:
    """The architectures in one phrase, such as ``this (a transformer) or that (an RNN)``."""
    *most, last = [f"{name} ({entry.about})" for name, entry in ENTRIES.items()]
    return f"{', '.join(most)} or {last}" if most else last


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted({name for entry in ENTRIES.values() for name in entry.presets})
