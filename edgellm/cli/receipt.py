"""A receipt in a bundle: what it was measured to be, on which text and with what; others can measure it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.standard_streams import print_json

if TYPE_CHECKING:
    from edgellm.checkpoints import Checkpoint
    from edgellm_exporters.export import ExportOptions
    from edgellm_exporters.proof.receipt import ReceiptText
    from edgellm_runtime.checks.receipt import Asked

__all__ = ["add_receipt", "measure_again", "summary_row", "text_for_export"]

_TOKENS, _WINDOW = 1024, 256  # of an export's receipt: a few seconds of PyTorch, whose logits stay small
_HOLDS, _DOES_NOT, _UNKNOWN = 0, 1, 2


def add_receipt(bundle: Path, text: Path, result: Mapping[str, Any], asked: Asked, device: str) -> None:
    """Write what was measured into a bundle's manifest, in the place of what was there.

    Args:
        bundle: its path.
        text: that was read.
        result: what ``edgellm eval`` measured against the checkpoint.
        asked: how much of it.
        device: that was asked for.
    """
    from edgellm_runtime.bundle import MANIFEST, Bundle
    from edgellm_runtime.bundle.limits import MAX_MANIFEST_BYTES, read_json
    from edgellm_runtime.checks.receipt import make_receipt
    from edgellm_runtime.loading import device_of

    file = bundle / MANIFEST
    receipt = make_receipt(text, asked, result, device=device_of(Bundle(bundle, checksums=False), device))
    data = {**read_json(file, MAX_MANIFEST_BYTES), "receipt": receipt}
    beside = file.with_name(f".{MANIFEST}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(file)  # whole or not at all
    finally:
        beside.unlink(missing_ok=True)


def text_for_export(
    loaded: Checkpoint, given: Path | None, calibrate: Path | None, options: ExportOptions, there: int
) -> ReceiptText | None:
    """What an export measures its receipt on: a text that was given or, behind what it calibrates with, that one.

    Args:
        loaded: to be exported.
        given: by the user.
        calibrate: the text to calibrate with.
        options: whose calibration and tuning were read from it.
        there: tokens of that text.
    """
    from edgellm_exporters.errors import ExportError
    from edgellm_exporters.proof.receipt import ReceiptText, check_receipt
    from edgellm_runtime.checks.receipt import Asked

    if given is not None:
        return ReceiptText(file=given, asked=Asked(tokens=_TOKENS, window=_WINDOW))
    if calibrate is None:
        return None
    try:
        check_receipt(loaded.model, loaded.tokenizer_json is not None, options.dtype)
    except ExportError:  # nobody asked for one
        return None
    tuned = 0 if options.tuning is None else len(options.tuning.tokens)
    used = max(sum(map(len, options.calibration)), tuned)
    fresh = there - used >= _WINDOW
    asked = Asked(tokens=_TOKENS, window=_WINDOW, skip=used if fresh else 0)
    return ReceiptText(file=calibrate, asked=asked, calibrated=not fresh)


def summary_row(receipt: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row of the table at the end of an export, where there is a receipt."""
    if not receipt:
        return []
    figures, text = receipt["figures"], receipt["text"]
    seen = ", calibrated with" if text.get("calibrated") else ""
    interval = f"{figures['kl_mean']:.2e} ({figures['kl_low']:.2e} to {figures['kl_high']:.2e}) nats"
    return [(f"receipt: KL on {figures['tokens']} tokens of {text['name']}{seen}", interval)]


def measure_again(
    path: Path, text: Path, measure: Callable[..., dict[str, Any]], *, device: str, as_json: bool
) -> int:  # fmt: skip
    """Measure what a bundle's receipt says, as it says, and print both; the exit status.

    Args:
        path: the bundle's.
        text: the receipt's.
        measure: takes what :class:`Asked` has and gives the figures.
        device: that was asked for.
        as_json: print one JSON object and nothing else.
    """
    from edgellm_runtime.bundle import Bundle, sha256_of
    from edgellm_runtime.checks.receipt import Asked, differences_from
    from edgellm_runtime.loading import device_of

    bundle = Bundle(path, checksums=False)
    receipt = bundle.manifest.receipt
    try:
        expected = {str(name): float(value) for name, value in receipt["figures"].items()}
        asked, wanted = Asked(**receipt["asked"]), str(receipt["text"]["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return _cannot(f"{path}: has no receipt; 'edgellm eval --write-receipt' makes one")
    if (found := sha256_of(text)) != wanted:
        return _cannot(
            f"{text}: sha256 {found[:12]}…, and the receipt is of {receipt['text'].get('name')!r} with {wanted[:12]}…"
        )
    result = measure(tokens=asked.tokens, window=asked.window, skip=asked.skip)
    apart = differences_from(expected, result)
    others = [] if not apart else _others(receipt.get("made_with"), device_of(bundle, device))
    if as_json:
        print_json({"holds": not apart, "receipt": expected, "found": result, "apart": apart, "differs": others})
    else:
        _print(expected, result, apart, others)
    return _DOES_NOT if apart else _HOLDS


def _cannot(why: str) -> int:
    click.secho("Cannot tell: ", fg="red", bold=True, nl=False, err=True)
    click.echo(why, err=True)
    return _UNKNOWN


def _others(before: Any, device: str) -> list[str]:
    """What is otherwise here than where the receipt was made."""
    from edgellm_runtime.checks.receipt import made_with

    there, here = before if isinstance(before, dict) else {}, {**made_with(), "device": device}
    return [f"{name}: {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]


def _print(expected: Mapping[str, Any], found: Mapping[str, Any], apart: list[str], others: list[str]) -> None:
    from edgellm_runtime.checks.receipt import compared

    for name in compared(expected, found):
        mark = "is not within 2%" if name in apart else ""
        click.echo(f"{name:>22}  {float(expected[name]):<12.6g} {float(found[name]):<12.6g} {mark}".rstrip())
    if apart:
        click.echo("what differs: " + ("; ".join(others) or "nothing that is known; the bundle may be another"))
