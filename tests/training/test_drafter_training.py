"""A drafter learns to foretell its model, to the same weights each time, and goes on where it was left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drafter_bundles import untrained
from tiny_bundles import attention_model, recurrent_model, text_assets

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import cli
from edgellm.draft_head import load_draft_head
from edgellm.errors import CheckpointError, TrainingError
from edgellm.training.draft_loss import acceptance
from edgellm.training.draft_rows import ModelReader, own_words
from edgellm.training.draft_run import DraftOptions, train_drafter
from edgellm.training.interrupt import Interrupt
from edgellm_runtime import load

TEXT = "the cat sat on the mat and the dog ran after the ball. " * 60
SMALL = DraftOptions(
    rows=16, prompt=8, count=24, batch_rows=8, steps=60, batch_size=8, lr=1e-2, listed=60, width=32, token_width=32
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    assets = text_assets()
    save_checkpoint(
        folder, attention_model(), architecture="decoder", tokenizer_json=assets.tokenizer_json,
        eos_token_ids=assets.eos_token_ids,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def test_own_words_are_the_models_with_its_hidden_states() -> None:
    for model in (attention_model(), recurrent_model()):
        prompts = torch.randint(0, 61, (4, 20), generator=torch.Generator().manual_seed(0)).numpy()
        rows = own_words(ModelReader(model), prompts, 9, sampled=1, seed=3)
        again = own_words(ModelReader(model), prompts, 9, sampled=1, seed=3)
        assert np.array_equal(rows.tokens, again.tokens) and np.array_equal(rows.tokens[:, :20], prompts)
        with torch.no_grad():
            logits = model(torch.from_numpy(rows.tokens).long())[0]
        assert np.array_equal(rows.best, logits.argmax(dim=-1).numpy())
        assert np.array_equal(rows.tokens[:3, 20:], rows.best[:3, 19:-1]), "greedy but for the last row"
        projected = torch.from_numpy(rows.hidden).float() @ model.head.weight.detach().T
        np.testing.assert_allclose(projected, logits, atol=0.02)


def test_what_is_learned_is_what_is_drafted() -> None:
    """The shares over all places at once are those of drafts that are made token by token."""
    model = attention_model()
    prompts = torch.randint(0, 60, (3, 8), generator=torch.Generator().manual_seed(0)).numpy()
    rows, head = own_words(ModelReader(model), prompts, 12, sampled=0, seed=0), untrained(model.config.vocab_size)
    table = model.embedding.weight.detach()
    head.start_from(table, model.head.weight.detach(), torch.zeros(32), torch.ones(32))
    right = []
    for tokens, hidden, best in zip(rows.tokens.tolist(), rows.hidden, rows.best.tolist(), strict=True):
        state = torch.zeros(1, head.config.state)
        for place in range(7, len(tokens) - 3):
            given, first, after = torch.from_numpy(hidden[place][None, None]).float(), torch.ones(1, 1), state
            agreed = list[bool]()
            for ahead in range(1, 4):
                with torch.no_grad():
                    drafted, _, after = head(given, torch.tensor([[tokens[place + ahead]]]), first, after)
                state, first = after if ahead == 1 else state, torch.zeros(1, 1)
                agreed.append(int(drafted) == best[place + ahead])
            right.append(np.cumprod(agreed))
    np.testing.assert_allclose(acceptance(head, rows, 8), np.mean(right, axis=0), atol=1e-6)


def test_it_learns_is_the_same_each_time_and_resumes(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    said: list[str] = []
    whole = train_drafter(checkpoint, [text], tmp_path / "whole", SMALL, say=said.append)
    untrained = train_drafter(checkpoint, [text], tmp_path / "none", dataclasses.replace(SMALL, steps=1))
    assert whole.acceptance[0] > untrained.acceptance[0] and whole.acceptance[0] > 0.5
    assert list(whole.acceptance) == sorted(whole.acceptance, reverse=True)
    train_drafter(checkpoint, [text], tmp_path / "half", dataclasses.replace(SMALL, steps=30))
    with pytest.raises(TrainingError, match=r"lr is 0.5, and the run began with 0.01"):
        train_drafter(checkpoint, [text], tmp_path / "half", dataclasses.replace(SMALL, lr=0.5), resume=True)
    with pytest.raises(TrainingError, match="not empty; resume its run"):
        train_drafter(checkpoint, [text], tmp_path / "half", SMALL)
    again = train_drafter(checkpoint, [text], tmp_path / "again", SMALL)
    heads = [load_draft_head(result.drafter) for result in (whole, again)]
    for ours, theirs in zip(heads[0].state_dict().values(), heads[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert any("held-out places" in line for line in said)


def test_a_run_that_is_asked_to_end_goes_on_to_the_same_head(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_drafter(checkpoint, [text], tmp_path / "whole", SMALL)
    asked: list[Interrupt] = []
    enter = Interrupt.__enter__
    monkeypatch.setattr(Interrupt, "__enter__", lambda self: (asked.append(self), enter(self))[1])

    def end(report: object) -> None:
        if getattr(report, "step", 0) == 20:
            asked[-1].requested = True

    left = train_drafter(checkpoint, [text], tmp_path / "left", SMALL, on_progress=end)
    assert left.interrupted and left.steps == 20
    done = train_drafter(checkpoint, [text], tmp_path / "left", SMALL, resume=True)
    assert not done.interrupted and done.steps == SMALL.steps
    for ours, theirs in zip(
        load_draft_head(whole.drafter).state_dict().values(), load_draft_head(done.drafter).state_dict().values(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, theirs)


def test_command_trains_and_its_drafter_goes_into_a_bundle(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out, bundle = tmp_path / "run", tmp_path / "bundle"
    reads = tmp_path / "reads"
    CliRunner().invoke(cli, ["export", str(checkpoint), "--hidden", "-o", str(reads)], catch_exceptions=False)
    arguments = ["train", "--drafter", str(checkpoint), "--text", str(text), "-o", str(out), "--steps", "40"]
    arguments += ["--bundle", str(reads)]
    arguments += ["--gather", "32", "--listed", "60", "--batch-size", "8", "--lr", "0.01", "--threads", "1", "--json"]
    monkeyed = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    result = json.loads(monkeyed.output.splitlines()[-1])
    assert result["steps"] == 40 and result["drafter"] == str(out / "drafter")
    wrong = CliRunner().invoke(cli, [*arguments, "--warmup", "3"])
    assert wrong.exit_code == 2 and "--warmup is nothing that --drafter takes" in wrong.output
    exported = ["export", str(checkpoint), "--drafter", result["drafter"], "-o", str(bundle), "--threads", "1"]
    CliRunner().invoke(cli, exported, catch_exceptions=False)
    model = load(bundle, threads=1)
    plain = model.generate("the cat", max_new_tokens=30, ignore_eos=True)
    found = model.generate("the cat", max_new_tokens=30, ignore_eos=True, draft="recurrent")
    assert found.tokens == plain.tokens and found.speculation is not None
    assert found.speculation.steps + found.speculation.accepted == 29


def test_folders_that_hold_no_drafter_are_refused(tmp_path: Path, checkpoint: Path, text: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no drafter; 'edgellm train --drafter' writes"):
        load_draft_head(tmp_path)
    (tmp_path / "drafter.json").write_text("{}")
    with pytest.raises(CheckpointError, match="train it again"):
        load_draft_head(tmp_path)
    with pytest.raises(TrainingError, match="holds no drafter's run to resume"):
        train_drafter(checkpoint, [text], tmp_path / "new", SMALL, resume=True)
    (tmp_path / "short.txt").write_text("a cat")
    with pytest.raises(TrainingError, match="too few to draft from"):
        train_drafter(checkpoint, [tmp_path / "short.txt"], tmp_path / "short", SMALL)
