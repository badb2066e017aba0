"""One run of everything within a time: parity, speed, copies, engines."""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_checks.report import copies_in_profile, decode_bytes, roofline_share
from gpu_checks.subjects import Lowered, TorchRunner, parity_of, shapes

__all__ = ["PRECISIONS", "Check", "timed"]

PRECISIONS = (("float16", "none"), ("bfloat16", "none"), ("float16", "int8"), ("float16", "int4"))


def timed(
    start: Callable[[], None], step: Callable[[Any], Any], prompt: Any, first: Any, new: int, rounds: int,
    wait: Callable[[], None],
) -> tuple[float, float]:  # fmt: skip
    """Seconds to the first token, and of one further token; medians of rounds after one that is not counted.

    Args:
        start: makes an empty state.
        step: reads tokens, gives the next.
        prompt: (batch, time).
        first: (batch, 1), what stands for a token.
        new: tokens after the first.
        rounds: how many.
        wait: until the device has done what it was given.
    """
    ttft, decode = [], []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        start()
        step(prompt)
        wait()
        read = time.perf_counter()
        token = first
        for _ in range(new):
            token = step(token)
        wait()
        ttft.append(read - begun)
        decode.append((time.perf_counter() - read) / new)
    return statistics.median(ttft[1:]), statistics.median(decode[1:])


