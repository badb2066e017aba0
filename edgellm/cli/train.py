"""``edgellm train``: from text files to a checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.config_file import read_config
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option
from edgellm.models import registry

if TYPE_CHECKING:
    from edgellm.training import RunConfig, TrainResult

__all__ = ["train"]

# What to train a preset with; measured for tiny (about a minute on two cores), the usual values for the larger model.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "steps": 300, "batch_size": 16, "context": 128, "lr": 3e-3, "warmup": 30, "eval_every": 50, "save_every": 100,
    },
    "reference": {
        "steps": 20000, "batch_size": 32, "context": 512, "lr": 6e-4, "warmup": 500, "eval_every": 500,
        "save_every": 1000,
    },
}  # fmt: skip
MODEL_PARAMETERS = (
    "architecture", "preset", "settings", "vocab_size", "validation", "validation_fraction", "task", "init",
    "tokenizer", "lora", "lora_alpha",
)  # fmt: skip
TASKS = ("generation", "translation", "qa", "summarization", "srl")
TUNING_LR = {"adapters": 2e-4, "weights": 2e-5}  # the usual ones; a preset's would undo what was learned
UNBOUNDED = 1_000_000  # steps of a run that ends by the clock
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def _varies(name: str) -> str:
    return "[default: " + ", ".join(f"{recipe[name]} for {preset}" for preset, recipe in RECIPES.items()) + "]"


FILE = click.Path(path_type=Path)


@click.command()
@click.argument("texts", nargs=-1, metavar="TEXT...", type=FILE)
@click.option("-o", "--out", required=True, type=FILE, help="Folder for the run: checkpoints, metrics, loss curve.")
@click.option(
    "--config", type=FILE, is_eager=True, expose_value=False, callback=read_config, metavar="FILE",
    help="TOML with these options by their long names, and model settings in [set]; the command line comes before it.  "
    "[default: none]",
)  # fmt: skip
@click.option(
    "--task", type=click.Choice(TASKS),
    help="What to train for; TEXT is then JSON Lines of its examples.  [default: a language model on plain text]",
)  # fmt: skip
@click.option(
    "--architecture",
    default=next(iter(registry.ENTRIES)),
    show_default=True,
    metavar="NAME",
    help=f"Which model: {registry.describe()}.",
)
@click.option(
    "--preset",
    default="tiny",
    show_default=True,
    metavar="NAME",
    help=f"Its named configuration: {' or '.join(registry.preset_names())}.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Change a field of the preset, such as width=64 or pattern=gru,attention; repeatable.",
)
@click.option("--vocab-size", type=int, help="The most tokens that the tokenizer gets. [default: the preset's]")
@click.option(
    "--validation",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="Text to validate on; repeatable. [default: a part of TEXT]",
)
@click.option(
    "--validation-fraction",
    type=float,
    default=0.1,
    show_default=True,
    help="The part of TEXT to hold out: the tail of plain text, every n-th document of JSONL.",
)
@click.option("--steps", type=int, help=f"Updates in all. {_varies('steps')}")
@click.option("--batch-size", type=int, help=f"Windows in one forward pass. {_varies('batch_size')}")
@click.option("--context", type=int, help=f"Tokens in a window. {_varies('context')}")
@click.option(
    "--lr",
    type=float,
    help=f"The highest learning rate. With --init {TUNING_LR['weights']:.0e}, or {TUNING_LR['adapters']:.0e} with "
    f"--lora, unless given. {_varies('lr')}",
)
@click.option("--warmup", type=int, help=f"Updates over which the rate rises. {_varies('warmup')}")
@click.option(
    "--minutes", type=float, default=0.0,
    help="End after so much time spent on updates; the learning rate then follows the clock.  [default: no limit]",
)  # fmt: skip
@click.option(
    "--patience", type=int, default=0,
    help="End after so many validations without a lower loss.  [default: never for that]",
)  # fmt: skip
@click.option("--label-smoothing", type=float, default=0.0, show_default=True, help="Probability spread over all.")
@click.option(
    "--batch-tokens", type=int, default=4096, show_default=True, help="Of a task: tokens in one forward pass."
)
@click.option(
    "--prompt-loss", type=float, default=0.0, show_default=True,
    help="Of a task: how much predicting the prompt counts beside the answer.",
)  # fmt: skip
@click.option(
    "--class-weights", type=click.Choice(["none", "balanced"]), default="none", show_default=True,
    help="Of a task with few answers or labels: let rare ones count more.",
)  # fmt: skip
@click.option("--init", type=FILE, metavar="CHECKPOINT", help="Fine-tune this checkpoint's model, with its tokenizer "
              "and chat template.  [default: fresh weights]")  # fmt: skip
@click.option("--tokenizer", type=FILE, metavar="FILE", help="A tokenizer.json for fresh weights.  "
              "[default: one is trained on TEXT]")  # fmt: skip
@click.option(
    "--lora",
    type=int,
    default=0,
    help="With --init: learn through low-rank adapters of this rank, also written in PEFT's layout.  [default: none]",
)
@click.option("--lora-alpha", type=float, default=0.0, help="How much adapters count.  [default: twice the rank]")
@click.option("--drafter", type=FILE, metavar="CHECKPOINT", help="Train a drafter for this checkpoint's model on TEXT "
              "instead: a small head that proposes tokens for the model to check (edgellm export --drafter). Takes "
              "--minutes, --steps, --batch-size (continuations), --lr, --seed, --gather, --listed, --bundle, --resume. "
              "[default: train a model]")  # fmt: skip
@click.option("--bundle", type=FILE, metavar="BUNDLE", help="Of a drafter: learn what this bundle of the model says, "
              "exported with --hidden; quicker than PyTorch, and in the format that is drafted for. "
              "[default: the checkpoint in PyTorch]")  # fmt: skip
@click.option("--text", "more_texts", multiple=True, type=FILE, metavar="FILE", help="A TEXT by a name; repeatable.")
@click.option("--gather", type=int, default=6144, show_default=True, help="Of a drafter: continuations of TEXT, in the "
              "model's own words, to learn from at most; half of --minutes is for them at most.")  # fmt: skip
@click.option("--listed", type=int, default=4096, show_default=True, help="Of a drafter: tokens that it can propose, "
              "those that are most frequent in the model's words.")  # fmt: skip
@click.option(
    "--find-lr", is_flag=True, default=False,
    help="Train nothing, but try rising learning rates and draw lr-range.png.  [default: train]",
)  # fmt: skip
@click.option("--accumulation", type=int, default=1, show_default=True, help="Forward passes per update.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, the data's order and dropout.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the arithmetic; weights stay float32. float16 needs a GPU.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--eval-every", type=int, help=f"Updates between validations. {_varies('eval_every')}")
@click.option("--save-every", type=int, help=f"Updates between checkpoints. {_varies('save_every')}")
@threads_option
@click.option(
    "--resume",
    is_flag=True,
    default=False,
    help="Go on with the run in the folder; options not given are the run's own. [default: start a run]",
)
@click.option(
    "--json", "as_json", is_flag=True, default=False, help="Print the result as one JSON object. [default: a summary]"
)
@click.pass_context
def train(
    click_context: click.Context, /, texts: tuple[Path, ...], out: Path, resume: bool, as_json: bool, find_lr: bool,
    drafter: Path | None, bundle: Path | None, more_texts: tuple[Path, ...], gather: int, listed: int,
    **parameters: Any,
) -> None:  # fmt: skip
    """Train a tokenizer and a language model on text.

    TEXT is plain UTF-8 (.txt and anything else), or JSON Lines (.jsonl) with {"text": ...} on each line. Start it with
    torchrun to train in several processes.

    With --init, a checkpoint is fine-tuned: on plain text, or on chats, JSON Lines of {"messages": [{"role": "user",
    "content": ...}, {"role": "assistant", "content": ...}]}, written by the checkpoint's own chat template; only the
    assistant's words are learned.

    With --drafter, a small head learns to foretell a checkpoint's model from its last hidden states and its own words.

    With --task, TEXT is JSON Lines of examples: {"source", "target"} for translation; {"context", "question", "answer"}
    for qa, where an empty answer means that the context does not say; {"text", "summary"} for summarization;
    {"words", "predicate", "labels"} for srl (semantic role labelling).
    """
    from rich.console import Console

    from edgellm.torch_threads import let_torch_wait, limit_torch_threads

    if drafter is not None:
        let_torch_wait()
    limit_torch_threads(parameters["threads"])
    from edgellm.training import Reporter, RunConfig, train_from_text

    given = {
        name for name in parameters
        if click_context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }  # fmt: skip
    texts += more_texts
    if drafter is not None:
        from edgellm.cli.train_drafter import run_drafter

        wanted = {name: parameters[name] for name in given} | {"rows": gather, "listed": listed}
        if run_drafter(drafter, texts, out, wanted, bundle=bundle, resume=resume, as_json=as_json):
            click_context.exit(INTERRUPTED)
        return
    if resume:
        config = _resumed(RunConfig.load(out), texts, {n: parameters[n] for n in parameters if n in given})
    else:
        config = _fresh(texts, parameters, given)
    if find_lr:
        _find_lr(config, out, as_json)
        return
    first = os.environ.get("RANK", "0") == "0"
    with Reporter(Console(stderr=True)) as reporter:
        result = train_from_text(config, out, resume=resume, say=reporter.say, on_progress=reporter)
    if result.interrupted:
        if first:
            command = shlex.join(["edgellm", "train", "-o", str(out), "--resume"])
            click.echo(f"stopped after step {result.steps}; the checkpoint is saved, go on with: {command}", err=True)
        click_context.exit(INTERRUPTED)
    if first:
        _print(result, as_json)


def _fresh(texts: tuple[Path, ...], parameters: Mapping[str, Any], given: set[str]) -> RunConfig:
    from edgellm.errors import ConfigError
    from edgellm.training import RunConfig, TrainOptions, parse_settings

    architecture, preset = registry.find(parameters["architecture"]), parameters["preset"]
    if preset not in architecture.presets:
        known = ", ".join(architecture.presets)
        raise ConfigError(f"the {architecture.name} model has no preset {preset!r}; it has {known}")
    changes = parse_settings(architecture.config, parameters["settings"])
    if parameters["vocab_size"] is not None:
        changes["vocab_size"] = parameters["vocab_size"]
    model = dataclasses.replace(architecture.presets[preset], **changes)
    names = {f.name for f in dataclasses.fields(TrainOptions)}
    if parameters["minutes"] and parameters["steps"] is None:
        parameters = {**parameters, "steps": UNBOUNDED}
    recipe = {n: v for n, v in RECIPES.get(preset, RECIPES["tiny"]).items() if n not in given}
    if parameters["init"] is not None and "lr" not in given:
        recipe["lr"] = TUNING_LR["adapters" if parameters["lora"] else "weights"]
    chosen = {n: v for n, v in parameters.items() if n in names and v is not None}
    if "warmup" not in given and (steps := chosen.get("steps", recipe.get("steps"))):
        recipe["warmup"] = min(recipe["warmup"], max(1, steps // 10))  # a short run must still get to its peak
    return RunConfig(
        texts=texts, validation_texts=parameters["validation"], validation_fraction=parameters["validation_fraction"],
        architecture=architecture.name, model=model.to_json(), options=TrainOptions(**{**recipe, **chosen}),
        task=parameters["task"] or "", init=parameters["init"], tokenizer=parameters["tokenizer"],
        lora=parameters["lora"], lora_alpha=parameters["lora_alpha"],
    )  # fmt: skip


def _resumed(run: RunConfig, texts: tuple[Path, ...], given: Mapping[str, Any]) -> RunConfig:
    if fixed := [name for name in MODEL_PARAMETERS if name in given]:
        option = "--" + fixed[0].replace("settings", "set").replace("_", "-")
        raise click.UsageError(f"{option} cannot be given with --resume; the run keeps what it began with")
    return dataclasses.replace(run, texts=texts or run.texts, options=dataclasses.replace(run.options, **given))


def _find_lr(config: RunConfig, out: Path, as_json: bool) -> None:
    """Print what a learning-rate range test found."""
    from rich.console import Console

    from edgellm.training import find_learning_rate

    console = Console(stderr=True)
    found = find_learning_rate(config, out, say=lambda text: console.print(text, highlight=False, markup=False))
    if as_json:
        print_json(found.to_json())
        return
    click.echo(f"try --lr {found.suggested:.1e}: the loss falls fastest at {found.steepest:.1e}; see {found.plot}")


def _print(result: TrainResult, as_json: bool) -> None:
    if as_json:
        print_json(_summary(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in _rows(result):
        table.add_row(f"[bold]{name}[/bold]", value)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"\nNext: edgellm export {shlex.quote(str(result.checkpoint))} -o BUNDLE", markup=False)


def _summary(result: TrainResult) -> dict[str, Any]:
    return {
        "checkpoint": str(result.checkpoint),
        "steps": result.steps,
        "train_loss": result.train_loss,
        "val_loss": result.val_loss,
        "val_perplexity": result.val_perplexity,
        "unigram_entropy": result.unigram_entropy,
        "tokens_per_s": round(result.tokens_per_s, 1),
        "seconds": round(result.seconds, 3),
        "parameters": result.parameters,
        "metrics": str(result.metrics),
        "plot": str(result.plot),
    }


def _rows(result: TrainResult) -> Sequence[tuple[str, str]]:
    return (
        ("checkpoint", str(result.checkpoint)),
        ("validation", f"{result.val_loss:.4f} nats a token (perplexity {result.val_perplexity:.2f})"),
        ("unigram", f"{result.unigram_entropy:.4f} nats a token, for comparison"),
        ("training", f"{result.train_loss:.4f} nats a token after {result.steps:,} steps"),
        ("speed", f"{result.tokens_per_s:,.0f} tokens/s, {result.seconds:.1f} s"),
        ("model", f"{result.parameters:,} parameters"),
        ("curve", str(result.plot)),
    )
