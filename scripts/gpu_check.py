"""Everything that needs a GPU, in a few minutes: is it right, is it fast, does anything cross the bus that should not.

    python scripts/gpu_check.py                      # on a machine with a GPU; `make gpu-check` adds --write
    python scripts/gpu_check.py --device cpu --quick # the same code at tiny sizes on the CPU, so that it does not rot

Without a GPU it says so, checks nothing and exits with 0. Models have random weights: speed does not depend on them,
and parity is against the same model in PyTorch. What does not fit into the time is listed as not run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["check_result", "copies_in_profile", "decode_bytes", "main", "roofline_share", "rows_of"]

MINUTES = 8.0
RESULTS = Path("docs/gpu-results.md")
MARK = "<!-- rows -->"
NOTHING_YET = "No run on a GPU has been recorded yet; the first one replaces this sentence.\n\n"
PRECISIONS = (("float16", "none"), ("bfloat16", "none"), ("float16", "int8"), ("float16", "int4"))
# largest difference of a logit relative to the largest, and share of equal most likely tokens, against PyTorch in
# float32 with the very same weights
BOUNDS = {"float16": (0.01, 0.98), "bfloat16": (0.06, 0.9)}
_SCHEMA: Mapping[str, type | tuple[type, ...]] = {
    "machine": dict, "date": str, "command": str, "quick": bool, "copy_gb_s": (int, float), "parity": list,
    "speed": list, "copies": list, "engines": list, "not_run": list, "seconds": (int, float),
}  # fmt: skip
_SPEED: Mapping[str, type | tuple[type, ...]] = {
    "model": str, "runner": str, "precision": str, "batch": int, "prompt": int, "ttft_ms": (int, float),
    "prefill_tokens_s": (int, float), "decode_tokens_s": (int, float), "roofline": (int, float, type(None)),
    "memory_mb": (int, float, type(None)),
}  # fmt: skip


# --- arithmetic, which tests hold to --------------------------------------------------------------------------------


def decode_bytes(
    weight_bytes: int, token_bytes: int, fixed_bytes: int, batch: int, context: int
) -> int:  # fmt: skip
    """Bytes that a decode step must move: weights once, each row's cache as it is read, what is replaced both ways.

    Args:
        weight_bytes: of all weights that a step reads.
        token_bytes: of the cache for one token of one row.
        fixed_bytes: of the state of one row that does not grow.
        batch: rows.
        context: tokens that each row holds.
    """
    return weight_bytes + batch * (context * token_bytes + 2 * fixed_bytes)


def roofline_share(moved: int, seconds: float, copy_gb_s: float) -> float:
    """How much of the measured copy bandwidth (GB/s, reads and writes) a step's bytes come to."""
    return moved / seconds / (copy_gb_s * 1e9)