class Check:
    """One run of everything.

    Args:
        device: ``cuda``, or ``cpu`` for the dry run.
        quick: tiny models, few tokens.
        minutes: what all parts together may take. Nothing is begun after them, nor what would last longer.
        note: told the result after each part, for a machine that goes away takes with it what nobody wrote down.
    """

    def __init__(
        self, device: str, quick: bool, minutes: float, note: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> None:
        import torch

        self.note = note
        self.torch, self.device, self.quick = torch, device, quick
        self.end, self.begun = time.monotonic() + 60 * minutes, time.monotonic()
        self.took: dict[str, float] = {}  # seconds of the last part of each kind
        self.batches, self.prompt, self.new = ((1, 2), 16, 6) if quick else ((1, 8, 32), 512, 64)
        self.result: dict[str, Any] = {
            "parity": [], "speed": [], "copies": [], "engines": [], "not_run": [], "quick": quick,
            "seconds": 0.0,
        }  # fmt: skip

    def run(self, folder: Path) -> dict[str, Any]:
        """Do it all; what fails or finds no time is listed."""
        result = self.result
        result["copy_gb_s"] = self.copy_bandwidth()
        for number, (name, make) in enumerate(shapes(self.quick).items()):
            self.torch.manual_seed(number)
            self.attempt(f"{name}", lambda name=name, make=make: self.model(name, make().eval(), folder / name))
        self.attempt("engines", lambda: self.engines(folder / "engines"))
        return result

    def attempt(self, what: str, work: Callable[[], None], kind: str = "") -> None:
        """Run one part, or say why it was not.

        Args:
            what: its name.
            work: does it.
            kind: parts of one kind take about the same time; empty: nothing is known of it.
        """
        begun = time.monotonic()
        if begun + self.took.get(kind, 0.0) > self.end:
            self.result["not_run"].append(f"{what}: out of time")
            return
        print(f"[{begun - self.begun:5.0f} s] {what}", file=sys.stderr)
        try:
            work()
        except Exception as error:  # one part's fault must not cost the minutes of the others
            traceback.print_exc()
            self.result["not_run"].append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        if kind:
            self.took[kind] = time.monotonic() - begun
        self.result["seconds"] = round(time.monotonic() - self.begun, 1)
        self.note(self.result)

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def copy_bandwidth(self) -> float:
        """GB/s of a copy within the device's memory, reads and writes counted."""
        count = 1 << (22 if self.quick else 29)
        source = self.torch.empty(count, dtype=self.torch.uint8, device=self.device)
        target, best = self.torch.empty_like(source), 0.0
        for _ in range(8):
            self.wait()
            begun = time.perf_counter()
            target.copy_(source)
            self.wait()
            best = max(best, 2 * count / (time.perf_counter() - begun))
        return best / 1e9

    def used_mb(self) -> float | None:
        """Memory of the GPU in use by all."""
        if self.device != "cuda":
            return None
        free, total = self.torch.cuda.mem_get_info()
        return (total - free) / 2**20

    def model(self, name: str, model: Any, folder: Path) -> None:
        """Parity in every precision, speed, and copies of one model."""
        smallest = not self.result["parity"]
        for dtype, method in PRECISIONS if smallest else (("float16", "none"), ("float16", "int4")):
            what = f"{name} {dtype} {method}"
            if dtype == "bfloat16" and self.device == "cpu":
                self.result["not_run"].append(f"{what}: ONNX Runtime has no such kernels on CPU")
                continue
            self.attempt(what, lambda d=dtype, m=method: self.precision(name, model, d, m, folder / f"{d}-{m}"))
        for compiled in (False, True):
            runner = "torch.compile" if compiled else "PyTorch eager"
            self.attempt(f"{name} {runner}", lambda c=compiled, r=runner: self.pytorch(name, model, r, c))

    def precision(self, name: str, model: Any, dtype: str, method: str, folder: Path) -> None:
        """One precision of one model."""
        lowered, before = Lowered(model, dtype, method, folder), self.used_mb()
        session = lowered.session(self.device)
        after = self.used_mb()
        memory = None if before is None or after is None else after - before
        parity = parity_of(model, lowered, dtype, method, self.device, session)
        self.result["parity"].append({**parity, "precision": f"{name} {parity['precision']}"})
        what = f"{name} {dtype} {method}"

        def row(session: Any, batch: int, memory: float | None, runner: str) -> None:
            self.attempt(
                f"{what}, {runner}, batch {batch}",
                lambda: self.speed(name, lowered, session, f"{dtype} {method}", batch, memory, runner),
                f"{name}, {runner}",
            )

        for batch in self.batches:
            row(session, batch, memory, "edgellm")
        if session._backend.captures:
            row(lowered.session(self.device, capture=False), 1, None, "edgellm, steps not captured")
        self.attempt(f"{what}, copies", lambda: self.copies(what, lowered, folder))

    def speed(
        self, name: str, lowered: Lowered, session: Any, precision: str, batch: int, memory: float | None, runner: str
    ) -> None:  # fmt: skip
        """Prompt and single tokens of a session, greedy."""
        import numpy as np

        from edgellm_runtime.generation.generate import next_tokens
        from edgellm_runtime.generation.sampling import Sampler, SamplingOptions

        sampler = Sampler(SamplingOptions(), rows=batch, vocab_size=session.vocab_size)
        prompt = np.random.default_rng(0).integers(0, session.vocab_size, (batch, self.prompt))
        held: dict[str, Any] = {}

        def start() -> None:
            held.pop("state", None)  # first, so that its memory serves the next one
            held["state"] = session.new_state(batch, self.prompt + self.new + 1)

        def step(tokens: Any) -> Any:
            if tokens.shape[1] > 1:
                return sampler(session.step(tokens, held["state"])[:, 0])[:, None]
            return next_tokens(session, sampler, tokens, held["state"], range(batch))[:, None]

        ttft, each = timed(start, step, prompt, prompt[:, :1], self.new, 1 if self.quick else 3, lambda: None)
        specs = lowered.signature.state
        token = sum(s.nbytes(1, 1) for s in specs if s.update == "append")
        fixed = sum(s.nbytes(1, 1) for s in specs if s.update != "append")
        moved = decode_bytes(lowered.weight_bytes, token, fixed, batch, self.prompt + self.new // 2)
        self.row(
            name, runner, precision, batch, ttft, each, roofline_share(moved, each, self.result["copy_gb_s"]), memory
        )

    def row(
        self, name: str, runner: str, precision: str, batch: int, ttft: float, each: float, share: float | None,
        memory: float | None,
    ) -> None:  # fmt: skip
        """Note one measurement."""
        self.result["speed"].append({
            "model": name, "runner": runner, "precision": precision, "batch": batch, "prompt": self.prompt,
            "ttft_ms": 1e3 * ttft, "prefill_tokens_s": batch * self.prompt / ttft, "decode_tokens_s": batch / each,
            "roofline": share, "memory_mb": memory,
        })  # fmt: skip

    def pytorch(self, name: str, model: Any, runner: str, compiled: bool) -> None:
        """The same model and work in PyTorch, in float16 on a GPU."""
        dtype = "float16" if self.device == "cuda" else "float32"
        backend = ("eager" if self.quick else "inductor") if compiled else ""  # a C++ compiler takes its time
        run = TorchRunner(model, dtype, self.device, compiled=backend)
        for batch in self.batches[:1] if self.quick else self.batches:
            self.attempt(
                f"{name} {runner}, batch {batch}",
                lambda batch=batch: self.pytorch_row(name, model, runner, run, dtype, batch),
                f"{name}, {runner}",
            )

    def pytorch_row(self, name: str, model: Any, runner: str, run: TorchRunner, dtype: str, batch: int) -> None:
        """One of PyTorch's measurements."""
        tokens = self.torch.randint(0, model.config.vocab_size, (batch, self.prompt), device=self.device)
        ttft, each = timed(
            lambda: run.start(batch, self.prompt + self.new + 1), run.step, tokens, tokens[:, :1], self.new,
            1 if self.quick else 3, self.wait,
        )  # fmt: skip
        self.row(name, runner, dtype, batch, ttft, each, None, None)

    def copies(self, what: str, lowered: Lowered, folder: Path) -> None:
        """Copies between device and host in a few decode steps, from ONNX Runtime's profile."""
        import numpy as np

        session = lowered.session(self.device, capture=False, profile=folder / "profile")
        state = session.new_state(1, 16)
        for _ in range(4):
            session.best(np.array([[1]]), state, 1)
        events = json.loads(Path(session._backend.end_profile()).read_text())
        self.result["copies"].append({"model": what, "copies": copies_in_profile(events)})

    def engines(self, folder: Path) -> None:
        """Build engines if a library for it is there."""
        from edgellm_exporters.errors import ExportError
        from edgellm_exporters.export import ExportOptions, export

        begun = time.monotonic()
        name, make = next(iter(shapes(self.quick).items()))
        try:
            made = export(make().eval(), folder, options=ExportOptions(target="tensorrt", dtype="float16"))
            what = (
                f"{name}: {', '.join(e.file for e in made.bundle.manifest.engines)} in {time.monotonic() - begun:.0f} s"
            )
        except ExportError as error:
            what = f"{name}: not built: {str(error)[:200]}"
        self.result["engines"].append({"what": what})
