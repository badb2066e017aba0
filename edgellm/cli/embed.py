"""``edgellm embed``: texts as vectors."""

from __future__ import annotations

from pathlib import Path

import click

from edgellm.cli.device import device_option
from edgellm.cli.standard_streams import print_json, read_input
from edgellm.cli.threads import threads_option
from edgellm_runtime.errors import OptionError

__all__ = ["embed"]

_TOGETHER = 64  # texts that are read before their lines are printed


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path())
@click.argument("texts", nargs=-1)
@click.option("--file", "file", type=click.Path(path_type=Path), default=None, metavar="FILE",
              help="UTF-8 text, each line of which is a text, after those that are named.")  # fmt: skip
@click.option("--pooling", type=click.Choice(["mean", "last"]), default="mean", help="Mean of the last hidden states "
              "of all tokens, or that of the last one.")  # fmt: skip
@click.option("--raw", is_flag=True, help="Leave vectors as long as they come, and not of length 1.")
@click.option("--truncate", is_flag=True, help="Take the beginning of a text that is longer than the context, which is "
              "refused otherwise.")  # fmt: skip
@click.option("--adapter", default=None, metavar="NAME", help="Embed with this adapter of the bundle's.  "
              "[default: none]")  # fmt: skip
@threads_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for all texts, instead of one for each.")
def embed(
    bundle: str, texts: tuple[str, ...], file: Path | None, pooling: str, raw: bool, truncate: bool,
    adapter: str | None, threads: int | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Print TEXTS as vectors by the model in BUNDLE, which was exported with --hidden: a line of JSON for each.

    A text of - is read from standard input, whose lines are texts.
    """
    from edgellm_runtime import load

    given = [line for text in texts for line in (read_input().splitlines() if text == "-" else [text])]
    given += _lines(file)
    if not given:
        raise click.UsageError("name a text, - for those of standard input, or a --file.")
    model = load(bundle, device=device, threads=threads).with_adapter(adapter)
    model.session.check_hidden()
    entries = []
    for start in range(0, len(given), _TOGETHER):
        part = given[start : start + _TOGETHER]
        vectors = model.embed(part, pooling=pooling, normalize=not raw, truncate=truncate)  # type: ignore[arg-type]
        made = [{"text": text, "embedding": vector.tolist()} for text, vector in zip(part, vectors, strict=True)]
        entries += made
        if not as_json:
            for entry in made:
                print_json(entry)
    if as_json:
        print_json({"bundle": bundle, "pooling": pooling, "embeddings": entries})


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
