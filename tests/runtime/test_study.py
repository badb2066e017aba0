"""Bundles measured in turn, each in a process of its own; results written, read and compared."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_bundles import attention_bundle, attention_model, recurrent_bundle

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm_runtime import BundleError, ContextError, OptionError
from edgellm_runtime.checks import study
from edgellm_runtime.checks.bench import Round, Workload
from edgellm_runtime.checks.bench_worker import Worker
from edgellm_runtime.checks.study import Cell, Plan, comparisons, matched, measure

SMALL = Workload(6, 4)
ORDER: list[tuple[str, int]] = []


class Fake:
    """A worker that notes its turns; the bundle called slow takes twice as long."""

    def __init__(
        self, bundle: str, *, threads: int, device: str, kernels: str, adapter: str | None = None, opener: str = ""
    ) -> None:
        self.bundle = " ".join([bundle, *([] if kernels == "onnxruntime" else [kernels]), *([adapter] * bool(adapter))])
        self.loaded = {"load_s": 0.1, "max_context": 64, "device": "cpu", "kernels": kernels}

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def round(self, workload: Workload, seed: int) -> Round:
        ORDER.append((self.bundle, seed))
        slow = 2.0 if self.bundle == "slow" else 1.0
        wave = 1 + 0.3 * (seed % 3)  # a machine that others use too
        return Round(0.1 * slow * wave, (0.01 * slow * wave,) * workload.new_tokens, "same")

    def peak_rss_mb(self) -> float:
        return 7.0


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Worker", Fake)
    monkeypatch.setattr(study.machine, "energy", lambda: None)
    ORDER.clear()


@pytest.mark.usefixtures("fakes")
def test_bundles_take_turns_and_the_first_of_a_turn_is_the_last_of_the_next() -> None:
    measure(Plan(["a", "b"], [SMALL], rounds=3))
    assert ORDER == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]


@pytest.mark.usefixtures("fakes")
def test_kernels_take_turns_as_bundles_do_and_are_told_apart() -> None:
    cells = measure(Plan(["a"], [SMALL], rounds=2, kernels=["onnxruntime", "own"]))
    assert ORDER == [("a", 0), ("a own", 0), ("a", 1), ("a own", 1), ("a own", 2), ("a", 2)]
    (found,) = comparisons(cells)
    assert (found["first"], found["second"]) == ("a", "a (own kernels)")
    read = [Cell.from_json(cell.to_json()) for cell in cells]
    assert [cell.name for cell in read] == ["a", "a (own kernels)"]
    assert [(c["first"], c["second"]) for c in matched(cells, read)] == [
        (name, name) for name in ("a", "a (own kernels)")
    ]


@pytest.mark.usefixtures("fakes")
def test_what_slows_both_does_not_hide_which_is_slower() -> None:
    cells = measure(Plan(["a", "slow"], [SMALL], rounds=6))
    assert all(cell.noisy for cell in cells)
    (found,) = comparisons(cells)
    assert (found["decode"]["verdict"], found["prefill"]["verdict"]) == ("slower", "slower")
    assert found["decode"]["speed"] == pytest.approx(0.5)
    assert found["same_tokens"] and found["paired"]


@pytest.mark.usefixtures("fakes")
def test_one_more_layer_of_many_is_called_slower_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty layers, or thirty-one, on a clock that goes up and down by a third and jitters by a hundredth."""
    draw = random.Random(3)

    def round(self: Fake, workload: Workload, seed: int) -> Round:
        layers = 31 if self.bundle == "deeper" else 30
        busy = 1 + 0.3 * (seed % 3) + draw.gauss(0, 0.01)
        return Round(0.01 * layers * busy, (0.001 * layers * busy,) * workload.new_tokens, self.bundle)

    monkeypatch.setattr(Fake, "round", round)
    (found,) = comparisons(measure(Plan(["plain", "deeper"], [SMALL], rounds=30)))
    assert [found[figure]["verdict"] for figure in ("prefill", "decode")] == ["slower", "slower"]
    assert 0.95 < found["decode"]["speed"] < 0.985
    (found,) = comparisons(measure(Plan(["plain", "plain"], [SMALL], rounds=30)))
    assert [found[figure]["verdict"] for figure in ("prefill", "decode")] == ["no difference", "no difference"]