def copies_in_profile(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Copies between device and host in ONNX Runtime's profile: op name to how many."""
    found: dict[str, int] = {}
    for event in events:
        op = str(event.get("args", {}).get("op_name", ""))
        if op.startswith("Memcpy"):
            found[op] = found.get(op, 0) + 1
    return found


def check_result(result: Any) -> None:
    """Make sure that a result has what readers expect.

    Raises:
        ValueError: a key is missing or of another type.
    """
    for where, schema, values in (
        ("result", _SCHEMA, [result]), ("speed", _SPEED, result.get("speed", []) if isinstance(result, dict) else []),
    ):  # fmt: skip
        for value in values:
            for key, kind in schema.items():
                if not isinstance(value, dict) or key not in value or not isinstance(value[key], kind):
                    raise ValueError(f"{where}: {key} is missing or not of type {kind}")


def rows_of(result: Mapping[str, Any]) -> str:
    """A result as a section of docs/gpu-results.md."""
    machine, lines = result["machine"], []
    named = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines += [f"## {result['date']}: {machine['gpu']}", "", named + f"; copy bandwidth {result['copy_gb_s']:.0f} GB/s.",
              f"Command: `{result['command']}`.", ""]  # fmt: skip
    lines += ["| precision | logits, largest relative difference | top-1 agreement | holds |", "|---|---|---|---|"]
    lines += [
        f"| {p['precision']} | {p['logits']:.2g} | {100 * p['top1']:.1f}% | {'yes' if p['ok'] else 'NO'} |"
        for p in result["parity"]
    ]
    columns = "model | runner | precision | batch | TTFT ms | prefill tok/s | decode tok/s | roofline | memory MB"
    lines += ["", f"| {columns} |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for s in result["speed"]:
        share = "" if s["roofline"] is None else f"{100 * s['roofline']:.0f}%"
        memory = "" if s["memory_mb"] is None else f"{s['memory_mb']:.0f}"
        lines.append(
            f"| {s['model']} | {s['runner']} | {s['precision']} | {s['batch']} | {s['ttft_ms']:.1f} | "
            f"{s['prefill_tokens_s']:.0f} | {s['decode_tokens_s']:.1f} | {share} | {memory} |"
        )
    lines += ["", *(f"- copies in a decode step of {c['model']}: {c['copies'] or 'none'}" for c in result["copies"])]
    lines += [f"- engines: {e['what']}" for e in result["engines"]]
    lines += [f"- not run: {what}" for what in result["not_run"]]
    return "\n".join(lines) + "\n"


# --- models and sessions --------------------------------------------------------------------------------------------


def shapes(quick: bool) -> dict[str, Callable[[], Any]]:
    """Models by name: two decoders of well-known sizes, and the recurrent hybrid; tiny ones if quick."""
    from edgellm.models.decoder import Decoder, DecoderConfig
    from edgellm.models.hybrid import Hybrid, HybridConfig
    from edgellm.models.registry import find

    if quick:
        small = DecoderConfig(vocab_size=211, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                              mlp_width=128, max_context=64)  # fmt: skip
        mixed = HybridConfig(vocab_size=211, width=64, pattern=("lstm", "attention"), num_heads=4, num_kv_heads=2,
                             recurrent_width=64, mlp_width=128, max_context=64)  # fmt: skip
        return {"tiny decoder": lambda: Decoder(small), "tiny hybrid": lambda: Hybrid(mixed)}
    smollm2 = DecoderConfig(vocab_size=49152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
                            mlp_width=1536, max_context=2048, tie_embeddings=True)  # fmt: skip
    larger = DecoderConfig(vocab_size=151936, width=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128,
                           mlp_width=8960, max_context=2048, tie_embeddings=True)  # fmt: skip
    reference = find("hybrid").presets["reference"]
    return {"SmolLM2 shape": lambda: Decoder(smollm2), "1.5B shape": lambda: Decoder(larger),
            "hybrid reference": lambda: Hybrid(reference)}  # type: ignore[arg-type]  # fmt: skip


class Lowered:
    """A model's graph for the cuda target, with the plan that it was quantized by.

    Args:
        model: in eval mode, with weights on the CPU.
        dtype: of activations.
        method: of quantization.
        folder: where it is written.
    """

    def __init__(self, model: Any, dtype: str, method: str, folder: Path) -> None:
        import dataclasses

        from edgellm_exporters.capture import capture, signature_of
        from edgellm_exporters.lower import lower_to, prepare
        from edgellm_exporters.quantize.methods import find_method
        from edgellm_exporters.quantize.planning import make_plan
        from edgellm_exporters.samples import golden_rows
        from edgellm_exporters.targets import find_target
        from edgellm_exporters.write import write_graph

        target, config = find_target("cuda"), model.config
        graph = prepare(capture(model), target)
        rows = golden_rows(None, config.vocab_size, config.max_context)
        self.plan = make_plan(find_method(method, target.methods), graph, model, rows)
        folder.mkdir(parents=True)
        write_graph(lower_to(graph, target, self.plan, dtype=dtype), folder, lambda what, share: None)
        whole = signature_of(model)
        state = tuple(dataclasses.replace(spec, dtype=dtype) for spec in whole.state)
        self.signature = dataclasses.replace(whole, inputs=(*whole.inputs, *target.inputs), state=state)
        self.folder, self.config = folder, config
        self.weight_bytes = (folder / "model.onnx.data").stat().st_size

    def session(self, device: str, *, capture: bool = True, profile: Path | None = None) -> Any:
        """Steps of the graph on a device."""
        from edgellm_runtime.backends.ort_device import OrtDeviceBackend
        from edgellm_runtime.session import Session

        context = self.config.max_context
        backend = OrtDeviceBackend(
            self.folder / "model.onnx", self.signature, max_context=context, device=device, capture=capture,
            profile=profile,
        )  # fmt: skip
        return Session(backend, self.signature, max_context=context, ragged_chunks=False)


class TorchRunner:
    """The same model in PyTorch: edgellm's own modules, eager or compiled.

    Args:
        model: in eval mode.
        dtype: of weights, activations and state.
        device: where.
        compiled: which backend of ``torch.compile``; empty for none.
    """

    def __init__(self, model: Any, dtype: str, device: str, *, compiled: str) -> None:
        import copy

        import torch

        self.torch, self.device, self.dtype = torch, device, getattr(torch, dtype)
        self.model = copy.deepcopy(model).to(device, self.dtype)
        self.forward = torch.compile(self.model, backend=compiled) if compiled else self.model

    def start(self, batch: int, capacity: int) -> None:
        """An empty state."""
        from edgellm.models.protocol import empty_state

        self.state = empty_state(self.model, batch, capacity, dtype=self.dtype, device=self.device)
        self.lengths = self.torch.zeros(batch, dtype=self.torch.int32, device=self.device)

    def step(self, tokens: Any) -> Any:
        """Read tokens (batch, time) and choose the next, (batch, 1)."""
        from edgellm.models.protocol import Step

        torch = self.torch
        with torch.inference_mode():
            batch, length = tokens.shape
            valid = torch.full((batch,), length, dtype=torch.int32, device=self.device)
            last = torch.full((batch, 1), length - 1, device=self.device)
            logits, self.state = self.forward(tokens, self.state, Step(self.lengths, valid, last))
            self.lengths = self.lengths + valid
            return logits[:, -1].argmax(-1, keepdim=True)


# --- what is measured -----------------------------------------------------------------------------------------------


def parity_of(model: Any, lowered: Lowered, dtype: str, method: str, device: str, session: Any) -> dict[str, Any]:
    """A session's logits against PyTorch's in float32 on the same device, with the same weights."""
    import numpy as np
    import torch

    from edgellm.models.protocol import Step, empty_state
    from edgellm_exporters.quantize.reference import quantized_model

    reference = model if method == "none" else quantized_model(model, lowered.plan, integer_products=False)
    length = min(256, model.config.max_context)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length))
    with torch.no_grad():
        there = torch.from_numpy(tokens).to(device)
        reference = reference.to(device)
        state = empty_state(reference, 1, length, device=device)
        expected = reference(there, state, Step.whole(there))[0][0].double().cpu().numpy()
        model.to("cpu")
    found = session.step(tokens, session.new_state(1, length), logits="all")[0].astype(np.float64)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    top1 = float((found.argmax(-1) == expected.argmax(-1)).mean())
    most, least = BOUNDS[dtype]
    return {"precision": f"{dtype} {method}", "logits": difference, "top1": top1,
            "ok": difference <= most and top1 >= least}  # fmt: skip


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
    import statistics

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
        minutes: after which nothing new is begun.
    """

    def __init__(self, device: str, quick: bool, minutes: float) -> None:
        import torch

        self.torch, self.device, self.quick = torch, device, quick
        self.end, self.begun = time.monotonic() + 60 * minutes, time.monotonic()
        self.batches, self.prompt, self.new = ((1, 2), 16, 6) if quick else ((1, 8, 32), 512, 64)
        self.result: dict[str, Any] = {
            "parity": [], "speed": [], "copies": [], "engines": [], "not_run": [], "quick": quick
        }  # fmt: skip

    def run(self, folder: Path) -> dict[str, Any]:
        """Do it all; what fails or finds no time is listed."""
        result = self.result
        result["copy_gb_s"] = self.copy_bandwidth()
        for number, (name, make) in enumerate(shapes(self.quick).items()):
            self.torch.manual_seed(number)
            self.attempt(f"{name}", lambda name=name, make=make: self.model(name, make().eval(), folder / name))
        self.attempt("engines", lambda: self.engines(folder / "engines"))
        result["seconds"] = round(time.monotonic() - self.begun, 1)
        return result

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Run one part, or say why it was not."""
        if time.monotonic() > self.end:
            self.result["not_run"].append(f"{what}: out of time")
            return
        print(f"[{time.monotonic() - self.begun:5.0f} s] {what}", file=sys.stderr)
        try:
            work()
        except Exception as error:  # one part's fault must not cost the minutes of the others
            self.result["not_run"].append(f"{what}: {type(error).__name__}: {str(error)[:200]}")

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
        for batch in self.batches:
            self.speed(name, lowered, session, f"{dtype} {method}", batch, memory, "edgellm")
        if session._backend.captures:
            plain = lowered.session(self.device, capture=False)
            self.speed(name, lowered, plain, f"{dtype} {method}", 1, None, "edgellm, steps not captured")
        self.copies(f"{name} {dtype} {method}", lowered, folder)

    def speed(
        self, name: str, lowered: Lowered, session: Any, precision: str, batch: int, memory: float | None, runner: str
    ) -> None:  # fmt: skip
        """Prompt and single tokens of a session, greedy."""
        import numpy as np

        from edgellm_runtime.generate import next_tokens
        from edgellm_runtime.sampling import Sampler, SamplingOptions

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
        fixed = sum(s.nbytes(1, 1) for s in specs if s.update == "replace")
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
            tokens = self.torch.randint(0, model.config.vocab_size, (batch, self.prompt), device=self.device)
            ttft, each = timed(
                lambda batch=batch: run.start(batch, self.prompt + self.new + 1), run.step, tokens, tokens[:, :1],
                self.new, 1 if self.quick else 3, self.wait,
            )  # fmt: skip
            self.row(name, runner, dtype, batch, ttft, each, None, None)

    def copies(self, what: str, lowered: Lowered, folder: Path) -> None:
        """Copies between device and host in a few decode steps, from ONNX Runtime's profile."""
        import numpy as np

        session = lowered.session(self.device, capture=False, profile=folder / "profile")
        state = session.new_state(1, 16)
        for _ in range(4):
            session.best(np.array([[1]]), state, 1)
        events = json.loads(Path(session._backend.end_profiling()).read_text())
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


