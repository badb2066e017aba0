"""What engines are built for. No heavy import: a device that builds engines has no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_exporters.errors import ExportError

__all__ = ["EngineOptions"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What engines are built for.

    Args:
        max_batch: the most rows.
        max_context: the most tokens of a row; 0 for as many as the model takes.
        chunk: tokens of a prompt in one step.
        compute_capabilities: of the GPUs, such as ``8.6``; empty for the GPU that is here.
        workspace_mb: the most scratch memory that building may use on the GPU; 0 for the library's choice.
        build: whether to build engines now; otherwise ``edgellm build`` does on the device.
    """

    max_batch: int = 8
    max_context: int = 0
    chunk: int = 128
    compute_capabilities: tuple[str, ...] = ()
    workspace_mb: int = 0
    build: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("max_context", 0), ("chunk", 2), ("workspace_mb", 0)):
            if (value := getattr(self, name)) < least:
                raise ExportError(f"{name} is {value}; it must be at least {least}")
