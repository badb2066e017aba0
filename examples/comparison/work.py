"""One task's comparison: train, export and evaluate each pattern; what is done stays done."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison.sizes import equal_sizes, parameters
from edgellm.demo.commands import Commands
from edgellm.models.hybrid import HybridConfig

__all__ = ["FOLDERS", "ROUNDINGS", "Plan", "add", "compare"]

FOLDERS: Mapping[str, str] = {
    "generation": "generation", "translation": "translation", "qa": "question_answering",
    "summarization": "summarization", "srl": "role_labelling",
}  # fmt: skip
ROUNDINGS: Mapping[str, Sequence[str]] = {
    "float32": (), "int8": ("--quantize", "int8"), "w8a8": ("--quantize", "w8a8"),
}  # fmt: skip
_SHAPE = ("pattern", "recurrent_width", "mlp_width", "width", "num_heads", "num_kv_heads")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare.

    Args:
        task: its name.
        data: folder with train.jsonl, valid.jsonl and test.jsonl.
        runs: folder for checkpoints and bundles.
        result: the JSON file.
        minutes: of training, each.
        base: width, heads, blocks and MLP of every pattern.
        patterns: names from :data:`comparison.sizes.PATTERNS`.
        limit: test examples; 0 for all.
        threads: CPU threads of training and of what is timed.
        seed: of every training.
        options: more for ``edgellm train``.
    """

    task: str
    data: Path
    runs: Path
    result: Path
    minutes: float
    base: HybridConfig | None = None
    patterns: Sequence[str] = ()
    limit: int = 500
    threads: int = 2
    seed: int = 0
    options: Sequence[str] = field(default_factory=tuple)


class _Results:
    """The JSON file; written after each part, so that a comparison that was stopped goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        pending = self.path.with_name(self.path.name + ".tmp")
        pending.write_text(
            json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        pending.replace(self.path)

    def part(self, row: dict[str, Any], name: str, words: Sequence[object], do: Callable[[], dict[str, Any]]) -> bool:
        """Do and keep a part, unless the file has it from the very same command; whether it was done."""
        command = shlex.join(["edgellm", *map(str, words)])
        if row.get(name, {}).get("command") == command:
            return False
        row[name] = {"command": command, **do()}
        self.data["environment"] = _environment()
        self.save()
        return True


def compare(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is not done yet.

    Args:
        plan: what to compare.
        say: told the sizes.

    Returns:
        What the result's file now holds.

    Raises:
        ConfigError: patterns that cannot be made equally large.
        click.ClickException: a command failed.
    """
    assert plan.base is not None, "what is compared needs a shape"
    shapes = equal_sizes(plan.base, plan.patterns)
    for name, shape in shapes.items():
        widths = f"recurrent_width {shape.recurrent_width}, mlp_width {shape.mlp_width}"
        say(f"{plan.task}, {name}: {parameters(shape):,} parameters with {shape.vocab_size:,} tokens; {widths}")
    results = _opened(plan)
    commands = Commands(8 * len(shapes))
    for name, shape in shapes.items():
        folder = plan.runs / plan.task / name
        model = {"pattern": list(shape.pattern)} | {key: getattr(shape, key) for key in _SHAPE[1:]}
        _row(plan, name, folder, _training(plan, shape, folder / "run"), model, results, commands)
    return results.data


def add(plan: Plan, name: str) -> dict[str, Any]:
    """One more row: whatever model the plan's options make ``edgellm train`` train.

    Args:
        plan: its shape, patterns and widths are not looked at.
        name: of the row.
    """
    results = _opened(plan)
    folder = plan.runs / plan.result.stem / name.replace(" ", "-")
    _row(plan, name, folder, [*_beginning(plan, folder / "run"), *_ending(plan)], {}, results, Commands(8))
    return results.data


def _opened(plan: Plan) -> _Results:
    results = _Results(plan.result)
    results.data |= {
        "task": plan.task, "seed": plan.seed, "minutes": plan.minutes, "threads": plan.threads,
        "data": {name: _lines(plan.data / f"{name}.jsonl") for name in ("train", "valid", "test")},
    }  # fmt: skip
    results.data.setdefault("rows", {})
    return results


