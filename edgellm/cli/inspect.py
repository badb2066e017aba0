"""``edgellm inspect``: what a bundle holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from edgellm.cli.defaults import options_text
from edgellm.cli.quantization_text import quantization_rows
from edgellm.cli.standard_streams import print_json
from edgellm_runtime.json_text import json_text

__all__ = ["inspect"]

_MAX_SHOWN = 2000  # characters of a row: a table lays out every word of it


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as one JSON object and nothing else.")
@click.option("--context", type=int, default=None, help="Predict the memory for so many tokens.  [default: 512, and "
              "all that the model's context holds]", show_default=False)  # fmt: skip
def inspect(bundle: Path, as_json: bool, context: int | None) -> None:
    """Show BUNDLE's target, size, state, memory, tokenizer, origin and what it is held to. Loads no graph."""
    from edgellm_runtime.bundle import Bundle

    opened = Bundle(bundle, checksums=False)
    if as_json:
        print_json(opened.manifest.to_json())
    else:
        _print(opened, context)


def _print(bundle: Any, context: int | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    manifest = bundle.manifest
    specs = manifest.signature.state
    slot = sum(s.nbytes(1, 2) - s.nbytes(1, 1) for s in specs)
    fixed = sum(s.nbytes(1, 1) for s in specs) - slot
    read = sum(s.nbytes(1, 1) for s in specs if s.encoded)  # of a source of one token
    of_source = f", {read:,} bytes a token of the source" if read else ""
    table = Table(title=escape(f"{manifest.name} ({bundle.path})"), show_header=False)
    for row in (
        ("target", f"{manifest.target['name']}, {manifest.dtype}, needs {manifest.target.get('requires', {})}"),
        *quantization_rows(manifest.quantization),
        (
            "vocabulary, context",
            f"{manifest.signature.outputs[0].shape[-1]:,} tokens, {manifest.max_context:,} at most",
        ),
        ("state", f"{len(specs)} tensors: {slot:,} bytes a token, {fixed - read:,} bytes fixed{of_source}"),
        *_encoder(manifest),
        *_memory(bundle, context),
        *([("adapters", ", ".join(manifest.adapters))] if manifest.adapters else []),
        ("tokenizer", json_text(manifest.tokenizer.to_json()) if manifest.tokenizer else "none"),
        ("generates with", options_text(manifest.generation)),
        ("held to", json_text(dict(manifest.bounds))),
        ("measured", json_text({k: float(f"{v:.3g}") for k, v in manifest.measured.items()})),
        ("made from", ", ".join(f"{k} {v}" for k, v in manifest.provenance.items())),
        *(
            (f"file {name}", f"{info.bytes:,} bytes, sha256 {info.sha256[:16]}…")
            for name, info in manifest.files.items()
        ),
    ):
        table.add_row(*(escape(_shortened(text)) for text in row))
    Console().print(table)


def _memory(bundle: Any, context: int | None) -> list[tuple[str, str]]:
    """What weights and state take, exactly, and about what the process will at most."""
    from edgellm_runtime.loading import device_of
    from edgellm_runtime.state.memory_need import memory_need
    from edgellm_runtime.state.memory_peak import memory_peak

    longest, device = bundle.manifest.max_context, device_of(bundle, "auto")
    asked = sorted({min(512, longest), longest} if context is None else {context})
    exact = [(f"memory, {n:,} tokens", str(memory_need(bundle.manifest, device, n))) for n in asked]
    if device != "cpu":
        return exact
    peaks = [(f"peak, {n:,} tokens", str(memory_peak(bundle, n))) for n in asked]
    if importlib.util.find_spec("edgellm_kernels") is not None:
        peaks += [(f"with own kernels, {n:,} tokens", str(memory_peak(bundle, n, kernels="own"))) for n in asked]
    return [*exact, *peaks]


def _encoder(manifest: Any) -> list[tuple[str, str]]:
    if manifest.encoder is None:
        return []
    start = ", ".join(map(str, manifest.encoder.start))
    return [("encoder", f"reads sources of {manifest.encoder.max_source:,} tokens at most; answers begin with {start}")]


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… (in full with --json)"
