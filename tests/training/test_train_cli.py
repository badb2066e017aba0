"""``edgellm train``: what it prints where, its defaults, resuming by the folder alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from training_models import TEXT

from edgellm.cli.train import RECIPES, train
from edgellm.errors import ConfigError, ModelError, TrainingError
from edgellm.models import registry
from edgellm.training import Reporter, StepReport, TrainOptions
from edgellm.training.run_config import RunConfig

SMALL = (
    "--set", "width=16", "--set", "pattern=gru,attention", "--set", "num_heads=2", "--set", "num_kv_heads=2",
    "--set", "recurrent_width=16", "--set", "mlp_width=0", "--vocab-size", "300", "--batch-size", "2",
    "--context", "16", "--threads", "1", "--device", "cpu",
)  # fmt: skip
KEYS = {
    "checkpoint", "steps", "train_loss", "val_loss", "val_perplexity", "unigram_entropy", "tokens_per_s", "seconds",
    "parameters", "metrics", "plot",
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def call(*arguments: object) -> int:
    """Its exit status; errors come out as they are."""
    status: int | None = train.main([str(a) for a in arguments], standalone_mode=False)
    return status or 0


def test_json_prints_one_object_and_nothing_else(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = text.parent / "run"
    assert call(text, "-o", out, *SMALL, "--steps", 3, "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.out.count("\n") == 1
    assert result.keys() == KEYS
    assert result["checkpoint"] == str(out / "best")
    assert result["steps"] == 3
    assert "step 3/3  loss" in printed.err
    assert "vocabulary 300" in printed.err
    assert all(Path(result[key]).exists() for key in ("checkpoint", "metrics", "plot"))


def test_summary_names_the_figures_and_the_next_command(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(text, "-o", text.parent / "run", *SMALL, "--steps", 2)
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "unigram" in printed
    assert f"Next: edgellm export {text.parent / 'run' / 'best'} -o BUNDLE" in printed


def test_run_resumes_by_its_folder_alone(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = text.parent / "run"
    call(text, "-o", out, *SMALL, "--steps", 2, "--seed", 3)
    capsys.readouterr()
    call("-o", out, "--resume", "--steps", 4, "--json")
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    assert RunConfig.load(out).options.seed == 3
    with pytest.raises(TrainingError, match="the run began with seed 3, not 4"):
        call("-o", out, "--resume", "--seed", 4)
    with pytest.raises(click.UsageError, match="--set cannot be given with --resume"):
        call("-o", out, "--resume", "--set", "width=32")
    assert call("-o", out, "--resume") == 0  # the refused ones changed nothing


def test_second_run_in_the_same_folder_is_refused(text: Path) -> None:
    out = text.parent / "run"
    call(text, "-o", out, *SMALL, "--steps", 1)
    with pytest.raises(TrainingError, match="already holds a run; resume it with --resume, or choose another folder"):
        call(text, "-o", out, *SMALL, "--steps", 1)


def test_resuming_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no run to resume"):
        call("-o", tmp_path / "run", "--resume")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--preset", "huge"), ConfigError, "no preset 'huge'; it has reference, tiny"),
        (("--architecture", "lattice"), ConfigError, "unknown architecture 'lattice'"),
        (("--set", "width=63"), ConfigError, "width is 63"),
        (("--context", "100000"), TrainingError, "too short"),
        (("--vocab-size", "10"), TrainingError, "at least 257"),
        (("--lr", "-1"), TrainingError, "lr is -1.0"),
    ],
)
def test_error_leaves_no_run_behind(
    text: Path, arguments: tuple[str, ...], error: type[ModelError], message: str
) -> None:
    out = text.parent / "run"
    with pytest.raises(error, match=message):
        call(text, "-o", out, *arguments)
    assert not (out / "metrics.jsonl").exists()


def test_help_shows_every_option_with_its_default() -> None:
    with click.Context(train) as context:
        for parameter in train.params:
            if isinstance(parameter, click.Option) and not (parameter.required or parameter.multiple):
                assert "default: " in " ".join(str(parameter.get_help_record(context)).split()), parameter.name


def test_recipes_fit_their_presets() -> None:
    for name in ("hybrid", "decoder"):
        for preset, config in registry.find(name).presets.items():
            assert TrainOptions(**RECIPES[preset]).context <= config.max_context


def test_help_loads_no_torch() -> None:
    code = "import sys, edgellm.cli.train; sys.exit('torch' in sys.modules or 'edgellm.training' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_are_set(text: Path) -> None:
    before = torch.get_num_threads()
    call(text, "-o", text.parent / "run", *SMALL, "--steps", 1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_ctrl_c_says_how_to_go_on(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Reporter, report: StepReport) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    out = text.parent / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "__call__", interrupt)
        assert call(text, "-o", out, *SMALL, "--steps", 9, "--json") == 130
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (
        f"stopped after step 3; the checkpoint is saved, go on with: edgellm train -o '{out}' --resume" in printed.err
    )
    assert call("-o", out, "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 9
