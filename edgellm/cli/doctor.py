"""``edgellm doctor``: what is wrong here, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgellm.cli.device import device_option
from edgellm.cli.standard_streams import print_json

__all__ = ["doctor"]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def doctor(bundle: Path | None, device: str, as_json: bool) -> int:
    """Look for what is wrong, slow or other than it seems: in this environment and, if one is given, in BUNDLE.

    Each finding has a code, which docs/doctor.md explains, and a remedy. The exit status is 1 where a finding is an
    error. No model is run: edgellm verify does that.
    """
    from edgellm_runtime.checks.doctor import diagnose

    found = diagnose(bundle, device=device)
    if as_json:
        rows = [{"code": f.code, "level": f.level, "what": f.what, "remedy": f.remedy} for f in found]
        print_json({"ok": not any(f.level == "error" for f in found), "findings": rows})
    else:
        _print(found, bundle)
    return 1 if any(f.level == "error" for f in found) else 0


def _print(found: list[Any], bundle: Path | None) -> None:
    looked = "this environment" if bundle is None else f"this environment and {bundle}"
    if not found:
        click.echo(f"Nothing is wrong with {looked}.")
    for finding in found:
        click.echo(f"{finding.code} {finding.level}: {finding.what}")
        click.echo(f"  {finding.remedy}")
