"""``edgellm train --drafter``: a head that drafts for a model."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.standard_streams import print_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["run_drafter"]

_COMMON = ("minutes", "steps", "batch_size", "lr", "seed", "rows", "listed")
_ELSEWHERE = ("threads",)


def run_drafter(
    checkpoint: Path, texts: Sequence[Path], out: Path, given: Mapping[str, Any], *, bundle: Path | None, resume: bool,
    as_json: bool,
) -> bool:  # fmt: skip
    """Train one, and sum up; whether it was asked to end before its time.

    Args:
        checkpoint: of the model.
        texts: plain text.
        out: the run's folder.
        given: options by the names that the command line has for them.
        bundle: of the model, whose words and hidden states are learned from; None for PyTorch's.
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
    reader = None if bundle is None else _BundleReader(bundle, given.get("threads"))
    chosen = {name: value for name, value in given.items() if name in _COMMON}
    options = DraftOptions(**chosen)
    if bundle is not None:
        options = dataclasses.replace(options, read_with=str(bundle.resolve()))
    with Reporter(Console(stderr=True)) as reporter:
        result = train_drafter(
            checkpoint, list(texts), out, options, resume=resume, say=reporter.say, on_progress=reporter, reader=reader
        )
    if result.interrupted:
        read = [] if bundle is None else ["--bundle", str(bundle)]
        again = shlex.join(["edgellm", "train", "--drafter", str(checkpoint), *map(str, texts), *read, "-o", str(out)])
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


class _BundleReader:
    """Reads with a bundle of the model, in its quantization and on its kernels; a training ``Reader``."""

    def __init__(self, bundle: Path, threads: int | None) -> None:
        from edgellm_runtime import load

        self._session = load(bundle, threads=threads).session
        self._session.check_hidden()
        self._state = self._session.new_state()

    def begin(self, rows: int, capacity: int) -> None:
        self._state = self._session.new_state(rows, capacity)

    def read(self, tokens: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        return self._session.step_hidden(tokens, self._state, logits="all")
