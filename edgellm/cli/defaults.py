"""Options of generation that nobody named: a bundle's own, and how they are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from edgellm_runtime.arguments import shown

__all__ = ["choosing_options", "given", "options_text", "own", "unnamed"]


def own(otherwise: float) -> str:
    """What a help text says of an option that a bundle may set."""
    return f"[default: the bundle's, else {otherwise:g}]"


def choosing_options(*, max_new_tokens: int) -> Callable[[Any], Any]:
    """The options of every command that generates; of those not given, the bundle's own hold.

    Args:
        max_new_tokens: where neither is.
    """
    options: list[tuple[str, type, str, float]] = [
        ("--max-new-tokens", int, "Most tokens to generate.", max_new_tokens),
        ("--temperature", float, "0 is greedy; higher is more varied.", 0),
        ("--top-k", int, "Keep the k most probable tokens; 0 keeps all.", 0),
        ("--top-p", float, "Keep the fewest tokens that make up this probability.", 1),
        ("--min-p", float, "Keep tokens this fraction as probable as the best.", 0),
        ("--repetition-penalty", float, "Above 1 discourages tokens already there.", 1),
    ]

    def decorate(command: Any) -> Any:
        for name, kind, text, otherwise in reversed(options):
            command = click.option(name, type=kind, default=None, help=f"{text}  {own(otherwise)}")(command)
        return command

    return decorate


def given(options: Mapping[str, Any]) -> Any:
    """The options that a command was given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def unnamed(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """For the line after an answer: the bundle's own options that this answer used; empty where it used none."""
    used = {name: value for name, value in defaults.items() if name not in options}
    return f"; the bundle's own: {options_text(used)}" if used else ""


def options_text(options: Mapping[str, Any]) -> str:
    """Options for people, with temperature 0 where there is none, for that is what makes it greedy."""
    return ", ".join(f"{name} {shown(value)}" for name, value in {"temperature": 0.0, **options}.items())