def test_pytorch_is_measured_beside_a_bundle_and_says_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", attention_model(), architecture="decoder", tokenizer_json=None)
    small = ["--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "2", "--threads", "1", "--json"]
    assert run(["bench", str(attention_bundle()), "--against", str(tmp_path / "c"), *small]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(cell["kernels"], cell["device"]) for cell in data["cells"]] == [
        ("onnxruntime", "cpu"), ("PyTorch", "PyTorch on the CPU")
    ]  # fmt: skip
    (found,) = data["comparisons"]
    assert found["second"] == f"{tmp_path / 'c'} (PyTorch kernels)"
    assert found["same_tokens"]
    assert run(["bench", str(attention_bundle()), "--against", str(tmp_path / "none"), *small]) == 1
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("fakes")
def test_rounds_go_on_until_the_ratio_is_sure_or_the_most_are_done() -> None:
    one = measure(Plan(["a"], [SMALL], rounds=2, precision=0.01, most_rounds=9))
    assert len(one[0].rounds) == 9  # the machine's waves are wider than that
    two = measure(Plan(["a", "b"], [SMALL], rounds=2, precision=0.01, most_rounds=9))
    assert [len(cell.rounds) for cell in two] == [2, 2]  # and fall on both alike


@pytest.mark.usefixtures("fakes")
def test_every_workload_and_number_of_threads_is_a_cell() -> None:
    plan = Plan(["a", "b"], [SMALL, replace(SMALL, batch=3, depth=5)], threads=[1, 2], rounds=1)
    assert [(c.bundle, c.workload.batch, c.threads) for c in measure(plan)] == [
        (bundle, batch, threads) for threads in (1, 2) for batch in (1, 3) for bundle in ("a", "b")
    ]


@pytest.mark.usefixtures("fakes")
def test_a_workload_that_does_not_fit_is_told_before_any_round() -> None:
    with pytest.raises(ContextError, match="60 tokens, a prompt of 6 and 4 new tokens do not fit"):
        measure(Plan(["a"], [SMALL, replace(SMALL, depth=60)]))
    assert ORDER == []


@pytest.mark.usefixtures("fakes")
def test_energy_is_the_difference_of_the_counters_and_never_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    joules = iter([10.0, 12.0, 12.0, 11.0, 11.0, 14.0])  # which begin anew in the second round
    monkeypatch.setattr(study.machine, "energy", lambda: next(joules))
    (cell,) = measure(Plan(["a"], [SMALL], rounds=3))
    assert cell.joules == 5.0
    assert cell.to_json()["joules_per_token"] == round(5 / 12, 4)
    monkeypatch.setattr(study.machine, "energy", lambda: None)
    assert measure(Plan(["a"], [SMALL], rounds=1))[0].to_json()["joules_per_token"] is None


@pytest.mark.usefixtures("fakes")
def test_results_of_two_runs_are_compared_by_workload() -> None:
    before = measure(Plan(["a", "slow"], [SMALL], rounds=9))
    after = [Cell.from_json(json.loads(json.dumps(cell.to_json()))) for cell in before]
    assert [found["second"] for found in matched(before, after)] == ["a", "slow"]
    other = measure(Plan(["slow"], [replace(SMALL, new_tokens=5), SMALL], rounds=9))
    assert [(f["first"], f["second"]) for f in matched(before[:1], other)] == [("a", "slow")]
    with pytest.raises(OptionError, match="no workload in common"):
        matched(before, other[:1])


def test_a_bundle_runs_in_a_process_of_its_own_and_gives_the_same_tokens_for_the_same_seed() -> None:
    with Worker(recurrent_bundle(), threads=1, device="auto") as worker:
        assert worker.loaded["device"] == "cpu" and worker.loaded["load_s"] > 0
        first, again, other = (worker.round(replace(SMALL, batch=2, depth=3), seed) for seed in (1, 1, 2))
        assert first.tokens_sha256 == again.tokens_sha256 != other.tokens_sha256
        assert len(first.steps_s) == 4 and first.ttft_s > 0
        assert worker.peak_rss_mb() is None or worker.peak_rss_mb() > 10
    with pytest.raises(BundleError, match="does not exist"):
        Worker(recurrent_bundle() / "nothing", threads=1, device="auto")


def test_the_command_compares_writes_and_reads_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = str(attention_bundle()), str(recurrent_bundle())
    small = ["--prompt-tokens", "4", "--new-tokens", "3,2", "--rounds", "2", "--threads", "1"]
    files = [str(tmp_path / f"r{suffix}") for suffix in (".json", ".csv", ".md", ".html")]
    assert run(["bench", a, b, *small, *(x for file in files for x in ("--output", file))]) == 0
    out = capsys.readouterr().out
    assert f"decode, 4 + 3 tokens, 1 thread: no difference between {a} and {b}" in out or "than" in out
    data = json.loads((tmp_path / "r.json").read_text())
    assert [len(cell["rounds"]) for cell in data["cells"]] == [2] * 4
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 5
    assert (tmp_path / "r.md").read_text().startswith("| bundle | prompt |")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<circle") == 16 and "http" not in page and "<script" not in page
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "diff", "r.json", "r.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"]
    assert {f[figure]["verdict"] for f in found for figure in ("prefill", "decode")} == {"no difference"}
    assert all(f["same_tokens"] for f in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["diff", "r.json"], "compares two results, and 1 are named"),
        (["diff", "r.json", "other.json"], "r.json: is no result of edgellm bench"),
        (["diff", "none.json", "r.json"], "none.json: cannot be read as a result"),
        (["a", "--output", "r.txt"], "r.txt: results are written as .json, .csv, .md, .html"),
        (["a", "--output", "none/r.md"], "its folder does not exist"),
        (["a", "--profile"], "use 'edgellm profile BUNDLE'"),
        (["a", "--batch", "0"], "batch is 0; it must be an integer of at least 1"),
    ],
)
def test_what_cannot_be_measured_or_compared_is_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.json").write_text("{}")
    assert run(["bench", *arguments]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("rounds", [[], [{"ttft_s": 0, "steps_s": [1]}], [{"ttft_s": 1, "steps_s": "x"}], 3])
def test_a_spoiled_result_is_no_result(rounds: Any) -> None:
    cell = {"bundle": "a", "prompt_tokens": 1, "new_tokens": 1, "depth": 0, "batch": 1, "threads": 1, "device": "cpu"}
    with pytest.raises(OptionError, match="this is no result of edgellm bench"):
        Cell.from_json({**cell, "rounds": rounds, "tokens_sha256": ["x"] * len(rounds if rounds != 3 else [])})
