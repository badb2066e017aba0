"""Scores are PyTorch's log-likelihoods, by the conventions of lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from state_fakes import APPENDED, REPLACED, exact_session
from state_fakes import VOCAB as EXACT
from tiny_bundles import CONTEXT, attention_bundle, attention_model, recurrent_bundle, recurrent_model

from edgellm_runtime import Model, OptionError, load
from edgellm_runtime.generation import scoring
from edgellm_runtime.softmax import log_softmax


def in_pytorch(module: Any, context: list[int], tokens: list[int]) -> tuple[list[float], bool]:
    """A window read at once."""
    with torch.no_grad():
        logits = module(torch.tensor([[*context, *tokens][:-1]]))[0][0, len(context) - 1 :]
    logs = torch.log_softmax(logits.double(), dim=-1)
    return logs[range(len(tokens)), tokens].tolist(), logits.argmax(-1).tolist() == list(tokens)


def harness_windows(tokens: list[int], prefix: int, most: int) -> list[tuple[list[int], list[int]]]:
    """What the harness reads and scores, one token of context asked for: inputs, and the last of them predict."""
    found, done = [], 0
    while done < len(tokens):
        count = min(most, len(tokens) - done)
        end = done + count
        first = done == 0
        inputs = [prefix, *tokens[: count - 1]] if first else tokens[max(0, end - most - 1) : end - 1]
        found.append((inputs[: len(inputs) - (count - 1)], tokens[done:end]))
        done = end
    return found


@pytest.mark.parametrize(
    ("bundle", "module"), [(attention_bundle, attention_model), (recurrent_bundle, recurrent_model)]
)
def test_continuations_are_scored_as_pytorch_does(bundle: Any, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_PIECE", 5)
    model, reference = load(bundle(), threads=1), module()
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, 61, n).tolist() for n in (1, 7, 30)]
    best = list(model.generate(contexts[1], max_new_tokens=12, ignore_eos=True).tokens)
    pairs = [(c, rng.integers(0, 61, n).tolist()) for c in contexts for n in (1, 2, 6, 17)] + [(contexts[1], best)]
    for (context, tokens), score in zip(pairs, model.score(pairs), strict=True):
        expected, greedy = in_pytorch(reference, context, tokens)
        assert score.tokens == tuple(tokens) and score.greedy is greedy
        np.testing.assert_allclose(score.logprobs, expected, atol=2e-4)
        assert score.logprob == pytest.approx(sum(expected), abs=2e-3)
    assert model.score(pairs)[-1].greedy


def test_a_text_longer_than_the_context_is_scored_in_the_harness_windows() -> None:
    model, reference = load(attention_bundle(), threads=1), attention_model()
    text = "the user said hello to the assistant and the world " * 20
    tokens = model.tokenizer.encode(text)
    assert len(tokens) > 2 * CONTEXT
    prefix = model.tokenizer.eos_token_id  # there is no begin token
    expected = [
        value for window in harness_windows(tokens, prefix, CONTEXT) for value in in_pytorch(reference, *window)[0]
    ]
    (score,) = model.score([text])
    assert score.tokens == tuple(tokens)
    np.testing.assert_allclose(score.logprobs, expected, atol=3e-4)
    context, tail = tokens[: CONTEXT - 10], tokens[CONTEXT - 10 : CONTEXT + 50]  # cut at its beginning
    cut, _ = in_pytorch(reference, [*context, *tail][-(CONTEXT + 1) : -len(tail)], tail)
    np.testing.assert_allclose(model.score([(context, tail)])[0].logprobs, cut, atol=3e-4)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(0, 60), most=st.integers(2, 20), prefix=st.booleans())
def test_windows_score_each_token_once_with_as_much_before_it_as_fits(length: int, most: int, prefix: bool) -> None:
    tokens = list(range(100, 100 + length))
    found = list(scoring._rolling((7,) if prefix else (), tuple(tokens), most))
    scored = [t for _, part in found for t in part]
    assert scored == (tokens if prefix else tokens[1:])
    for context, part in found:
        assert len(context) >= 1 and len(context) + len(part) - 1 <= most
    if prefix:
        assert [(list(a), list(b)) for a, b in found] == harness_windows(tokens, 7, most)


def test_pairs_are_encoded_as_one_text_and_spaces_belong_to_the_continuation(tmp_path: Any) -> None:
    model = fake_model(tmp_path)
    tokenizer = model.tokenizer
    context, tokens = model._pair("x", "the world ", "the user", False)
    assert context == tuple(tokenizer.encode("the world"))
    assert context + tokens == tuple(tokenizer.encode("the world the user"))
    assert model._pair("x", "", "hello", False) == ((tokenizer.eos_token_id,), tuple(tokenizer.encode("hello")))
    begun = fake_model(tmp_path, bos=1)
    assert begun._pair("x", "", "hello", False)[0] == (1,)
    assert begun._pair("x", "the", " world", True)[0] == (1, *tokenizer.encode("the"))


def test_a_context_is_read_once_for_its_continuations(tmp_path: Any) -> None:
    session = exact_session(APPENDED, REPLACED, max_context=100)
    model = Model(session, None, fake_model(tmp_path).bundle)
    read, run = [], session._backend.run

    def counted(tokens: Any, *rest: Any) -> Any:
        read.append(tokens.shape[1])
        return run(tokens, *rest)

    session._backend.run = counted  # type: ignore[method-assign]
    context = list(range(40))
    choices = [[3], [4, 5], [6, 7, 8]]
    scores = model.score([(context, choice) for choice in choices])
    assert read == [40, 1, 2]
    for choice, score in zip(choices, scores, strict=True):
        logits = session.step(np.array([[*context, *choice][:-1]]), session.new_state(), logits="all")[0, 39:]
        assert score.logprobs == tuple(log_softmax(logits)[range(len(choice)), choice].tolist())
    alone = model.score([[5, 6, 7]])[0]
    assert alone.tokens == (6, 7), "nothing stands before a first token where there is no tokenizer"
    assert model.score([]) == [] and model.score([[5]])[0].logprob == 0
    assert sum(np.exp(model.score([([1, 2], [t])])[0].logprob) for t in range(EXACT)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("hello", "texts is 'hello'; it must be a list"), (("a", "b"), "it must be a list of texts or of pairs"),
        ([("a",)], "it must be a context and its continuation"), ([("a", "")], "a continuation of no token"),
        ([5], r"texts\[0\] is 5; it must be a text"), ([[10**6]], r"texts\[0\]: token"), ([("a", None)], "is None"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said(texts: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        load(attention_bundle(), threads=1).score(texts)
