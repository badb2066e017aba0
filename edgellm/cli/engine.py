"""The options of engines, which ``edgellm export`` and ``edgellm build`` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgellm_exporters.engines.options import EngineOptions

__all__ = ["EngineFlags", "building_options"]


def building_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what engines are built for."""
    for option in reversed((
        click.option("--max-batch", type=int, default=None, metavar="ROWS", show_default=False,
                     help="Engines: the most rows of a batch.  [default: 8]"),
        click.option("--compute-capability", default="", metavar="8.6,8.9", show_default=False,
                     help="Engines: the GPUs to build for.  [default: the one that is here]"),
        click.option("--workspace-mb", type=int, default=None, metavar="MB", show_default=False,
                     help="Engines: the most scratch memory on the GPU while building.  [default: all there is]"),
    )):  # fmt: skip
        command = option(command)
    return command


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """What was given on the command line; None or empty where nothing was."""

    max_batch: int | None = None
    max_context: int | None = None
    compute_capability: str = ""
    workspace_mb: int | None = None
    no_engine: bool = False

    def options(self, *, max_batch: int | None = None) -> EngineOptions | None:
        """What they mean; None where none was given.

        Args:
            max_batch: taken where none was given.

        Raises:
            ExportError: an impossible size.
        """
        from edgellm_exporters.engines.options import EngineOptions

        capabilities = (
            tuple(part.strip() for part in self.compute_capability.split(",")) if self.compute_capability else ()
        )
        numbers = {
            "max_batch": self.max_batch if self.max_batch is not None else max_batch,
            "max_context": self.max_context, "workspace_mb": self.workspace_mb,
        }  # fmt: skip
        given: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
        if not given and not capabilities and not self.no_engine:
            return None
        return EngineOptions(**given, compute_capabilities=capabilities, build=not self.no_engine)