def machine_of(device: str) -> dict[str, str]:
    """What it ran on, with versions."""
    import platform

    import onnxruntime
    import torch

    import edgellm

    gpu, driver = "none", "none"
    if device == "cuda":
        gpu = torch.cuda.get_device_name()
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        driver = asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else "unknown"
    return {"gpu": gpu, "driver": driver, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__,
            "edgellm": edgellm.__version__, "python": platform.python_version()}  # fmt: skip


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; the exit status is 1 if parity does not hold or a state is copied."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run of the same code")
    parser.add_argument("--quick", action="store_true", help="tiny models and few tokens")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing new is begun")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check.json"), help="the result as JSON")
    parser.add_argument("--write", action="store_true", help=f"add the rows to {RESULTS}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not has_gpu():
        print("gpu-check: no GPU here; nothing was checked")
        return 0
    if options.write and (options.device != "cuda" or options.quick):
        parser.error(f"--write adds measurements of a GPU to {RESULTS}; leave --device cpu and --quick out")
    with tempfile.TemporaryDirectory() as folder:
        result = Check(options.device, options.quick, options.minutes).run(Path(folder))
    result["machine"] = machine_of(options.device)
    result["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    result["command"] = " ".join(["python", "scripts/gpu_check.py", *(arguments or sys.argv[1:])])
    check_result(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(rows_of(result))
    if options.write:
        text = RESULTS.read_text(encoding="utf-8").replace(NOTHING_YET, "")
        RESULTS.write_text(text.replace(MARK, f"{MARK}\n\n{rows_of(result)}", 1), encoding="utf-8")
    wrong = [p["precision"] for p in result["parity"] if not p["ok"]]
    return 1 if wrong or not result["parity"] else 0


if __name__ == "__main__":
    sys.exit(main())
