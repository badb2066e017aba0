"""Adapters as files, in the layout of PEFT: others load them onto the checkpoint that they were learned for.

A folder with ``adapter_model.safetensors``, whose tensors carry the names of the Hugging Face model's layers, and
``adapter_config.json``. A model without such names keeps its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgellm.errors import CheckpointError
from edgellm.training.lora import adapted_layers

__all__ = ["ADAPTER", "Adapters", "load_adapters"]

ADAPTER = "adapter"  # the folder in a checkpoint
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT wraps a model in
Name = Callable[[str], str]


@dataclass(frozen=True)
class Adapters:
    """A model's adapters, taken from its layers before they are merged.

    Args:
        tensors: by PEFT's names.
        config: what PEFT must know.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module, foreign: Name | None) -> Adapters | None:
        """Those of a model; None if it has none.

        Args:
            model: adapted or not.
            foreign: from our name of a weight to the Hugging Face model's; None: the model has no other names.
        """
        layers = adapted_layers(model)
        if not layers:
            return None
        one = next(iter(layers.values()))
        rank = one.down.shape[0]
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "", "r": rank,
            "lora_alpha": one.scale * rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted({_module(name, foreign).rsplit(".", 1)[-1] for name in layers}),
        }  # fmt: skip
        return cls(_tensors(model, foreign), config)

    def save(self, directory: Path) -> None:
        """Write them into a checkpoint's directory."""
        folder = directory / ADAPTER
        folder.mkdir()
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})
        text = json.dumps(self.config, indent=2, allow_nan=False) + "\n"
        (folder / _CONFIG).write_text(text, encoding="utf-8")


def load_adapters(model: nn.Module, directory: Path, foreign: Name | None) -> None:
    """Read them back into a model that was adapted alike; ``foreign`` as in :meth:`Adapters.of`.

    Raises:
        CheckpointError: they are missing or do not fit.
    """
    path, trained = directory / ADAPTER / _TENSORS, _tensors(model, foreign)
    try:
        stored = load_file(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start the run again in another folder") from None
    if stored.keys() != trained.keys() or any(stored[n].shape != trained[n].shape for n in stored):
        raise CheckpointError(f"{path} does not fit the model; resume with the rank that it began with")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])


def _tensors(model: nn.Module, foreign: Name | None) -> Mapping[str, Tensor]:
    """The adapters' matrices by PEFT's names: A (rank, in_features), B (out_features, rank)."""
    return {
        f"{_PREFIX}{_module(name, foreign)}.{kind}.weight": tensor
        for name, layer in adapted_layers(model).items()
        for kind, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
    }


def _module(name: str, foreign: Name | None) -> str:
    return name if foreign is None else foreign(f"{name}.weight").removesuffix(".weight")
