"""``--adapter`` of the commands that measure and embed: each does with it what the merged checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_bundles import NAMES, adapter_bundle, merged
from tiny_bundles import attention_bundle, text_assets

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm.models.protocol import Step, with_hidden
from edgellm_runtime import load
from edgellm_runtime.checks.bench import Workload, run_round

TEXT = "the user said hello to the assistant and the world. " * 12
UNKNOWN = "the model has no adapter 'green'; this one has red, blue"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run([*map(str, arguments), "--threads", "1", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text, test data, and a checkpoint of each adapter merged."""
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "data").write_text("".join(json.dumps({"text": TEXT[:n]}) + "\n" for n in (90, 60)))
    for name in NAMES:
        save_checkpoint(
            tmp_path / name,
            merged(name),
            architecture="decoder",
            tokenizer_json=text_assets().tokenizer_json,
            eos_token_ids=text_assets().eos_token_ids,
        )
    return tmp_path


def test_eval_finds_each_adapter_to_be_its_merged_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["eval", adapter_bundle(), "--text", folder / "text", "--tokens", 80, "--window", 40]
    for name in NAMES:
        found = said(capsys, *given, "--against", folder / name, "--adapter", name)
        assert found["kl_mean"] < 1e-8
        assert said(capsys, *given, "--adapter", name)["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
        assert said(capsys, *given, "--against", folder / name)["kl_mean"] > 0.01  # the base


def test_eval_scores_an_adapter_at_a_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--task", "generation", "--data", folder / "data"]
    scores = {}
    for name in NAMES:
        scores[name] = said(capsys, "eval", adapter_bundle(), *given, "--adapter", name)["scores"]
        assert scores[name] == pytest.approx(said(capsys, "eval", folder / name, *given)["scores"], rel=1e-5)
    assert scores["red"] != pytest.approx(scores["blue"], rel=1e-3)


def test_embed_gives_vectors_of_the_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load(adapter_bundle(), threads=1).tokenizer
    assert tokenizer is not None
    tokens = torch.tensor([tokenizer.encode("hello")])
    for name in NAMES:
        with torch.no_grad():
            hidden = with_hidden(merged(name), tokens, {}, Step.whole(tokens))[1]
        assert hidden is not None
        expected = hidden[0, -1] / hidden[0, -1].norm()
        given = ["embed", adapter_bundle(), "hello", "--pooling", "last", "--adapter", name]
        (entry,) = said(capsys, *given)["embeddings"]
        np.testing.assert_allclose(entry["embedding"], expected, atol=1e-5)


def test_bench_measures_the_steps_of_the_adapter_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--prompt-tokens", "4", "--new-tokens", "3", "--rounds", "1"]
    expected = run_round(load(adapter_bundle(), threads=1).with_adapter("red").session, Workload(4, 3), 1)
    for name, adapter in (("base", []), ("red", ["--adapter", "red"])):
        found = said(capsys, "bench", adapter_bundle(), *small, *adapter, "--output", tmp_path / f"{name}.json")
        assert (found["tokens_sha256"] == [expected.tokens_sha256[:16]]) == (name == "red")
        assert found["adapter"] == (adapter[-1] if adapter else None)
    assert run(["bench", "diff", str(tmp_path / "base.json"), str(tmp_path / "red.json"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert (found["first"], found["second"]) == (str(adapter_bundle()), f"{adapter_bundle()} (adapter red)")


@pytest.mark.parametrize(
    "arguments",
    [["bench", "--rounds", "1"], ["embed", "hello"], ["eval", "--text", "text"],
     ["eval", "--task", "generation", "--data", "data"]],
    ids=["bench", "embed", "eval", "eval --task"],
)  # fmt: skip
def test_an_adapter_that_there_is_none_of_is_told(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    command, *rest = arguments
    assert run([command, str(adapter_bundle()), *rest, "--adapter", "green"]) == 1
    assert UNKNOWN in capsys.readouterr().err
    plain = "red" if command == "eval" and "--task" in rest else str(attention_bundle())  # a checkpoint has none either
    assert run([command, plain, *rest, "--adapter", "red"]) == 1
    assert "the model has no adapter 'red'; this one was exported with none" in capsys.readouterr().err


def test_a_receipt_is_of_no_adapter(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    given = ["eval", str(adapter_bundle()), "--text", str(folder / "text"), "--adapter", "red"]
    for receipt in (["--receipt"], ["--write-receipt", "--against", str(folder / "red")]):
        assert run([*given, *receipt]) == 2
        assert "--adapter goes without a receipt" in capsys.readouterr().err