def _row(
    plan: Plan, name: str, folder: Path, words: Sequence[Any], model: Mapping[str, Any], results: _Results,
    commands: Commands,
) -> None:  # fmt: skip
    row: dict[str, Any] = results.data["rows"].setdefault(name, {})
    say = f"{plan.task}, {name}: "
    if results.part(row, "train", words, lambda: _trained(commands, say, words)):
        for stale in [key for key in row if key != "train"]:  # made from weights that are no more
            del row[stale]
        row["model"] = dict(model)
    evaluated = _evaluation(plan, folder / "run" / "best", folder / "pytorch.jsonl")
    if name == next(iter(results.data["rows"])):
        evaluated += ["--baseline", plan.data / "train.jsonl"]
    results.part(row, "pytorch", evaluated, lambda: commands.edgellm(say + "PyTorch", *evaluated))
    if "baselines" in row["pytorch"]:
        results.data["baselines"] = row["pytorch"].pop("baselines")
    for rounding, options in ROUNDINGS.items():
        bundle = folder / rounding
        export = ["export", folder / "run" / "best", "-o", bundle, *options]
        ask = _evaluation(plan, bundle, folder / f"{rounding}.jsonl")
        title = f"{say}{rounding} bundle"
        key = f"{rounding} export"
        if results.part(row, key, export, lambda e=export, t=title: _exported(commands, t, e)):  # type: ignore[misc]
            row.pop(rounding, None)
        results.part(row, rounding, ask, lambda a=ask, t=title: commands.edgellm(t, *a))  # type: ignore[misc]
        row[rounding]["same_answers"] = _same(folder / "pytorch.jsonl", folder / f"{rounding}.jsonl", row[rounding])
        results.save()


def _trained(commands: Commands, say: str, words: Sequence[Any]) -> dict[str, Any]:
    shutil.rmtree(words[3], ignore_errors=True)  # a run of another command, or one that was stopped
    return commands.edgellm(f"{say}train", *words)


def _exported(commands: Commands, title: str, words: Sequence[Any]) -> dict[str, Any]:
    found = commands.edgellm(f"{title}: export", *words, "--force")  # over the bundle of an older command
    return {key: found[key] for key in ("bytes", "bits_per_weight", "parity", "seconds", "peak_rss_mb")}


def _training(plan: Plan, shape: HybridConfig, out: Path) -> list[Any]:
    settings = [
        word for key in _SHAPE for value in [getattr(shape, key)]
        for word in ("--set", f"{key}={','.join(value) if key == 'pattern' else value}")
    ]  # fmt: skip
    return [*_beginning(plan, out), *settings, "--vocab-size", shape.vocab_size, *_ending(plan)]


def _beginning(plan: Plan, out: Path) -> list[Any]:
    data = plan.data
    return ["train", data / "train.jsonl", "-o", out, "--task", plan.task, "--validation", data / "valid.jsonl"]


def _ending(plan: Plan) -> list[Any]:
    return ["--minutes", f"{plan.minutes:g}", "--seed", plan.seed, "--threads", plan.threads, *plan.options]


def _evaluation(plan: Plan, model: Path, predictions: Path) -> list[Any]:
    limit = ["--limit", plan.limit] if plan.limit else []
    where = ["--data", plan.data / "test.jsonl", "--predictions", predictions]
    return ["eval", model, "--task", plan.task, *where, *limit, "--threads", plan.threads]


def _same(reference: Path, found: Path, row: Mapping[str, Any]) -> float | None:
    """The share of answers that are PyTorch's; None where there are none, or what was found before."""
    if not reference.is_file() or not found.is_file():
        return row.get("same_answers")
    pairs = list(zip(*(_predictions(path) for path in (reference, found)), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def _predictions(path: Path) -> list[Any]:
    return [json.loads(line)["prediction"] for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _environment() -> dict[str, Any]:
    packages = ("edgellm", "torch", "onnxruntime", "sacrebleu", "rouge-score", "seqeval")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "python": platform.python_version(),
        "cores": os.cpu_count(), "processor": _processor(), **{p: importlib.metadata.version(p) for p in packages},
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def base_of(vocab_size: int, blocks: int, **widths: int) -> HybridConfig:
    """A shape whose pattern is to be replaced."""
    return dataclasses.replace(
        HybridConfig(vocab_size=vocab_size, pattern=("lstm",) * blocks, tie_embeddings=True), **widths
    )  # type: ignore[arg-type]
