"""The option that every command which runs a bundle has: where to run it."""

from __future__ import annotations

import click

from edgellm_runtime.loading import DEVICES

__all__ = ["device_option"]

device_option = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", show_default=True,
    help="Where to run; auto: the device that the bundle was exported for, and an error where that is not there.",
)  # fmt: skip
