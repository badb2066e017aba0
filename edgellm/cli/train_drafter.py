"""``edgellm train --drafter``: a head that drafts for a model."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from edgellm.cli.standard_streams import print_json

__all__ = ["run_drafter"]

_COMMON = ("minutes", "steps", "batch_size", "lr", "seed", "rows", "listed")
_ELSEWHERE = ("threads",)


def run_drafter(
    checkpoint: Path, texts: Sequence[Path], out: Path, given: Mapping[str, Any], *, resume: bool, as_json: bool
) -> bool:
    """Train one, and sum up; whether it was asked to end before its time.

    Args:
        checkpoint: of the model.
        texts: plain text.
        out: the run's folder.
        given: options by the names that the command line has for them.
        resume: go on with the run that is there.
        as_json: print one JSON object.
    """
    from rich.console import Console

    from edgellm.training import Reporter
    from edgellm.training.draft_run import DraftOptions, train_drafter

    if other := sorted(given.keys() - {*_COMMON, *_ELSEWHERE}):
        raise click.UsageError(f"--{other[0].replace('_', '-')} is nothing that --drafter takes; leave it out")
    if not texts:
        raise click.UsageError("name the text to train on, as TEXT or with --text.")
    options = DraftOptions(**{name: value for name, value in given.items() if name in _COMMON})
    with Reporter(Console(stderr=True)) as reporter:
        result = train_drafter(
            checkpoint, list(texts), out, options, resume=resume, say=reporter.say, on_progress=reporter
        )
    if result.interrupted:
        again = shlex.join(["edgellm", "train", "--drafter", str(checkpoint), *map(str, texts), "-o", str(out)])
        click.echo(f"stopped after step {result.steps}; go on with: {again} --resume", err=True)
        return True
    said = {**dataclasses.asdict(result), "drafter": str(result.drafter)}
    if as_json:
        print_json(said)
        return False
    right = ", ".join(f"{share:.1%}" for share in result.acceptance)
    click.echo(
        f"{result.drafter}: {result.steps} steps on {result.tokens:,} tokens of the model's own words, "
        f"{result.seconds:.0f} s; of held-out places {right} have so many drafted tokens right"
    )
    click.echo(
        f"Next: edgellm export {shlex.quote(str(checkpoint))} --drafter {shlex.quote(str(result.drafter))} -o BUNDLE"
    )
    return False
