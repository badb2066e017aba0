"""Which road a checkpoint takes: one of edgellm's own architectures, or the general road through transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edgellm.checkpoints import Checkpoint

__all__ = ["ROADS", "read_checkpoint", "road_options"]

ROADS = ("auto", "native", "general")


def road_options(command: Any) -> Any:
    """The options that choose a checkpoint's road."""
    road = click.option(
        "--road", type=click.Choice(ROADS), default="auto", show_default=True,
        help="How a Hugging Face folder is read: native by an architecture of edgellm's own, general through the "
        "installed transformers, whatever the architecture; auto: native where there is one.",
    )  # fmt: skip
    trust = click.option(
        "--trust-remote-code", is_flag=True, default=False,
        help="General road: run Python code that the folder brings. Only for folders that you trust like a program.",
    )  # fmt: skip
    return road(trust(command))


def read_checkpoint(
    path: Path, *, road: str = "auto", trust_remote_code: bool = False, in_memory: bool = False
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: a checkpoint of any kind.
        road: one of :data:`ROADS`.
        trust_remote_code: whether code that the folder brings may run.
        in_memory: whether every weight is wanted in memory, even where they could be read one by one.

    Raises:
        CheckpointError: as :func:`edgellm.checkpoints.load_checkpoint` and :func:`edgellm.general.open_general`.
    """
    from edgellm.checkpoints import load_checkpoint, open_checkpoint
    from edgellm.errors import UnsupportedError
    from edgellm.general import has_transformers, load_general, open_general

    general = load_general if in_memory else open_general
    if road == "general":
        return general(path, trust_remote_code=trust_remote_code)
    try:
        return (load_checkpoint if in_memory else open_checkpoint)(path)
    except UnsupportedError as error:
        if road == "native":
            raise
        if not has_transformers():
            raise UnsupportedError(
                f"{error}; other models go through transformers, which is not installed: install the extra hf"
            ) from error
        found = general(path, trust_remote_code=trust_remote_code)
        return dataclasses.replace(found, notes=(*found.notes, f"the native road was closed: {error}"))
