"""``make gpu-check``: its arithmetic, its report, and a dry run of the very same code on the CPU."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script; its parts lie beside it, where Python looks when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        yield importlib.import_module("gpu_check")


@pytest.fixture(scope="module")
def report(script: Any) -> Any:
    return importlib.import_module("gpu_checks.report")


@pytest.fixture(scope="module")
def measure(script: Any) -> Any:
    return importlib.import_module("gpu_checks.measure")


def test_a_step_moves_weights_once_and_every_rows_cache(report: Any) -> None:
    assert report.decode_bytes(1000, token_bytes=10, fixed_bytes=7, batch=1, context=0) == 1000 + 14
    assert report.decode_bytes(1000, token_bytes=10, fixed_bytes=0, batch=4, context=25) == 1000 + 4 * 250
    assert report.decode_bytes(1000, token_bytes=10, fixed_bytes=7, batch=4, context=25) == 1000 + 4 * (250 + 14)


def test_the_roofline_is_bytes_over_time_over_bandwidth(report: Any) -> None:
    assert report.roofline_share(3_000_000_000, 0.001, 3000) == pytest.approx(1.0)
    assert report.roofline_share(3_000_000_000, 0.002, 3000) == pytest.approx(0.5)


def test_copies_are_found_in_a_profile(report: Any) -> None:
    events = [
        {"name": "session", "args": {}}, {"name": "x"}, {"args": {"op_name": "MatMul"}},
        {"args": {"op_name": "MemcpyToHost"}}, {"args": {"op_name": "MemcpyToHost"}},
        {"args": {"op_name": "MemcpyFromHost"}},
    ]  # fmt: skip
    assert report.copies_in_profile(events) == {"MemcpyToHost": 2, "MemcpyFromHost": 1}
    assert report.copies_in_profile(events[:3]) == {}


def test_medians_leave_the_first_round_out(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 99.0, 100.0, 101.0, 103.0, 200.0, 203.0, 205.0, 300.0, 302.0, 308.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    calls: list[str] = []
    found = measure.timed(
        lambda: calls.append("start"), lambda t: calls.append(t), "prompt", "token", 2, 3, lambda: None
    )  # fmt: skip
    assert found == (2.0, 1.0)  # of 1, 3, 2 and of 2/2, 2/2, 6/2 seconds
    assert calls[:4] == ["start", "prompt", "token", None]


def sample() -> dict[str, Any]:
    return {
        "machine": {"gpu": "A GPU", "torch": "2"}, "date": "2026-01-02", "command": "python scripts/gpu_check.py",
        "quick": False, "copy_gb_s": 3000.0, "seconds": 5.0, "not_run": ["1.5B shape: out of time"],
        "parity": [{"precision": "m float16 none", "logits": 0.001, "top1": 1.0, "ok": True}],
        "speed": [{
            "model": "m", "runner": "edgellm", "precision": "float16 none", "batch": 1, "prompt": 512, "ttft_ms": 5.25,
            "prefill_tokens_s": 1000.4, "decode_tokens_s": 300.26, "roofline": 0.617, "memory_mb": None,
        }],
        "copies": [{"model": "m", "copies": {}}], "engines": [{"what": "m: not built: no library"}],
    }  # fmt: skip


def test_a_result_becomes_rows(report: Any) -> None:
    report.check_result(sample())
    text = report.rows_of(sample())
    assert "## 2026-01-02: A GPU" in text
    assert "| m | edgellm | float16 none | 1 | 5.2 | 1000 | 300.3 | 62% |  |" in text
    assert "| m float16 none | 0.001 | 100.0% | yes |" in text
    assert "- copies in a decode step of m: none" in text
    assert "- not run: 1.5B shape: out of time" in text


@pytest.mark.parametrize("change", [{"speed": [{"model": "m"}]}, {"copy_gb_s": "fast"}, {"parity": None}])
def test_a_result_that_lacks_something_is_not_written(report: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="missing or not of type"):
        report.check_result(sample() | change)
    with pytest.raises(ValueError, match="machine is missing"):
        report.check_result({})


def test_without_a_gpu_it_says_so_and_checks_nothing(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "has_gpu", lambda: False)
    monkeypatch.setattr(script, "Check", lambda *_: pytest.fail("something was checked"))
    assert script.main(["--output", str(tmp_path / "r.json"), "--write"]) == 0
    assert capsys.readouterr().out == "gpu-check: no GPU here; nothing was checked\n"
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_no_results_of_a_gpu(script: Any) -> None:
    with pytest.raises(SystemExit):
        script.main(["--device", "cpu", "--quick", "--write"])


def test_what_finds_no_time_or_fails_is_listed(measure: Any) -> None:
    noted: list[list[str]] = []
    check = measure.Check("cpu", True, 0, lambda found: noted.append([*found["not_run"]]))
    check.attempt("late", lambda: pytest.fail("it ran"))
    check.end = float("inf")
    check.attempt("broken", lambda: 1 / 0)
    assert noted == [check.result["not_run"]], "what is known is told after each part"
    assert check.result["not_run"] == ["late: out of time", "broken: ZeroDivisionError: division by zero"]


class Clock:
    """Time that passes only where a part says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("minutes", "batches", "skipped"),
    [(10.0, [1, 2, 4, 8], []), (2.0, [1, 2, 4], [8]), (1.5, [1, 2], [4, 8]), (0.5, [1], [2, 4, 8])],
)
def test_a_row_that_would_exceed_the_time_is_skipped_and_named(
    minutes: float, batches: list[int], skipped: list[int], measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    check = measure.Check("cpu", True, minutes)
    check.batches = (1, 2, 4, 8)

    def speed(*args: Any) -> None:
        clock.now += 40.0  # seconds
        check.result["speed"].append(args[4])

    session = types.SimpleNamespace(_backend=types.SimpleNamespace(captures=False))
    lowered = types.SimpleNamespace(session=lambda *_, **__: session)
    monkeypatch.setattr(measure, "Lowered", lambda *_: lowered)
    monkeypatch.setattr(measure, "parity_of", lambda *_: {"precision": "float16 none"})
    monkeypatch.setattr(check, "speed", speed)
    monkeypatch.setattr(check, "copies", lambda *_: None)
    check.precision("m", None, "float16", "none", Path("nowhere"))
    assert check.result["speed"] == batches
    late = [f"m float16 none, edgellm, batch {batch}: out of time" for batch in skipped]
    assert [what for what in check.result["not_run"] if "batch" in what] == late
    assert clock.now <= 60 * minutes or batches == [1], "only what nothing was known of may run over"


@pytest.mark.slow
def test_the_same_code_runs_on_the_cpu(
    script: Any, measure: Any, report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    all_shapes = measure.shapes
    monkeypatch.setattr(measure, "shapes", lambda quick: dict([next(iter(all_shapes(quick).items()))]))
    monkeypatch.setattr(measure, "PRECISIONS", (("float16", "none"), ("bfloat16", "none"), ("float16", "int4")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert script.main(["--device", "cpu", "--quick", "--output", str(tmp_path / "deep/r.json")]) == 0
    result = json.loads((tmp_path / "deep/r.json").read_text())
    report.check_result(result)
    assert [p["ok"] for p in result["parity"]] == [True, True]
    runners = {s["runner"] for s in result["speed"]}
    assert runners == {"edgellm", "edgellm, steps not captured", "PyTorch eager", "torch.compile"}
    assert {s["batch"] for s in result["speed"]} == {1, 2}
    assert [c["copies"] for c in result["copies"]] == [{}, {}]
    assert result["not_run"] == ["tiny decoder bfloat16 none: ONNX Runtime has no such kernels on CPU"]
    assert len(result["engines"]) == 1


def test_no_result_of_a_gpu_is_claimed_that_was_not_measured(script: Any) -> None:
    text = (REPOSITORY / "docs/gpu-results.md").read_text(encoding="utf-8")
    assert script.MARK in text
    measured = "\n## " in text.split(script.MARK)[1]
    assert ("No run on a GPU has been recorded yet" in text) != measured
