"""Weights with a LoRA adapter in PEFT's layout merged into them as they are read.

W + scale B A, Hu et al. 2021, arXiv:2106.09685; scale is alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023,
arXiv:2312.03732). What PEFT can do besides is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgellm.checkpoints.files import read_json
from edgellm.checkpoints.find_weights import find_weights
from edgellm.checkpoints.weights import TensorSource
from edgellm.codes import CodedWeights, CodeFormat, StoredCodes
from edgellm.errors import CheckpointError
from edgellm.models.foreign import METADATA, Key, neutral, positive, read_keys
from edgellm.models.foreign.keys import checked_positive

__all__ = ["ADAPTER_CONFIG", "LoraSource", "with_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_PATTERN = re.compile(r"[A-Za-z0-9_.]+")  # of modules; one that is more than a name is not run

_KEYS: Mapping[str, Key] = {
    "peft_type": neutral("LORA"),
    "lora_alpha": positive("alpha"),
    "bias": neutral("none"),
    "fan_in_fan_out": neutral(False, None),
    "init_lora_weights": neutral(True, False, "gaussian", "orthogonal"),  # others change the base weights
    **dict.fromkeys(
        [
            "alpha_pattern", "r", "rank_pattern", "use_rslora", "base_model_name_or_path", "revision", "task_type",
            "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
            "layers_pattern", "modules_to_save", "auto_mapping", "peft_version", "megatron_core", "loftq_config",
            "corda_config", "eva_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
        ],
        METADATA,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Adapter:
    """One module's two matrices by their names in the adapter's file."""

    down: str  # (rank, in_features)
    up: str  # (out_features, rank)
    scale: float


class LoraSource:
    """A source's tensors, each with what an adapter changes in it.

    Args:
        base: the tensors.
        adapter: the adapter's.
        config: its ``adapter_config.json``.
        convert: a tensor's name and what has its rows, in the adapter's layout, to the base's.

    Raises:
        CheckpointError: the adapter does not fit the tensors, or asks for more than LoRA.
    """

    def __init__(
        self, base: TensorSource, adapter: TensorSource, config: Mapping[str, Any],
        convert: Callable[[str, Tensor], Tensor] = lambda _, change: change,
    ) -> None:  # fmt: skip
        self._base, self._adapter, self._convert = base, adapter, convert
        alpha = _alpha(config)
        self._merged: dict[str, _Adapter] = {}
        self._replaced: dict[str, str] = {}  # modules that were trained whole
        self._check_base(config)
        for name in adapter.shapes:
            if name.endswith(_DOWN):
                module = name.removeprefix(_PREFIX).removesuffix(_DOWN)
                self._merged[f"{module}.weight"] = self._checked(module, name, config, alpha)
            elif not name.endswith(_UP):
                self._replaced[self._own(name)] = name
        pairs = {found.up for found in self._merged.values()}
        if lone := sorted(name for name in adapter.shapes if name.endswith(_UP) and name not in pairs):
            raise CheckpointError(f"tensor {lone[0]} has no {_DOWN[1:]} beside it; the adapter is incomplete")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {**self._base.shapes, **{name: self._adapter.shapes[n] for name, n in self._replaced.items()}}

    @property
    def changed(self) -> frozenset[str]:
        """The names of the tensors that the adapter changes."""
        return frozenset({*self._merged, *self._replaced})

    @property
    def merged(self) -> frozenset[str]:
        """Those of them that it adds a product of two matrices to."""
        return frozenset(self._merged)

    def keeps(self, name: str) -> bool:
        """Whether a tensor stays the base's but for that product: PEFT saves some beside their adapters."""
        stored = self._replaced.get(name)
        if stored is None:
            return True
        whole = self._convert(name, self._adapter.read(stored))
        return torch.equal(whole.float(), self._base.read(name).float())

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """What is added to a tensor, as A (rank, in_features) and B (out_features, rank): B A, the scale in B."""
        found = self._merged[name]
        up = self._adapter.read(found.up).float() * found.scale
        return self._adapter.read(found.down).float(), self._convert(name, up)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or the rows from one index up to another; merged in float32.

        Raises:
            CheckpointError: as the sources.
        """
        replaced = self._replaced.get(name)
        if replaced is None:
            tensor = self._base.read(name, rows)
        else:
            whole = self._convert(name, self._adapter.read(replaced))
            tensor = whole if rows is None else whole[rows[0] : rows[1]]
        if name not in self._merged:
            return tensor
        down, up = self.matrices(name)
        return tensor.float() + (up if rows is None else up[rows[0] : rows[1]]) @ down

    def code_format(self, name: str) -> CodeFormat | None:
        """See :class:`edgellm.codes.CodedWeights`; what the adapter changes has no codes any more."""
        if name in self.changed or not isinstance(self._base, CodedWeights):
            return None
        return self._base.code_format(name)

    def codes(self, name: str) -> StoredCodes:
        """See :class:`edgellm.codes.CodedWeights`."""
        assert isinstance(self._base, CodedWeights)
        return self._base.codes(name)

    def _check_base(self, config: Mapping[str, Any]) -> None:
        """Refuse an adapter of another base: one that changes modules which are not there."""
        modules = [name.removesuffix(_DOWN) for name in self._adapter.shapes if name.endswith(_DOWN)]
        known = {f"{_PREFIX}{name}" for name in self._base.shapes}
        strange = [module for module in modules if f"{module}.weight" not in known]
        if strange:
            base = config.get("base_model_name_or_path")
            told = f"; it was made for {base}" if isinstance(base, str) and base else ""
            first = strange[0].removeprefix(_PREFIX)
            raise CheckpointError(
                f"{len(strange)} of {len(modules)} modules that it changes, such as {first}, are no modules of the "
                f"model{told}; use the adapter's own base"
            )

    def _own(self, name: str) -> str:
        plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".")  # PEFT saves an adapted table with its adapter
        if plain not in self._base.shapes or not name.startswith(_PREFIX):
            raise CheckpointError(f"tensor {name} is nothing that edgellm can merge; merge the adapter with PEFT")
        return plain

    def _checked(self, module: str, down: str, config: Mapping[str, Any], alpha: float) -> _Adapter:
        up = down.removesuffix(_DOWN) + _UP
        base, a, b = (
            source.shapes.get(name)
            for source, name in ((self._base, f"{module}.weight"), (self._adapter, down), (self._adapter, up))
        )
        if (
            base is None
            or a is None
            or b is None
            or len(base) != 2
            or (b[0], a[1]) != base
            or len(a) != 2
            or b != (base[0], a[0])
        ):
            raise CheckpointError(f"tensor {down} has shape {a} and {_UP[1:]} {b}, but {module} is {base}")
        own = _patterned(config.get("alpha_pattern") or {}, module, alpha)
        return _Adapter(down, up, own / (math.sqrt(a[0]) if config.get("use_rslora") else a[0]))


def with_adapter(
    base: TensorSource, directory: Path, convert: Callable[[str, Tensor], Tensor] = lambda _, change: change
) -> LoraSource:
    """The weights in a folder, merged with the adapter beside them.

    Args:
        base: the weights.
        directory: the folder.
        convert: as of :class:`LoraSource`.

    Raises:
        CheckpointError: there is no adapter that can be merged.
    """
    path = directory / ADAPTER_CONFIG
    adapter = find_weights(directory, "adapter_model")
    try:
        return LoraSource(base, adapter, read_json(path), convert)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _alpha(config: Mapping[str, Any]) -> float:
    fields, unknown = read_keys(_KEYS, config)
    for name in unknown:  # PEFT writes every option it has; one that is off changes nothing
        if config[name] not in (None, False, 0) and config[name] not in ([], {}, ""):
            raise CheckpointError(f"{name} is {config[name]!r}, which edgellm cannot merge; merge it with PEFT")
    return float(fields["alpha"])


def _patterned(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """The value whose pattern a module's name ends with: PEFT takes the first."""
    for pattern, value in patterns.items():
        if not _PATTERN.fullmatch(pattern):
            raise CheckpointError(f"alpha_pattern has {pattern!r}, no plain name; merge the adapter with PEFT")
        if re.fullmatch(rf"(.*\.)?{pattern}", module):  # a dot stands for any character there too
            return checked_positive(f"the pattern {pattern}", value)
    return default
