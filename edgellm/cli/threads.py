"""The option that every command which computes has: how many CPU threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from edgellm_runtime.threads import VARIABLE, limited_threads

__all__ = ["threads_option"]


def threads_option(command: Callable[..., Any], *, envvar: str | None = None) -> Callable[..., Any]:
    """Give a command ``--threads``, which holds for all that it does.

    Args:
        command: the command.
        envvar: a variable of this command's own that says the same.
    """
    return click.option(
        "--threads", type=int, default=None, show_default=False, envvar=envvar, callback=_limit,
        help=f"CPU threads.  [default: those that {VARIABLE} says, else the cores that this process may use]",
    )(command)  # fmt: skip


def _limit(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    context.with_resource(limited_threads(value))
    return value
