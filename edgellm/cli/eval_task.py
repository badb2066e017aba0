"""``edgellm eval --task``: a bundle or a checkpoint at its task."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from edgellm_runtime.json_text import json_text

__all__ = ["evaluate_model", "open_runner", "print_report"]

_SHOWN = 3  # examples in the summary
_PREDICTION = {"prediction", "confidence", "refused"}  # keys of each line of a file of predictions
_WIDTH = 100  # characters of each line of theirs


def evaluate_model(
    path: Path, *, task: str, data: Path, limit: int | None = None, beams: int | None = None,
    baseline: Path | None = None, predictions: Path | None = None, window: int = 512,
    adapter: str | None = None, device: str = "auto", kernels: str | None = None, threads: int | None = None,
    tell: Any,
) -> dict[str, Any]:  # fmt: skip
    """The figures; the keys are those of ``--json``.

    Args:
        path: a bundle or a checkpoint.
        task: its name.
        data: test examples.
        limit: the most examples to take.
        beams: hypotheses followed at once; None: as many as the task usually takes.
        baseline: training examples of the baselines, if their scores are wanted too.
        predictions: the file that each answer is written to.
        window: of generation: tokens read from an empty state at a time.
        adapter: the name of one of the bundle's; None for none.
        device: where a bundle runs.
        kernels: whose, as :func:`edgellm_runtime.load` takes it; of a bundle alone.
        threads: CPU threads.
        tell: told what is done and how much of it.
    """
    from edgellm.tasks.evaluate import evaluate_baselines, evaluate_task
    from edgellm.tasks.examples import read_examples
    from edgellm_runtime import OptionError
    from edgellm_runtime.task_spec import FIELDS

    if task not in FIELDS:
        raise OptionError(f"unknown task {task!r}; known: {', '.join(FIELDS)}")
    if predictions is not None:
        _check_replaceable(predictions)
    examples = read_examples(data, task, limit or 0)
    tell("reading the model", 0.0)
    runner, kind = open_runner(path, task, adapter=adapter, device=device, kernels=kernels, threads=threads)
    report = evaluate_task(
        runner, task, examples, beams=beams, window=window, progress=lambda share: tell("asking the model", share)
    )
    if predictions is not None:
        _write(predictions, report.predictions)
    result = {"model": str(path), "kind": kind, **report.to_json()}
    if baseline is not None:
        tell("baselines", 0.0)
        result["baselines"] = evaluate_baselines(runner, task, read_examples(baseline, task), examples, window=window)
    return result | {"shown": _shown(task, examples, report.predictions)}


def open_runner(
    path: Path, task: str, *, adapter: str | None = None, device: str = "auto", kernels: str | None = None,
    threads: int | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """A model behind its task's methods, and whether it is a ``bundle`` or a ``checkpoint``.

    Raises:
        OptionError: it was made for another task, has no tokenizer, or no such adapter; kernels for a checkpoint.
    """
    from edgellm_runtime import OptionError, load

    if (path / "manifest.json").is_file():
        model = load(path, device=device, kernels=kernels, threads=threads)
        session, tokenizer, spec, kind = model.session, model.tokenizer, model.bundle.manifest.task, "bundle"
    else:
        if kernels is not None:
            raise OptionError(f"kernels {kernels!r} for a checkpoint, which PyTorch runs; leave them out")
        session, tokenizer, spec = _checkpoint(path, device, threads)
        kind = "checkpoint"
    session = session.with_adapter(adapter)
    if tokenizer is None:
        raise OptionError(f"{path}: has no tokenizer, so it cannot read examples; make it with one")
    name = "generation" if spec is None else spec.name
    if name != task:
        raise OptionError(f"{path}: its task is {name}, not {task}; give --task {name} or another model")
    if task == "generation":
        return SimpleNamespace(session=session, tokenizer=tokenizer, spec=spec), kind
    from edgellm_runtime.tasks.runner import TaskRunner

    assert spec is not None
    return TaskRunner(session, tokenizer, spec), kind


def _checkpoint(path: Path, device: str, threads: int | None) -> tuple[Any, Any, Any]:
    """Session, tokenizer and task of a checkpoint that PyTorch runs."""
    from edgellm.torch_threads import let_torch_wait, limit_torch_threads

    let_torch_wait()
    from edgellm.checkpoints import load_checkpoint
    from edgellm_exporters.proof.torch_backend import torch_session
    from edgellm_runtime import OptionError
    from edgellm_runtime.bundle import TokenizerInfo
    from edgellm_runtime.text.tokenizer import Tokenizer

    if device not in ("auto", "cpu"):
        raise OptionError(f"device {device!r} for a checkpoint; it runs on the cpu here")
    limit_torch_threads(threads)
    loaded = load_checkpoint(path)
    model: Any = loaded.model  # torch_session checks what it follows
    session = torch_session(model)
    if loaded.tokenizer_json is None:
        return session, None, loaded.task
    info = TokenizerInfo(
        bos_token_id=loaded.bos_token_id, eos_token_ids=loaded.eos_token_ids, add_bos=loaded.add_bos,
        has_chat_template=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(loaded.tokenizer_json, encoding="utf-8")
        return session, Tokenizer(file, info, vocab_size=session.vocab_size), loaded.task


def _check_replaceable(path: Path) -> None:
    """Refuse to write predictions over anything but earlier ones, such as the examples themselves."""
    from edgellm_runtime import OptionError

    if not path.is_file():  # a pipe, or nothing yet
        return
    try:
        ours = all(json.loads(line).keys() == _PREDICTION for line in path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise OptionError(f"{path}: holds something else than predictions; name another file with --predictions")


def _write(path: Path, predictions: Sequence[Any]) -> None:
    lines = ({"prediction": p.value, "confidence": p.confidence, "refused": p.refused} for p in predictions)
    text = "".join(json_text(line, ensure_ascii=False) + "\n" for line in lines)
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    pending = path.with_name(f"{path.name}.tmp")
    pending.write_text(text, encoding="utf-8")
    pending.replace(path)


def _shown(task: str, examples: Sequence[Mapping[str, Any]], predictions: Sequence[Any]) -> list[dict[str, str]]:
    """The first few examples, as texts."""
    asked = {"translation": "source", "qa": "question", "summarization": "text", "srl": "words"}
    wanted = {"translation": "target", "qa": "answer", "summarization": "summary", "srl": "labels"}

    def text(value: Any) -> str:
        return value if isinstance(value, str) else " ".join(value)

    return [
        {"asked": text(e[asked[task]]), "wanted": text(e[wanted[task]]), "found": text(p.value)}
        for e, p in zip(examples[:_SHOWN], predictions, strict=False)
    ]


def print_report(result: Mapping[str, Any]) -> None:
    """The summary for people."""
    name, latency = result["primary"], result["latency_ms"]
    rows = [
        ("task", result["task"]),
        ("examples", f"{result['examples']:,}"),
        ("model", f"{result['model']}, a {result['kind']}"),
    ]
    rows += [(key.replace("_", " "), f"{value:.4g}") for key, value in result["scores"].items()]
    for baseline, scores in result.get("baselines", {}).items():
        rows.append((f"without a model: {baseline}", f"{name.replace('_', ' ')} {scores[name]:.4g}"))
    if sure := result["confidence"]:
        text = f"{name} {sure['surer_half']:.4g} of the surer half, {sure['other_half']:.4g} of the other"
        rows.append(("mean confidence", f"{sure['mean']:.3f}; {text}"))
    if result["refused"]:
        rows.append(("refused", f"{result['refused']:,} examples, counted as wrong"))
    rows.append(("time of one", f"{latency['median']:.1f} ms median, {latency['p95']:.1f} ms 95th percentile"))
    rows.append(("memory", f"{result['peak_rss_mb'] or 0:.0f} MiB at most"))
    width = max(len(left) for left, _ in rows)
    for left, right in rows:
        click.echo(f"{left:>{width}}  {right}")
    for shown in result["shown"]:
        click.echo()
        for key in ("asked", "wanted", "found"):
            click.echo(f"{key:>{width}}  {' '.join(shown[key].split())[:_WIDTH]}")
