from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundles import attention_bundle, recurrent_bundle

import edgellm_runtime
from edgellm.cli import run
from edgellm.cli.eval import evaluate_bundle
from edgellm.cli.eval_task import open_runner
from edgellm_runtime import OptionError, load
from edgellm_runtime.checks import evaluate as module
from edgellm_runtime.checks.evaluate import distances, evaluate, negative_log_likelihood, piece_length, windows_of
from edgellm_runtime.checks.receipt import beginning_of
from edgellm_runtime.softmax import log_softmax


@pytest.fixture
def logits() -> np.ndarray:
    return (np.random.default_rng(3).normal(size=(11, 50)) * 4).astype(np.float32)


@pytest.fixture(params=[1, 150, 1 << 20], ids=["row by row", "three rows", "at once"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_LOGITS", request.param)


@pytest.mark.usefixtures("block")
def test_nats_of_a_target_are_those_of_the_softmax(logits: np.ndarray) -> None:
    targets = np.arange(11) * 4
    expected = -log_softmax(logits)[np.arange(11), targets]
    np.testing.assert_allclose(negative_log_likelihood(logits, targets), expected, rtol=1e-12)


@pytest.mark.usefixtures("block")
def test_logits_too_large_for_an_exponential(logits: np.ndarray) -> None:
    targets = np.arange(11)
    moved = (logits.astype(np.float64) + 1e4).astype(np.float32)
    np.testing.assert_allclose(
        negative_log_likelihood(moved, targets), -log_softmax(moved)[np.arange(11), targets], rtol=1e-12
    )


@pytest.mark.usefixtures("block")
def test_distances_are_those_of_the_definition(logits: np.ndarray) -> None:
    other = logits + np.random.default_rng(4).normal(size=logits.shape).astype(np.float32)
    targets = np.arange(10)  # the last row's next token is not known
    p, q = log_softmax(logits), log_softmax(other)
    found = distances(logits, other, targets)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-10)
    assert found.same.tolist() == (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    assert 0 < found.same.sum() < 11  # both cases were seen
    np.testing.assert_allclose(found.nll, -q[np.arange(10), targets], rtol=1e-12)
    np.testing.assert_allclose(found.reference_nll, -p[np.arange(10), targets], rtol=1e-12)


def test_equal_logits_are_at_no_distance_even_when_shifted(logits: np.ndarray) -> None:
    found = distances(logits, logits + np.float32(8), np.arange(11))
    assert np.abs(found.kl).max() < 1e-6  # the shift itself rounds in float32
    assert found.same.all()
    assert distances(logits, logits, np.arange(11)).kl.max() < 1e-14


def test_a_logit_that_is_no_number_is_not_passed_over(logits: np.ndarray) -> None:
    spoiled = logits.copy()
    spoiled[4, 7] = np.nan
    found = distances(logits, spoiled, np.arange(11))
    assert np.isnan(found.kl).tolist() == [row == 4 for row in range(11)]
    assert math.isnan(negative_log_likelihood(spoiled, np.arange(11))[4])


@pytest.mark.parametrize("bundle", [attention_bundle, recurrent_bundle])
@pytest.mark.parametrize("pieces", [1, 7, 1 << 20])
def test_the_size_of_a_piece_does_not_change_what_is_found(bundle, pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(bundle(), threads=1).session
    tokens = np.random.default_rng(5).integers(0, session.vocab_size, 70).tolist()
    windows = windows_of(tokens, 30)
    whole = []
    for window in windows:
        row = np.array(window)
        found = log_softmax(session.step(row[None, :-1], session.new_state(1, 30), logits="all")[0])
        whole.append(-found[np.arange(len(row) - 1), row[1:]])
    monkeypatch.setattr(module, "_PIECE_LOGITS", pieces * session.vocab_size)
    shares: list[float] = []
    result = evaluate(session, windows, shares.append)
    assert result.nll == pytest.approx(np.concatenate(whole).mean(), rel=1e-4)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.tokens == sum(len(w) - 1 for w in windows)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) == sum(-(-(len(w) - 1) // min(pieces, session.chunk)) for w in windows)


def test_a_large_vocabulary_is_taken_in_small_pieces() -> None:
    class Large:
        chunk, width, one_pass = 512, 150_000, False

    assert 1 <= piece_length(Large()) * Large.width * 4 <= 64 << 20  # type: ignore[arg-type]
    Large.width = 1 << 30
    assert piece_length(Large()) == 1  # type: ignore[arg-type]
    Large.width = 100
    assert piece_length(Large()) == 512  # type: ignore[arg-type]


def test_only_the_beginning_of_a_long_text_is_encoded() -> None:
    read: list[int] = []

    def encode(text: str) -> list[int]:
        read.append(len(text))
        return [ord(c) for c in text]

    text = "abcdefghij" * 10_000
    assert beginning_of(encode, text, 100)[:100] == [ord(c) for c in text[:100]]
    assert max(read) < 5000
    assert len(beginning_of(encode, text, 0)) == len(text)

    def few(text: str) -> list[int]:  # long tokens: the first piece of the text does not hold enough of them
        read.append(len(text))
        return [len(text)] * (len(text) // 100)

    read.clear()
    assert len(beginning_of(few, text, 500)) >= 500
    assert len(read) > 1
    assert len(beginning_of(few, text, 5000)) == 1000  # there are no more


def test_evaluating_a_bundle_gives_perplexity_and_progress(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the user said hello to the world " * 40)
    told: list[tuple[str, float]] = []
    result = evaluate_bundle(
        attention_bundle(), tmp_path / "text", tokens=80, window=40, tell=lambda what, share: told.append((what, share))
    )
    model = load(attention_bundle(), threads=1)
    assert model.tokenizer is not None
    tokens = model.tokenizer.encode((tmp_path / "text").read_text())
    assert result["perplexity"] == pytest.approx(evaluate(model.session, windows_of(tokens, 40, 80)).perplexity)
    assert result["tokens"] == 78
    assert told[-1] == ("predicting", 1.0)


@pytest.mark.parametrize("task", [False, True])
def test_eval_runs_the_kernels_that_are_asked_for(task: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def loading(path: Path, *, kernels: str | None, **options: Any) -> Any:
        asked.append(kernels)
        return load(path, **options)

    monkeypatch.setattr(edgellm_runtime, "load", loading)
    (tmp_path / "text").write_text("the user said hello to the world " * 9)
    (tmp_path / "data").write_text('{"text": "the user said hello"}\n')
    given = ["--task", "generation", "--data", tmp_path / "data"] if task else ["--text", tmp_path / "text"]
    for kernels in ([], ["--kernels", "own"]):
        assert run(["eval", *map(str, (attention_bundle(), *given, *kernels))]) == 0
    assert asked == [None, "own"]


def test_a_checkpoint_has_no_kernels_to_choose(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="kernels 'own' for a checkpoint, which PyTorch runs; leave them out"):
        open_runner(tmp_path, "generation", kernels="own")
