"""``edgellm eval``: how well a bundle predicts a text and how far it is from its checkpoint; or does its task."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from edgellm.cli.device import device_option
from edgellm.cli.progress import stages
from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option
from edgellm_runtime.kernel_choice import CHOICES
from edgellm_runtime.kernel_choice import VARIABLE as KERNELS

__all__ = ["evaluate", "evaluate_bundle"]


@click.command("eval", context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", "file", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text to predict.")
@click.option("--against", type=click.Path(path_type=Path), metavar="CHECKPOINT",
              help="With --text: also measure the distance from this checkpoint in PyTorch.")  # fmt: skip
@click.option("--tokens", type=int, default=4096, help="With --text: most tokens to take from it; 0 for all.")
@click.option("--window", type=int, default=512, help="Tokens of text read from an empty state at a time.")
@click.option("--task", metavar="NAME", help="Score this task instead: generation, translation, qa, summarization "
              "or srl.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="With --task: its test data, JSON Lines.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="With --task: take the first N examples.")
@click.option("--beams", type=click.IntRange(min=1), metavar="N", help="With --task: hypotheses followed at once, "
              "where answers are written.")  # fmt: skip
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="With --task: also score what needs "
              "no model, learned from these training examples.")  # fmt: skip
@click.option("--predictions", type=click.Path(path_type=Path), metavar="FILE", help="With --task: write each answer "
              "there, JSON Lines.")  # fmt: skip
@click.option("--write-receipt", is_flag=True, help="With --text and --against: write what was measured into the "
              "bundle, for others to measure again.")  # fmt: skip
@click.option("--receipt", is_flag=True, help="With --text: measure again what the bundle's receipt says, as it says; "
              "with --against, the distance too.")  # fmt: skip
@click.option("--adapter", default=None, metavar="NAME", help="Measure with this adapter of the bundle's.  "
              "[default: none]")  # fmt: skip
@device_option
@click.option("--kernels", type=click.Choice(CHOICES), default=None, show_default=False, help="Whose kernels to run: "
              "own are those of the package edgellm-kernels.  "
              f"[default: those that {KERNELS} says, else onnxruntime]")  # fmt: skip
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
@click.pass_context
def evaluate(
    context: click.Context, /, bundle: Path, file: Path | None, against: Path | None, tokens: int, window: int,
    write_receipt: bool, receipt: bool, adapter: str | None, device: str, kernels: str | None, threads: int | None,
    as_json: bool, **of_task: Any,
) -> int:  # fmt: skip
    """Measure how well BUNDLE predicts a text, or does its task.

    With --text: perplexity; with --against too, the KL divergence from the checkpoint's distribution (mean and 99th
    percentile, nats) and how often both have the same most likely token.

    With --receipt: the figures of the bundle's receipt, over the very text (its sha256 is compared). The exit status is
    0 if all are within 2%, 1 if one is not, and what may be why is printed; 2 if they cannot be compared.

    With --task and --data: the task's scores over examples asked one at a time, with the time that each takes and the
    memory. BUNDLE may be a checkpoint then, which PyTorch runs.
    """
    given = _given(context)
    if of_task["task"] is not None:
        from edgellm.cli.eval_task import evaluate_model, print_report

        _refuse(
            given & {"file", "against", "tokens", "receipt", "write_receipt"},
            "goes without --task, which scores examples and no text",
        )
        if of_task["data"] is None:
            raise click.UsageError("--task needs its test data: --data FILE")
        with stages() as tell:
            result = evaluate_model(
                bundle, **of_task, window=window, adapter=adapter, device=device, kernels=kernels, threads=threads,
                tell=tell,
            )  # fmt: skip
        print_json(result) if as_json else print_report(result)
        return 0
    _refuse(given & of_task.keys(), "belongs to --task NAME, which is not given")
    if file is None:
        raise click.UsageError("nothing to measure; give --text FILE, or --task NAME and --data FILE")
    if write_receipt and (receipt or against is None):
        raise click.UsageError("--write-receipt needs --against CHECKPOINT, and goes without --receipt")
    if receipt or write_receipt:
        _refuse(given & {"adapter"}, "goes without a receipt, which is of the bundle without one")
    run: dict[str, Any] = {"adapter": adapter, "device": device, "kernels": kernels, "threads": threads}
    measure = partial(evaluate_bundle, bundle, file, against, **run)
    if receipt:
        from edgellm.cli.receipt import measure_again

        _refuse(given & {"tokens", "window"}, "goes without --receipt, which says how much to read")
        with stages() as tell:
            return measure_again(bundle, file, partial(measure, tell=tell), device=device, as_json=as_json)
    with stages() as tell:
        result = measure(tokens=tokens, window=window, tell=tell)
    if write_receipt:
        from edgellm.cli.receipt import add_receipt
        from edgellm_runtime.checks.receipt import Asked

        add_receipt(bundle, file, result, Asked(tokens=tokens, window=window), device)
    if as_json:
        print_json(result)
        return 0
    for name, value in result.items():
        click.echo(f"{name:>22}  {value:.6g}" if isinstance(value, float) else f"{name:>22}  {value}")
    return 0


def _given(context: click.Context) -> set[str]:
    default = click.core.ParameterSource.DEFAULT
    return {name for name in context.params if context.get_parameter_source(name) is not default}


def _refuse(names: set[str], why: str) -> None:
    if names:
        raise click.UsageError(f"--{min(names).replace('file', 'text')} {why}")


def evaluate_bundle(
    path: Path, file: Path, against: Path | None = None, *, tokens: int = 4096, window: int = 512, skip: int = 0,
    adapter: str | None = None, device: str = "auto", kernels: str | None = None, threads: int | None = None,
    tell: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures; the keys are those of ``--json``."""
    from edgellm_runtime import OptionError, load
    from edgellm_runtime.checks.evaluate import evaluate as run
    from edgellm_runtime.checks.receipt import Asked, read_windows

    model = load(path, device=device, kernels=kernels, threads=threads).with_adapter(adapter)
    if model.tokenizer is None:
        raise OptionError(f"{path}: has no tokenizer, so it cannot read a text; export it with one")
    try:
        asked = Asked(tokens=tokens, window=window, skip=skip)
    except ValueError as error:
        raise OptionError(str(error)) from error
    windows = read_windows(file, model.tokenizer.encode, asked, model.session.max_context)
    if against is None:
        found = run(model.session, windows, lambda share: tell("predicting", share))
        return {"perplexity": found.perplexity, "tokens": found.tokens}
    tell("reading the checkpoint", 0.0)
    from edgellm.torch_threads import limit_torch_threads

    limit_torch_threads()
    from edgellm.cli.against import read_reference
    from edgellm_exporters.proof.parity import compare
    from edgellm_exporters.proof.receipt import figures

    reference = read_reference(against, path, model.session, max(map(len, windows)))
    report = compare(reference, model.session, windows, progress=lambda share: tell("comparing", share))
    return figures(report)
