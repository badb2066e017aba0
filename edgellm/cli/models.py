"""``edgellm models``: which checkpoints are read by edgellm's own architectures, and which through transformers."""

from __future__ import annotations

import textwrap
from typing import Any

import click

from edgellm.cli.standard_streams import print_json

__all__ = ["models"]

_GENERAL = (
    "It is read through transformers if its layers go through transformers' attention and cache interfaces; export "
    "tries that, and refuses in one sentence what has no form, such as a recurrence."
)


@click.command()
@click.argument("type_name", metavar="[TYPE]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object and nothing else.")
def models(type_name: str | None, as_json: bool) -> None:
    """List the models that edgellm exports, or say how one is read: TYPE is a Hugging Face folder's model_type or a
    GGUF file's general.architecture.

    A native type has an architecture of edgellm's own. Any other that the installed transformers has a causal language
    model of takes the general road, through transformers; so does a native one with a setting that its architecture
    does not read.
    """
    found = _answer(type_name) if type_name else _everything()
    if as_json:
        print_json(found)
    elif type_name:
        _print_answer(found)
    else:
        _print_everything(found)


def _everything() -> dict[str, Any]:
    from edgellm.general.types import refused
    from edgellm.models.registry import ENTRIES, foreign_names

    native = [
        {
            "architecture": name, "about": entry.about, "presets": list(entry.presets),
            "huggingface": list(entry.huggingface), "gguf": list(entry.gguf),
        }
        for name, entry in ENTRIES.items()
    ]  # fmt: skip
    version, known = _transformers()
    others = [name for name in known if name not in foreign_names("huggingface")]
    tried, why = refused()
    general = [name for name in others if name not in why]
    return {
        "native": native, "general": {"transformers": version, "count": len(general), "types": general},
        "refused": {"transformers": tried, "types": {name: why[name] for name in others if name in why}},
    }  # fmt: skip


def _answer(kind: str) -> dict[str, Any]:
    from edgellm.models.registry import ENTRIES

    found = [name for name, entry in ENTRIES.items() if kind == name or kind in (*entry.huggingface, *entry.gguf)]
    if not found:
        return _general_answer(kind)
    entry = ENTRIES[found[0]]
    sources = {"edgellm": kind == found[0], "huggingface": kind in entry.huggingface, "gguf": kind in entry.gguf}
    return {
        "type": kind, "road": "native", "architecture": found[0], "about": entry.about,
        "sources": [name for name, there in sources.items() if there],
    }  # fmt: skip


def _general_answer(kind: str) -> dict[str, Any]:
    from edgellm.errors import UnsupportedError
    from edgellm.general.types import nearest, refused

    version, known = _transformers()
    tried, reasons = refused()
    if kind in known and kind in reasons:
        return {"type": kind, "road": "refused", "transformers": tried, "why": reasons[kind]}
    if kind in known:
        return {"type": kind, "road": "general", "transformers": version}
    why = (
        f"transformers {version} has no causal language model of it"
        if version
        else "transformers, through which others go, is not installed: install the extra hf"
    )
    near = nearest(kind, known)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UnsupportedError(f"{kind!r} is no type of edgellm's own, and {why}{meant}")


def _transformers() -> tuple[str | None, list[str]]:
    """The version of transformers and the types that it knows; nothing where it is not installed."""
    from edgellm.general import has_transformers
    from edgellm.general.types import causal_types, transformers_version

    return (transformers_version(), causal_types()) if has_transformers() else (None, [])


_SOURCES = {"edgellm": "checkpoints of edgellm", "huggingface": "Hugging Face folders", "gguf": "GGUF files"}


def _print_answer(found: dict[str, Any]) -> None:
    if found["road"] == "refused":
        click.echo(
            f"{found['type']}: refused when it was tried with transformers {found['transformers']}: {found['why']}"
        )
        return
    if found["road"] == "general":
        click.echo(f"{found['type']}: general road. {_GENERAL}")
        return
    sources = " and ".join(_SOURCES[name] for name in found["sources"])
    click.echo(
        f"{found['type']}: native, by the architecture {found['architecture']} ({found['about']}); from {sources}"
    )


def _print_everything(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Native: architectures of edgellm's own")
    for heading in ("architecture", "what it is", "Hugging Face types", "GGUF types"):
        table.add_column(heading)
    for row in found["native"]:
        names = (", ".join(row[kind]) or "-" for kind in ("huggingface", "gguf"))
        table.add_row(row["architecture"], row["about"], *names)
    Console().print(table)
    general = found["general"]
    if general["transformers"] is None:
        click.echo("General road: others go through transformers, which is not installed (the extra hf).")
        return
    click.echo(
        f"General road: {general['count']} more types that transformers {general['transformers']} has a causal "
        "language model of. Export refuses in one sentence what has no form, such as a recurrence."
    )
    click.echo(textwrap.fill(", ".join(general["types"]), width=100, break_on_hyphens=False))
    others = found["refused"]
    if others["types"]:
        click.echo(f"Refused, when they were tried with transformers {others['transformers']} (TYPE says why):")
        click.echo(textwrap.fill(", ".join(others["types"]), width=100, break_on_hyphens=False))
