"""A tiny decoder with two adapters, each of which changes what is said: as a bundle, and merged in PyTorch."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tiny_bundles import attention_model, text_assets
from torch import Tensor, nn

from edgellm.checkpoints.switchable import Switchable
from edgellm_exporters.export import ExportOptions, export

NAMES = ("red", "blue")
MODULES = ("layers.0.attention.q_proj", "layers.0.attention.v_proj", "layers.1.mlp.down_proj")


def stacks(base: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """By module, A (3, columns, 4) and B (3, 4, rows); the first place of each is zeros."""
    draw, made = torch.Generator().manual_seed(5), {}
    for module in MODULES:
        rows, columns = base.get_submodule(module).weight.shape  # type: ignore[misc]
        down, up = torch.randn(3, columns, 4, generator=draw), torch.randn(3, 4, rows, generator=draw)
        down[0], up[0] = 0, 0
        made[module] = down, up
    return made


@functools.cache
def adapter_bundle() -> Path:
    """With text, and steps that give hidden states."""
    base, folder = attention_model(), Path(tempfile.mkdtemp()) / "bundle"
    model = Switchable(base, NAMES, stacks(base)).eval()
    return export(model, folder, options=ExportOptions(hidden=True), text=text_assets()).bundle.path


@torch.no_grad()
def merged(name: str) -> nn.Module:
    """The decoder whose weights have an adapter in them."""
    model = attention_model()
    for module, (down, up) in stacks(model).items():
        number = NAMES.index(name) + 1
        model.get_submodule(module).weight += (down[number] @ up[number]).T  # type: ignore[misc, operator]
    return model.eval()
