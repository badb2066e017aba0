"""The training loop: it learns, repeats itself bit for bit, survives kills, and splits over batches and processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_models import curve, data, model, options, run

from edgellm.checkpoints import load_checkpoint
from edgellm.errors import CheckpointError, TrainingError
from edgellm.training import StepReport, TokenData, TrainOptions, train
from edgellm.training.metrics import read_metrics
from edgellm.training.optimization import learning_rate, make_optimizer

PROCESS = Path(__file__).parents[1] / "training_process.py"


def start(arguments: list[str], directory: Path, out: Path, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, str(PROCESS), str(directory), str(out), json.dumps(how)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_loss_falls_below_the_unigram_entropy(tmp_path: Path) -> None:
    result = run(tmp_path, tmp_path / "out", steps=60, eval_every=30, dropout=0.0)
    assert result.val_loss < 0.6 * result.unigram_entropy
    assert result.train_loss < 0.6 * result.unigram_entropy
    assert result.val_perplexity == pytest.approx(math.exp(result.val_loss))
    assert result.plot.read_bytes().startswith(b"\x89PNG")
    assert result.steps == 60
    assert not result.interrupted


def test_best_checkpoint_loads_and_scores_what_was_reported(tmp_path: Path) -> None:
    result = run(tmp_path, tmp_path / "out")
    checkpoint = load_checkpoint(result.checkpoint)
    tokens, tokenizer = data(tmp_path)
    assert result.checkpoint == tmp_path / "out" / "best"
    assert checkpoint.tokenizer_json == tokenizer.to_str()
    assert checkpoint.eos_token_ids == (0,)
    from edgellm.training.batches import WindowBatches
    from edgellm.training.distributed import World
    from edgellm.training.validation import validation_loss

    world = World(0, 1, torch.device("cpu"))
    assert validation_loss(checkpoint.model, WindowBatches(tokens), options(), world) == result.val_loss


def test_same_seed_gives_the_same_curve_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path, tmp_path / name, seed=seed)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert curve(tmp_path / "a") != curve(tmp_path / "c")


def test_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "whole", steps=8)
    killed = start([], tmp_path, tmp_path / "killed", steps=8, kill_at=5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line[0] for line in curve(tmp_path / "killed")] == [1, 2, 3, 4, 5]  # the last checkpoint is of step 3
    run(tmp_path, tmp_path / "killed", steps=8, resume=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    for name in ("best", "last"):
        states = [load_checkpoint(tmp_path / out / name).model.state_dict() for out in ("whole", "killed")]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path: Path) -> None:
    def die(report: StepReport) -> None:
        if report.step == 2:
            raise SystemExit

    run(tmp_path, tmp_path / "whole", steps=4)
    with pytest.raises(SystemExit):
        run(tmp_path, tmp_path / "killed", steps=4, on_progress=die)
    assert not (tmp_path / "killed" / "last").exists()
    run(tmp_path, tmp_path / "killed", steps=4, resume=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out", steps=3)
    before = curve(tmp_path / "out")
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run(tmp_path, tmp_path / "out", steps=3, resume=True)
    assert curve(tmp_path / "out") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_a_checkpoint_and_ends_the_run(tmp_path: Path, number: signal.Signals) -> None:
    def interrupt(report: StepReport) -> None:
        if report.step == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    stopped = run(tmp_path, tmp_path / "out", on_progress=interrupt)
    assert (stopped.steps, stopped.interrupted) == (5, True)  # the step at hand is finished
    assert signal.getsignal(number) == before
    run(tmp_path, tmp_path / "out", resume=True)
    run(tmp_path, tmp_path / "whole")
    losses = [[line[:4] for line in curve(tmp_path / name)] for name in ("out", "whole")]
    assert losses[0] == losses[1]


def test_two_processes_have_the_curve_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "one", batch_size=8, accumulation=2, steps=5, dropout=0.0)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    both = start(torchrun, tmp_path, tmp_path / "two", batch_size=4, accumulation=2, steps=5, dropout=0.0)
    assert both.returncode == 0, both.stderr
    assert "Warning" not in both.stderr, both.stderr
    assert_close(tmp_path / "one", tmp_path / "two")


def test_accumulation_has_the_curve_of_the_larger_batch(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "large", batch_size=8, dropout=0.0)
    run(tmp_path, tmp_path / "small", batch_size=2, accumulation=4, dropout=0.0)
    assert_close(tmp_path / "large", tmp_path / "small")


def assert_close(first: Path, second: Path) -> None:
    a, b = (np.array(curve(out), float) for out in (first, second))  # None becomes nan
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_bfloat16_trains(tmp_path: Path) -> None:
    result = run(tmp_path, tmp_path / "out", steps=20, precision="bfloat16", dropout=0.0)
    assert result.val_loss < result.unigram_entropy
    assert load_checkpoint(result.checkpoint).model.embedding.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_float16_on_the_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="float16 needs a CUDA GPU"):
        run(tmp_path, tmp_path / "out", precision="float16")


def test_loss_that_is_not_finite_stops_and_names_the_checkpoint(tmp_path: Path) -> None:
    tokens, tokenizer = data(tmp_path)
    broken = model()

    def poison(report: StepReport) -> None:
        if report.step == 4:
            torch.nn.init.constant_(broken.norm.weight, math.nan)

    with pytest.raises(TrainingError, match=r"loss is not finite at step 5; the last good checkpoint is .*last"):
        train(
            broken, tokens, options(), tmp_path / "out", architecture="hybrid", tokenizer=tokenizer, on_progress=poison
        )
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 4
    assert all(p.isfinite().all() for p in load_checkpoint(tmp_path / "out" / "last").model.parameters())


def test_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out", steps=1)
    with pytest.raises(TrainingError, match="already holds a run; resume it"):
        run(tmp_path, tmp_path / "out", steps=1)


@pytest.mark.parametrize("change", [{"seed": 6}, {"batch_size": 2}, {"lr": 1e-3}])
def test_resuming_with_other_options_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run(tmp_path, tmp_path / "out", steps=1)
    with pytest.raises(TrainingError, match=f"the run began with {next(iter(change))} "):
        run(tmp_path, tmp_path / "out", steps=2, resume=True, **change)


def test_resuming_on_other_text_is_refused(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out", steps=1)
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "\nmore text than there was before\n" * 20)
    with pytest.raises(CheckpointError, match="other text"):
        run(tmp_path, tmp_path / "out", steps=2, resume=True)


def test_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out", steps=2)
    result = run(tmp_path, tmp_path / "out", steps=4, resume=True)
    assert [line[0] for line in curve(tmp_path / "out")] == [1, 2, 3, 4]
    assert result.steps == 4


def test_damaged_trainer_state_is_an_error_with_its_path(tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "out", steps=1)
    (tmp_path / "out" / "last" / "trainer.pt").write_bytes(b"not a torch file")
    with pytest.raises(CheckpointError, match=r"trainer\.pt: damaged"):
        run(tmp_path, tmp_path / "out", steps=2, resume=True)


def test_model_without_a_state_is_refused(tmp_path: Path) -> None:
    tokens, tokenizer = data(tmp_path)
    with pytest.raises(TrainingError, match="Linear has no config"):
        train(torch.nn.Linear(1, 1), tokens, options(), tmp_path / "o", architecture="x", tokenizer=tokenizer)


def test_data_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    tokens, tokenizer = data(tmp_path)
    wide = TokenData(tokens.train, tokens.validation, 400)
    with pytest.raises(TrainingError, match="400 tokens and the model's vocab_size is 300"):
        train(model(), wide, options(), tmp_path / "o", architecture="hybrid", tokenizer=tokenizer)


def test_schedule_rises_to_the_peak_and_falls_to_its_fraction() -> None:
    o = TrainOptions(steps=110, warmup=10, lr=1.0, min_lr_fraction=0.1)
    assert [learning_rate(step, o) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, o) == pytest.approx(0.55)  # halfway down
    assert learning_rate(110, o) == pytest.approx(0.1)
    assert learning_rate(0, TrainOptions(steps=1, warmup=0, lr=1.0)) == 1.0


def test_only_matrices_decay() -> None:
    small = model()
    decayed, kept = make_optimizer(small, options(), torch.device("cpu")).param_groups
    names = {id(p): name for name, p in small.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert "embedding.weight" in {names[id(p)] for p in kept["params"]}  # which is the projection too
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"min_lr_fraction": 2.0}, "min_lr_fraction 2.0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_impossible_option_is_an_error_with_its_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        options(**change)


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_unknown_or_absent_device_is_an_error(tmp_path: Path, device: str) -> None:
    with pytest.raises(TrainingError, match=device):
        run(tmp_path, tmp_path / "out", device=device)
