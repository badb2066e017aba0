"""The option that every command which runs a bundle has: where to run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from edgellm_runtime.loading import DEVICES

__all__ = ["device_option"]


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--device``."""
    return click.option(
        "--device", default="auto", show_default=True, metavar=f"[{'|'.join(DEVICES)}]",
        help="Where to run; auto: the device that the bundle was exported for, and an error where that is not there.",
    )(command)  # fmt: skip
