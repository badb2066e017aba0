"""The whole road for each task in a few steps on its excerpt: ``python examples/road.py``, minutes on two cores.

Train, export in float32 and in 8 bits, verify, and evaluate PyTorch and both bundles: PyTorch and the float32 bundle
must give the same answers. The models are far too small and too short of training to be worth anything.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.work import FOLDERS

from edgellm import cli

__all__ = ["RoadError", "main", "walk"]

_EXAMPLES = Path(__file__).parent
_MODEL = {
    "width": 64, "pattern": "lstm,attention", "num_heads": 2, "num_kv_heads": 2, "recurrent_width": 48, "mlp_width": 64,
}  # fmt: skip
_SAME = 1e-3  # how far scores of equal answers may be apart; bits per byte are sums of rounded numbers


class RoadError(Exception):
    """A command failed, or two that must agree do not."""


def walk(task: str, out: Path, *, data: Path | None = None, steps: int = 20, limit: int = 20) -> dict[str, Any]:
    """One task's road.

    Args:
        task: its name.
        out: an empty folder.
        data: a folder with train, valid and test.jsonl; None: the task's excerpt.
        steps: updates of training.
        limit: test examples.

    Returns:
        What the evaluations printed: ``pytorch``, ``float32`` and ``int8``.

    Raises:
        RoadError: a command failed, or the float32 bundle does not answer as PyTorch does.
    """
    data = data or _EXAMPLES / FOLDERS[task] / "excerpt"
    settings = [word for name, value in _MODEL.items() for word in ("--set", f"{name}={value}")]
    trained = _edgellm(
        "train", data / "train.jsonl", "-o", out / "run", "--task", task, "--validation", data / "valid.jsonl",
        *settings, "--vocab-size", 600, "--steps", steps, "--batch-size", 8, "--threads", 1, "--seed", 0,
    )  # fmt: skip
    checkpoint = Path(trained["checkpoint"])
    for rounding in ("float32", "int8"):
        options = ("--quantize", rounding) if rounding != "float32" else ()
        _edgellm("export", checkpoint, "-o", out / rounding, *options)
        _edgellm("verify", out / rounding)
    found = {}
    for name, model in (("pytorch", checkpoint), ("float32", out / "float32"), ("int8", out / "int8")):
        baseline = ("--baseline", data / "train.jsonl") if name == "pytorch" else ()
        found[name] = _edgellm(
            "eval", model, "--task", task, "--data", data / "test.jsonl", "--limit", limit, "--threads", 1,
            "--predictions", out / f"{name}.jsonl", *baseline,
        )  # fmt: skip
    _compare(task, found, out)
    return found


def _compare(task: str, found: dict[str, Any], out: Path) -> None:
    answers = {name: _answers(out / f"{name}.jsonl") for name in found}
    if answers["pytorch"] != answers["float32"]:
        pairs = zip(answers["pytorch"], answers["float32"], strict=True)
        different = next((a, b) for a, b in pairs if a != b)
        raise RoadError(f"{task}: PyTorch answers {different[0]!r}, the float32 bundle {different[1]!r}")
    for score, value in found["pytorch"]["scores"].items():
        other = found["float32"]["scores"][score]
        if not math.isclose(value, other, rel_tol=_SAME, abs_tol=_SAME):
            raise RoadError(f"{task}: {score} is {value} in PyTorch and {other} in the float32 bundle")


def _answers(path: Path) -> list[Any]:
    return [json.loads(line)["prediction"] for line in path.read_text(encoding="utf-8").splitlines()]


def _edgellm(*words: object) -> dict[str, Any]:
    """Run a command in this process, which has PyTorch loaded already; its JSON."""
    arguments = [str(word) for word in words] + ["--json"]
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = cli.run(arguments)
    if status:
        raise RoadError(f"edgellm {' '.join(arguments)}: status {status}\n{errors.getvalue()}")
    result: dict[str, Any] = json.loads(printed.getvalue())
    return result


def main(tasks: Sequence[str]) -> int:
    """Walk the tasks, all if none is named; 1 if one of them fails."""
    failed = False
    for task in tasks or FOLDERS:
        start = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = walk(task, Path(folder))
        except RoadError as error:
            failed = True
            print(f"{task}: FAILED\n{error}", file=sys.stderr, flush=True)
            continue
        main_score = found["pytorch"]["primary"]
        scores = ", ".join(f"{name} {one['scores'][main_score]:.2f}" for name, one in found.items())
        print(f"{task}: {main_score} {scores}; {time.perf_counter() - start:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
