"""``edgellm diff``: where a bundle parts from its checkpoint or another bundle, layer by layer and step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.diff_rows import UNKNOWN, rows_to_read
from edgellm.cli.progress import stages
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle
    from edgellm_runtime.checks.divergence import Divergence, Limits, Read

__all__ = ["diff", "diff_models"]

_DOUBT = 2.0  # of a layer's distance from the float model: so much further it may be on another text
_ROUNDING = 1e-4  # of layers that say nothing of it, and of float ones


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), metavar="CHECKPOINT|BUNDLE",
              help="What it should compute: its checkpoint, which PyTorch runs, or another bundle of it.")  # fmt: skip
@click.option("--engines", is_flag=True, help="Compare its engines, on this GPU, with the graphs that they are built "
              "from; find the first layer that is wrong by building engines of some beginnings.")  # fmt: skip
@click.option("--text", "file", type=click.Path(path_type=Path), metavar="FILE",
              help="UTF-8 text to read; without it, the rows of the bundle's goldens.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=2), default=512, help="With --text: most tokens to take from it.")
@click.option("--window", type=click.IntRange(min=2), default=128, help="With --text: tokens read from an empty state "
              "at a time.")  # fmt: skip
@click.option("--html", "page", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the table and a map of layers by steps there, as one page.")  # fmt: skip
@click.option("--png", "picture", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw the map of layers by steps there; needs matplotlib.")  # fmt: skip
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def diff(
    bundle: Path, against: Path | None, engines: bool, file: Path | None, tokens: int, window: int, page: Path | None,
    picture: Path | None, threads: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Find where BUNDLE parts from another model: the first layer and step, and a verdict on each layer.

    Both read the same tokens. A layer is exact, or off by rounding, by quantization (as far as its export found on its
    own text, and as much again), or wrong. With --engines, a layer of the engines is right if it is off by rounding
    from what this CPU makes of their graphs. The exit status is 0 if no layer is wrong, 1 if one is, and 2 if the two
    cannot be compared.
    """
    from edgellm_runtime.errors import BackendError, OptionError

    if (against is None) != engines:
        raise click.UsageError("Give one of --against, a checkpoint or another bundle, and --engines.")
    if against is None:
        from edgellm.cli.diff_engines import diff_engines

        return diff_engines(bundle, file, tokens=tokens, window=window, as_json=as_json)
    try:
        with stages() as tell:
            found = diff_models(bundle, against, file, tokens=tokens, window=window, threads=threads, tell=tell)
    except (OptionError, BackendError) as error:
        click.secho("Cannot tell: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
        return UNKNOWN
    title = f"{bundle.name} against {against.name}"
    if page is not None:
        from edgellm_runtime.checks.heat_map import heat_map

        page.write_text(heat_map(found, title), encoding="utf-8")
    if picture is not None:
        from edgellm_exporters.proof.heat_picture import draw_map

        draw_map(found, title, picture)
    print_json(_report(found)) if as_json else _print(found, title)
    return 0 if found.holds else 1


def diff_models(
    path: Path, against: Path, file: Path | None = None, *, tokens: int = 512, window: int = 128,
    threads: int | None = None, tell: Any,
) -> Divergence:  # fmt: skip
    """The divergence of a bundle from a checkpoint or from another bundle.

    Raises:
        OptionError: they are no versions of one model, or the text is too short.
    """
    from edgellm_runtime.bundle import MANIFEST, Bundle
    from edgellm_runtime.checks.divergence import diverge
    from edgellm_runtime.checks.layers import tapped
    from edgellm_runtime.errors import OptionError

    tell("checking files", 0.0)
    bundle = Bundle(path)
    rows = rows_to_read(bundle, file, tokens, window)
    ours = tapped(bundle, threads=threads)
    tell("reading what it is compared with", 0.0)
    expected: Read
    if (against / MANIFEST).is_file():
        other = Bundle(against)
        theirs = tapped(other, threads=threads)
        if theirs.session.vocab_size != ours.session.vocab_size or theirs.session.width != ours.session.width:
            raise OptionError(f"{against}: has another vocabulary than {path}; compare versions of one model")
        expected, limits = theirs.read, _limits(bundle, other)
    else:
        expected, limits = _checkpoint(bundle, against, ours.session, max(map(len, rows))), _limits(bundle, None)
    return diverge(ours.read, expected, rows, limits, lambda share: tell("comparing", share))


def _checkpoint(bundle: Bundle, checkpoint: Path, session: Any, longest: int) -> Read:
    from edgellm.torch_threads import limit_torch_threads

    limit_torch_threads()
    from edgellm.cli.against import read_reference
    from edgellm_exporters.proof.layer_reader import torch_reader

    reader: Read = torch_reader(read_reference(checkpoint, bundle.path, session, longest))
    return reader


def _limits(bundle: Bundle, other: Bundle | None) -> dict[str, Limits]:
    """How far each layer may be from the other model's."""
    from edgellm_runtime.checks.divergence import Limits
    from edgellm_runtime.errors import OptionError

    mine, theirs = bundle.manifest, None if other is None else other.manifest
    names = [path for path in mine.layers if theirs is None or path in theirs.layers]
    if not names:
        raise OptionError(
            f"{bundle.path}: has no layer that it names in common with what it is compared with; export it again, and "
            "compare versions of one model"
        )
    sides = [mine.layers] if theirs is None else [mine.layers, theirs.layers]
    same = theirs is not None and (mine.quantization, mine.dtype) == (theirs.quantization, theirs.dtype)
    float_alone = mine.quantization.get("method") == "none" and mine.dtype == "float32" and theirs is None
    found = {}
    for name in names:
        rounding = _ROUNDING if float_alone else max(side[name]["rounding"] for side in sides) if same else _ROUNDING
        apart = 0.0 if same or float_alone else _DOUBT * sum(side[name]["distance"] for side in sides)
        found[name] = Limits(rounding, apart)
    last = found[names[-1]]
    return {**found, "logits": last}


def _report(found: Divergence) -> dict[str, Any]:
    import dataclasses

    first, wrong = found.first, found.wrong
    return {
        "holds": found.holds, "wrong": wrong.name if wrong else None, "parts": first.name if first else None,
        "step": first.first_step if first else None, "kl": found.kl, "top1": found.top1, "tokens": found.tokens,
        "rows": list(found.ends), "layers": [dataclasses.asdict(row) for row in found.layers],
        "state": {row.name: row.difference for row in found.state},
        "steps": [[float(f"{x:.3g}") for x in row] for row in found.steps.tolist()],
    }  # fmt: skip


def _print(found: Divergence, title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"exact": "green", "rounding": "green", "quantization": "yellow", "wrong": "red"}
    table = Table("layer", "cosine", "norm ratio", "max error", "typical", "worst", "first step", "verdict",
                  title=escape(title))  # fmt: skip
    for row in found.layers:
        step = "" if row.first_step is None else str(row.first_step)
        table.add_row(
            escape(row.name), f"{row.cosine:.6f}", f"{row.norm_ratio:.4f}", f"{row.max_error:.2e}",
            f"{row.typical:.2e}", f"{row.worst:.2e}", step, f"[{colours[row.verdict]}]{row.verdict}[/]",
        )  # fmt: skip
    console = Console()
    console.print(table)
    if found.state:
        worst = max(found.state, key=lambda row: row.difference)
        console.print(f"state: the furthest off is {escape(worst.name)}, {worst.difference:.2e}")
    console.print(f"KL {found.kl:.3g} nats a token, top-1 {found.top1:.1%}, {found.tokens} tokens")
    if found.wrong is not None:
        console.print(f"the first layer that is wrong: {escape(found.wrong.name)}")
    elif found.first is not None:
        console.print(f"they part at {escape(found.first.name)}, step {found.first.first_step}; no layer is wrong")
