"""What somebody may have meant who named a path that is no checkpoint."""

from __future__ import annotations

from pathlib import Path

from edgellm.checkpoints.files import read_json
from edgellm.checkpoints.lora_source import ADAPTER_CONFIG
from edgellm.checkpoints.native import MANIFEST
from edgellm.errors import CheckpointError

__all__ = ["hint"]

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}


def hint(path: Path) -> str:
    """What to name instead, or an empty text."""
    if path.is_file():
        if path.suffix not in _WEIGHTS:
            return ""
        name = "model.safetensors" if path.suffix == ".safetensors" else "pytorch_model.bin"
        return f"it holds weights only, so put it as {name} beside their config.json and name the folder"
    if own := [path / name for name in ("best", "last") if (path / name / MANIFEST).exists()]:
        return f"it is a run of edgellm train, so use its checkpoint {own[0]}"
    if numbered := _numbered(path):
        return f"it holds the checkpoints of a training run, of which {numbered[-1]} is the latest, so use that"
    if (path / ADAPTER_CONFIG).exists():
        return f"it is an adapter, so name its base model{_base(path)}, and this folder with --adapter"
    return ""


def _numbered(path: Path) -> list[Path]:
    found = [p for p in path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal() and p.is_dir()]
    whole = [p for p in found if (p / "config.json").exists() or (p / ADAPTER_CONFIG).exists()]
    return sorted(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def _base(path: Path) -> str:
    try:
        name = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    except CheckpointError:
        return ""
    return f", {name}" if isinstance(name, str) and name else ""
