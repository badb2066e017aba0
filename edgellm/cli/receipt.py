"""A receipt in a bundle: what it was measured to be, on which text and with what; others can measure it again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.standard_streams import print_json

if TYPE_CHECKING:
    pass

__all__ = ["WITHIN", "add_receipt", "differences_from", "measure_again"]

WITHIN = 0.02  # relative: other kernels' rounding, not another model
_FIGURES = ("perplexity", "reference_perplexity", "kl_mean", "top1_agreement")
_SMALLEST = 1e-6  # of a KL divergence: below, two roundings of float32 are compared
_HOLDS, _DOES_NOT, _UNKNOWN = 0, 1, 2


def add_receipt(bundle: Path, text: Path, result: Mapping[str, Any], *, tokens: int, window: int) -> None:
    """Write what was measured into a bundle's manifest, in the place of what was there.

    Args:
        bundle: its path.
        text: that was read.
        result: what ``edgellm eval`` measured against the checkpoint.
        tokens: that were asked for.
        window: likewise.
    """
    from edgellm_runtime.bundle import MANIFEST, sha256_of
    from edgellm_runtime.bundle.limits import MAX_MANIFEST_BYTES, read_json

    file = bundle / MANIFEST
    receipt = {
        "text": {"name": text.name, "bytes": text.stat().st_size, "sha256": sha256_of(text)},
        "asked": {"tokens": tokens, "window": window}, "figures": dict(result), "made_with": _made_with(),
        "command": f"edgellm eval BUNDLE --receipt --text {text.name} --against CHECKPOINT",
    }  # fmt: skip
    data = {**read_json(file, MAX_MANIFEST_BYTES), "receipt": receipt}
    beside = file.with_name(f".{MANIFEST}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(file)  # whole or not at all
    finally:
        beside.unlink(missing_ok=True)


def measure_again(
    path: Path, text: Path, measure: Callable[..., dict[str, Any]], *, as_json: bool
) -> int:  # fmt: skip
    """Measure what a bundle's receipt says, as it says, and print both; the exit status.

    Args:
        path: the bundle's.
        text: the receipt's.
        measure: takes ``tokens`` and ``window`` and gives the figures.
        as_json: print one JSON object and nothing else.
    """
    from edgellm_runtime.bundle import Bundle, sha256_of

    receipt = Bundle(path, checksums=False).manifest.receipt
    try:
        expected, asked, wanted = dict(receipt["figures"]), dict(receipt["asked"]), str(receipt["text"]["sha256"])
        tokens, window = int(asked["tokens"]), int(asked["window"])
    except (KeyError, TypeError, ValueError):
        return _cannot(f"{path}: has no receipt; 'edgellm eval --write-receipt' makes one")
    if (found := sha256_of(text)) != wanted:
        return _cannot(
            f"{text}: sha256 {found[:12]}…, and the receipt is of {receipt['text'].get('name')!r} with {wanted[:12]}…"
        )
    result = measure(tokens=tokens, window=window)
    apart = differences_from(expected, result)
    others = [] if not apart else _others(receipt.get("made_with"))
    if as_json:
        print_json({"holds": not apart, "receipt": expected, "found": result, "apart": apart, "differs": others})
    else:
        _print(expected, result, apart, others)
    return _DOES_NOT if apart else _HOLDS


def differences_from(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The figures that are further from a receipt's than 2%; those that were not measured now are not compared."""
    apart = []
    for name in (name for name in _FIGURES if name in expected and name in found):
        size = max(abs(float(expected[name])), _SMALLEST if name == "kl_mean" else 1e-12)
        if not abs(float(found[name]) - float(expected[name])) <= WITHIN * size:
            apart.append(name)
    return apart


def _cannot(why: str) -> int:
    click.secho("Cannot tell: ", fg="red", bold=True, nl=False, err=True)
    click.echo(why, err=True)
    return _UNKNOWN


def _made_with() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "machine": platform.machine(), "processor": _processor()}
    for package in ("edgellm", "onnxruntime", "torch", "numpy", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _others(made_with: Any) -> list[str]:
    """What is otherwise here than where the receipt was made."""
    before, here = made_with if isinstance(made_with, dict) else {}, _made_with()
    return [f"{name}: {before.get(name)} there, {here[name]} here" for name in here if before.get(name) != here[name]]


def _print(
    expected: Mapping[str, Any], found: Mapping[str, Any], apart: list[str], others: list[str]
) -> None:  # fmt: skip
    for name in (name for name in _FIGURES if name in expected and name in found):
        mark = "is not within 2%" if name in apart else ""
        click.echo(f"{name:>22}  {float(expected[name]):<12.6g} {float(found[name]):<12.6g} {mark}".rstrip())
    if apart:
        click.echo("what differs: " + ("; ".join(others) or "nothing that is known; the bundle may be another"))
