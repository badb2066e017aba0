"""``edgellm eval``: how well a bundle predicts a text, and how far it is from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edgellm.cli.progress import stages

__all__ = ["evaluate", "evaluate_bundle"]

_CHARACTERS = 16  # a token's share of the text that is encoded at first; more than most texts need
_MARGIN = 64  # tokens before a cut that the cut may have changed


@click.command("eval", context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", "file", required=True, type=click.Path(path_type=Path), help="UTF-8 text to predict.")
@click.option("--against", type=click.Path(path_type=Path), metavar="CHECKPOINT",
              help="Also measure the distance from this checkpoint in PyTorch.")  # fmt: skip
@click.option("--tokens", type=int, default=4096, help="Most tokens to take from the text; 0 for all.")
@click.option("--window", type=int, default=512, help="Tokens read from an empty state at a time.")
@click.option("--device", default="auto", help="Where to run: auto or cpu.")
@click.option("--threads", type=int, default=None, help="CPU threads.  [default: every core]", show_default=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def evaluate(
    bundle: Path, file: Path, against: Path | None, tokens: int, window: int, device: str, threads: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure BUNDLE's perplexity on a text.

    With --against, also the KL divergence from the checkpoint's distribution (mean and 99th percentile, nats) and how
    often both have the same most likely token.
    """
    with stages() as tell:
        result = evaluate_bundle(
            bundle, file, against, tokens=tokens, window=window, device=device, threads=threads, tell=tell
        )
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:>22}  {value:.6g}" if isinstance(value, float) else f"{name:>22}  {value}")


def evaluate_bundle(
    path: Path, file: Path, against: Path | None = None, *, tokens: int = 4096, window: int = 512,
    device: str = "auto", threads: int | None = None, tell: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures; the keys are those of ``--json``."""
    from edgellm_runtime import OptionError, load
    from edgellm_runtime.evaluate import evaluate as run
    from edgellm_runtime.evaluate import windows_of

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from error
    model = load(path, device=device, threads=threads)
    if model.tokenizer is None:
        raise OptionError(f"{path}: has no tokenizer, so it cannot read a text; export it with one")
    window = min(window, model.session.max_context)
    windows = windows_of(_beginning(model.tokenizer.encode, text, tokens), window, tokens)
    if against is None:
        found = run(model.session, windows, lambda share: tell("predicting", share))
        return {"perplexity": found.perplexity, "tokens": found.tokens}
    tell("reading the checkpoint", 0.0)
    from edgellm.checkpoints import load_checkpoint
    from edgellm_exporters.parity import compare

    reference: Any = load_checkpoint(against).model
    report = compare(reference, model.session, windows, progress=lambda share: tell("comparing", share))
    return {
        "perplexity": report.perplexity, "tokens": report.tokens, "reference_perplexity": report.reference_perplexity,
        "kl_mean": report.kl, "kl_p99": report.kl_p99, "top1_agreement": report.top1,
    }  # fmt: skip


def _beginning(encode: Callable[[str], list[int]], text: str, limit: int) -> list[int]:
    """At least the first ``limit`` tokens of a text (0: all), encoding little more of it than they need."""
    size = _CHARACTERS * (limit + _MARGIN) if limit else len(text)
    while size < len(text):
        found = encode(text[:size])
        if len(found) >= limit + _MARGIN:
            return found
        size *= 4
    return encode(text)
