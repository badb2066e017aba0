"""Which architectures there are: a name and the module that defines it, imported when asked for.

An architecture's module offers ``ARCHITECTURE``, an :class:`Architecture`. To add one: write that module and name it
in :data:`MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edgellm.errors import CheckpointError, ConfigError

__all__ = ["MODULES", "Architecture", "find", "find_foreign", "names"]

MODULES = ("edgellm.models.hybrid", "edgellm.models.decoder")
_SHORT = {path.rsplit(".", 1)[1]: path for path in MODULES}


@dataclass(frozen=True)
class Architecture:
    """One architecture, as its module declares it.

    Args:
        name: what checkpoints call it.
        config: its configuration class, with ``to_json`` and ``from_json``.
        build: makes the model with fresh weights.
        presets: named configurations.
        hf_model_types: ``model_type`` values of Hugging Face folders that it loads.
        gguf_architectures: ``general.architecture`` values of GGUF files that it loads.
        config_from_hf: translates a ``config.json``.
        config_from_gguf: translates GGUF metadata and the shapes of the file's tensors.
        hf_name: our parameter name to the Hugging Face tensor name.
        gguf_name: our parameter name to the GGUF tensor name.
        gguf_tensor: from configuration, GGUF metadata, our parameter name and the tensor as stored, the tensor in our
            layout; None where GGUF stores every tensor as we do.
    """

    name: str
    config: Any
    build: Callable[[Any], nn.Module]
    presets: Mapping[str, Any]
    hf_model_types: tuple[str, ...] = ()
    gguf_architectures: tuple[str, ...] = ()
    config_from_hf: Callable[[Mapping[str, Any]], Any] | None = None
    config_from_gguf: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Any] | None = None
    hf_name: Callable[[str], str] | None = None
    gguf_name: Callable[[str], str] | None = None
    gguf_tensor: Callable[[Any, Mapping[str, Any], str, Tensor], Tensor] | None = None


def names() -> tuple[str, ...]:
    """Of all architectures; none is imported."""
    return tuple(_SHORT)


def find(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _SHORT:
        raise ConfigError(f"unknown architecture {name!r}; known: {', '.join(_SHORT)}")
    architecture: Architecture = importlib.import_module(_SHORT[name]).ARCHITECTURE
    return architecture


def find_foreign(kind: str, name: str) -> Architecture:
    """The architecture that loads a foreign checkpoint.

    Args:
        kind: ``hf`` or ``gguf``.
        name: what the checkpoint calls its architecture.

    Raises:
        CheckpointError: none does.
    """
    known: list[str] = []
    for short in _SHORT:
        architecture = find(short)
        names = architecture.hf_model_types if kind == "hf" else architecture.gguf_architectures
        if name in names:
            return architecture
        known += names
    raise CheckpointError(f"unknown architecture {name!r}; edgellm loads {', '.join(sorted(known))}")
