"""Compare layer patterns at the five tasks: ``python examples/compare.py run translation --minutes 10``.

``run`` trains, exports and evaluates, and goes on where it was stopped; ``render`` writes the tables of
docs/applications.md and the picture beside it from what was measured.
"""

from __future__ import annotations

from pathlib import Path

import click
from comparison.page import records, written
from comparison.sizes import PATTERNS
from comparison.tables import draw
from comparison.work import FOLDERS, Plan, add, base_of, compare

_RESULTS = Path("docs/applications")
_FILE = click.Path(path_type=Path)


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Compare layer patterns with equally many parameters."""


@main.command()
@click.argument("tasks", nargs=-1, required=True, type=click.Choice(list(FOLDERS)))
@click.option("--data", type=_FILE, help="Folder with train, valid and test.jsonl.  [default: data/TASK]")
@click.option("--excerpt", is_flag=True, help="Take the excerpt in examples/ instead of the whole data.")
@click.option("--patterns", default=",".join(PATTERNS), help="Which, separated by commas.")
@click.option("--minutes", default=10.0, help="Of training, for each pattern.")
@click.option("--limit", default=500, help="Test examples; 0 for all.")
@click.option("--blocks", default=4, help="Layers.")
@click.option("--width", default=256, help="Features between blocks.")
@click.option("--heads", default=4, help="Attention heads.")
@click.option("--recurrent-width", default=256, help="Of the hybrid; the others' follow from its size.")
@click.option("--mlp-width", default=512, help="Of the hybrid.")
@click.option("--vocab-size", default=8000, help="The most tokens.")
@click.option("--threads", default=2, help="CPU threads, in training and in what is timed.")
@click.option("--seed", default=0, help="Of the weights and the data's order.")
@click.option("--train-option", multiple=True, metavar="WORDS", help="More for edgellm train, such as '--lr 1e-3'; "
              "repeatable.")  # fmt: skip
@click.option("--runs", default="runs/compare", type=_FILE, help="Folder for checkpoints and bundles.")
@click.option("--results", default=_RESULTS, type=_FILE, help="Folder for the measurements.")
def run(
    tasks: tuple[str, ...], data: Path | None, excerpt: bool, patterns: str, minutes: float, limit: int, blocks: int,
    width: int, heads: int, recurrent_width: int, mlp_width: int, vocab_size: int, threads: int, seed: int,
    train_option: tuple[str, ...], runs: Path, results: Path,
) -> None:  # fmt: skip
    """Measure TASKS; what was measured by the same commands before is not measured again."""
    names = patterns.split(",")
    if unknown := [name for name in names if name not in PATTERNS]:
        raise click.UsageError(f"no pattern {unknown[0]!r}; known: {', '.join(PATTERNS)}")
    base = base_of(
        vocab_size, blocks, width=width, num_heads=heads, num_kv_heads=heads, recurrent_width=recurrent_width,
        mlp_width=mlp_width,
    )  # fmt: skip
    for task in tasks:
        folder = Path("examples") / FOLDERS[task] / "excerpt" if excerpt else data or Path("data") / task
        if missing := [n for n in ("train", "valid", "test") if not (folder / f"{n}.jsonl").is_file()]:
            prepare = f"python examples/{FOLDERS[task]}/prepare.py"
            raise click.ClickException(f"{folder}/{missing[0]}.jsonl is not there; make it with {prepare}")
        compare(
            Plan(
                task=task, data=folder, runs=runs, result=results / f"{task}.json", base=base, patterns=names,
                minutes=minutes, limit=limit, threads=threads, seed=seed,
                options=[word for words in train_option for word in words.split()],
            ),
            say=lambda text: click.echo(text, err=True),
        )  # fmt: skip
        click.echo(results / f"{task}.json")


@main.command("add")
@click.argument("task", type=click.Choice(list(FOLDERS)))
@click.argument("name")
@click.option("--data", type=_FILE, help="Folder with train, valid and test.jsonl.  [default: data/TASK]")
@click.option("--result", type=_FILE, required=True, help="The file of measurements that gets the row.")
@click.option("--minutes", default=25.0, help="Of training.")
@click.option("--limit", default=500, help="Test examples; 0 for all.")
@click.option("--threads", default=2, help="CPU threads, in training and in what is timed.")
@click.option("--seed", default=0, help="Of the weights and the data's order.")
@click.option("--train-option", multiple=True, metavar="WORDS", help="For edgellm train, such as '--init M --lora 16'; "
              "repeatable.")  # fmt: skip
@click.option("--runs", default="runs/compare", type=_FILE, help="Folder for checkpoints and bundles.")
def add_row(
    task: str, name: str, data: Path | None, result: Path, minutes: float, limit: int, threads: int, seed: int,
    train_option: tuple[str, ...], runs: Path,
) -> None:  # fmt: skip
    """Train any model for TASK and measure it as row NAME, such as one that begins with a pretrained checkpoint."""
    options = [word for words in train_option for word in words.split()]
    plan = Plan(
        task=task, data=data or Path("data") / task, runs=runs, result=result, minutes=minutes, limit=limit,
        threads=threads, seed=seed, options=options,
    )  # fmt: skip
    add(plan, name)
    click.echo(result)


@main.command("render")
@click.option("--results", default=_RESULTS, type=_FILE, help="Folder with the measurements.")
@click.option("--page", default="docs/applications.md", type=_FILE, help="Markdown with a place for each task.")
@click.option("--picture", default="docs/applications.png", type=_FILE, help="The PNG to write.")
def render_page(results: Path, page: Path, picture: Path) -> None:
    """Write the tables into the page, and the picture."""
    found = records(results)
    if not found:
        raise click.ClickException(f"{results}: nothing was measured yet; see the command run")
    try:
        page.write_text(written(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    except ValueError as error:
        raise click.ClickException(f"{page}: {error}") from error
    draw({task: found[task] for task in FOLDERS if task in found}, picture)
    click.echo(f"{page}, {picture}")


if __name__ == "__main__":
    main()
