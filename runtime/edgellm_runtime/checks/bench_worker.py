"""A bundle measured in a process of its own, round by round, as its parent asks: so memory is the bundle's alone.

The parent writes lines of JSON to :class:`Worker`'s child and reads one for each.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

from edgellm_runtime import errors
from edgellm_runtime.checks.bench import Round, Workload, run_round
from edgellm_runtime.errors import BackendError, RuntimeFault

__all__ = ["Worker", "serve"]

_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from edgellm_runtime.checks.bench_worker import serve; serve(sys.stdin, sys.stdout)"
)


class Worker:
    """The parent's side; to be closed, or used with ``with``.

    Args:
        bundle: its path.
        threads: for loading.
        device: for loading.
        kernels: likewise.
        adapter: the name of one of the bundle's, or none.
        opener: a module whose ``opened`` loads it in the child, in the place of :func:`edgellm_runtime.load`: it takes
            the path and the number of threads, and gives a session and what runs its products.

    Raises:
        RuntimeFault: what loading raised there, of its kind.
    """

    def __init__(
        self, bundle: str | Path, *, threads: int, device: str, kernels: str | None = None, adapter: str | None = None,
        opener: str = "",
    ) -> None:  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, json.dumps(sys.path, allow_nan=False)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"},
        )  # fmt: skip
        try:
            question = {"bundle": str(bundle), "threads": threads, "device": device, "kernels": kernels}
            self.loaded = self._ask({**question, "adapter": adapter, "opener": opener})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def round(self, workload: Workload, seed: int) -> Round:
        """One round, with the prompts that ``seed`` decides."""
        found = self._ask({"workload": asdict(workload), "seed": seed})
        return Round(found["ttft_s"], tuple(found["steps_s"]), found["tokens_sha256"])

    def peak_rss_mb(self) -> float | None:
        """The most memory that the child has held at once, MiB."""
        found: float | None = self._ask({"peak": True})["peak_rss_mb"]
        return found

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(question, allow_nan=False), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            self._process.wait()
            raise BackendError(f"the process that measured ended with status {self._process.returncode}; measure again")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind: type[RuntimeFault] = getattr(errors, answer["kind"], BackendError)
            raise kind(answer["error"])
        return answer


def serve(questions: TextIO, answers: TextIO) -> None:
    """The child's side, until the questions end."""
    session: Any = None
    for line in questions:
        question = json.loads(line)
        try:
            if "bundle" in question:
                session, answer = _loaded(question)
            elif "workload" in question:
                answer = asdict(run_round(session, Workload(**question["workload"]), question["seed"]))
            else:
                from edgellm_runtime.checks.memory import peak_rss_mb

                answer = {"peak_rss_mb": peak_rss_mb()}
        except RuntimeFault as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        print(json.dumps(answer, allow_nan=False), file=answers, flush=True)


def _loaded(question: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    start = time.perf_counter()
    if question["opener"]:
        session, kernels = importlib.import_module(question["opener"]).opened(question["bundle"], question["threads"])
    else:
        from edgellm_runtime import load

        where = {name: question[name] for name in ("device", "threads", "kernels")}
        session = load(question["bundle"], **where).with_adapter(question["adapter"]).session
        kernels = "own" if session.kernels else "onnxruntime"
    took = time.perf_counter() - start
    return session, {
        "load_s": took, "max_context": session.max_context, "device": session.device, "kernels": kernels,
    }  # fmt: skip
