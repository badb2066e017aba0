"""Beams of every generator against a search that keeps no state, and what an application sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle, recurrent_bundle, window_bundle

from edgellm_runtime import Model, OptionError, load
from edgellm_runtime.generation.processors import RepetitionPenalty
from edgellm_runtime.softmax import log_softmax


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return fake_model(tmp_path_factory.mktemp("beams"))


def plain_beams(
    model: Model, prompt: Sequence[int], beams: int, limit: int, penalty: float, repetition: float = 1.0
) -> list[tuple[int, ...]]:
    """The same search with each text read anew: answers with their end tokens, the best first."""
    ends = model.tokenizer.eos_token_ids if model.tokenizer else frozenset()
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    done: list[tuple[tuple[int, ...], float]] = []

    def score(found: tuple[tuple[int, ...], float]) -> float:
        return found[1] / len(found[0]) ** penalty

    for _ in range(limit):
        grown = []
        for tokens, total in live:
            text = np.array([[*prompt, *tokens]])
            logits = model.session.step(text, model.session.new_state(1, text.shape[1]))[0, 0].copy()
            RepetitionPenalty(repetition)(text[0], logits)
            grown += [((*tokens, t), total + x) for t, x in enumerate(log_softmax(logits))]
        grown.sort(key=lambda g: -g[1])
        ended = [g for g in grown[: beams + len(ends)] if g[0][-1] in ends]
        live = [g for g in grown[: beams + len(ends)] if g[0][-1] not in ends][:beams]
        done = sorted([*done, *ended], key=score, reverse=True)[:beams]
        if not live or (len(done) == beams and max(map(score, live)) <= score(done[-1])):
            break
    return [tokens for tokens, _ in [*done, *sorted(live, key=score, reverse=True)]]


@given(prompts=st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=5), min_size=1, max_size=3),
       beams=st.integers(2, 4), limit=st.integers(1, 5), penalty=st.sampled_from([0.0, 1.0]),
       repetition=st.sampled_from([1.0, 1.5]))  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_a_batch_finds_what_a_search_without_states_finds(
    model: Model, prompts: Any, beams: int, limit: int, penalty: float, repetition: float
) -> None:
    asked: dict[str, Any] = {"beams": beams, "length_penalty": penalty, "repetition_penalty": repetition}
    for prompt, found in zip(prompts, model.generate(prompts, n=beams, max_new_tokens=limit, **asked), strict=True):
        expected = plain_beams(model, prompt, beams, limit, penalty, repetition)[:beams]
        assert [answer.tokens for answer in found[: len(expected)]] == expected
        assert [a.tokens for a in model.generate(prompt, n=beams, max_new_tokens=limit, **asked)] == [
            a.tokens for a in found
        ]
        ended = [a.finish_reason == "eos" for a in found[: len(expected)]]
        assert ended == [tokens[-1] in model.tokenizer.eos_token_ids for tokens in expected]


@pytest.mark.parametrize("bundle", [attention_bundle, recurrent_bundle, window_bundle])
def test_beams_of_real_states(bundle: Any) -> None:
    model = load(bundle(), threads=1)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    found = model.generate(prompts, beams=3, max_new_tokens=6)
    assert [a.tokens for a in found] == [plain_beams(model, p, 3, 6, 1.0)[0] for p in prompts]


def test_rows_may_follow_another_number_of_beams(model: Model) -> None:
    prompts = [[5, 6], [5, 6], [7, 8, 9]]
    rows = [{"beams": 2}, {"beams": 4, "max_new_tokens": 3}, {"length_penalty": 0.0}]
    found = model.generate(prompts, beams=1, max_new_tokens=5, row_options=rows)
    alone = [model.generate(p, **{"max_new_tokens": 5, **r}) for p, r in zip(prompts, rows, strict=True)]
    assert [a.tokens for a in found] == [a.tokens for a in alone]


def test_what_an_application_asks_for_holds_with_beams(model: Model) -> None:
    plain = model.generate("hello", beams=3, max_new_tokens=8, ignore_eos=True, logprobs=2)
    assert plain.logprobs is not None
    assert len(plain.logprobs) == len(plain.tokens) == 8
    assert [place.token for place in plain.logprobs] == list(plain.tokens)
    echoed = model.generate("hello", beams=3, max_new_tokens=8, ignore_eos=True, echo=True)
    assert echoed.text == "hello" + plain.text
    stop = plain.text[2:4]
    stopped = model.generate("hello", beams=3, max_new_tokens=8, ignore_eos=True, stop=stop)
    assert stop not in stopped.text
    stream = model.stream("hello", beams=3, max_new_tokens=8, ignore_eos=True)
    (chunk,) = stream
    assert (chunk.text, chunk.token_ids) == (plain.text, plain.tokens)
    assert stream.generation is not None and stream.generation.tokens == plain.tokens
    ended = model.generate("hello", beams=3, deadline=0.0)
    assert ended.finish_reason == "deadline"
    assert model.generate("hello", beams=3, max_new_tokens=0).tokens == ()


def test_a_conversation_and_a_state_go_on_from_the_best_beam(model: Model) -> None:
    talk = model.conversation()
    first = talk.say("the", beams=3, max_new_tokens=5)
    assert first.tokens == model.chat([{"role": "user", "content": "the"}], beams=3, max_new_tokens=5).tokens
    assert talk.messages[-1]["content"] == first.text
    second = talk.say("and", beams=2, max_new_tokens=3)
    fresh = [*talk.messages[:2], {"role": "user", "content": "and"}]
    assert second.tokens == model.chat(fresh, beams=2, max_new_tokens=3).tokens
    answer = model.generate([5, 6, 7], state=model.new_state(), beams=3, max_new_tokens=4)
    assert answer.state is not None and answer.state.tokens == (5, 6, 7, *answer.tokens)
    on = model.generate([8], state=answer.state, max_new_tokens=3)
    assert on.tokens == model.generate([5, 6, 7, *answer.tokens, 8], max_new_tokens=3).tokens


def test_a_form_holds_with_beams() -> None:
    model = load(attention_bundle(), threads=1)
    found = model.generate("the", beams=3, max_new_tokens=12, grammar=model.grammar(choices=["hello", "world"]))
    scores = model.score([("the", "hello"), ("the", "world")])
    assert found.text in ("hello", "world") and len(scores) == 2


def test_what_cannot_be_is_told(model: Model) -> None:
    for options, said in (
        ({"beams": 2, "temperature": 0.5}, "neither draw nor take drafts"), ({"beams": 0}, "beams"),
        ({"beams": 2, "n": 3}, "3 answers of 2 beams"), ({"beams": 2, "draft": "lookup"}, "nor take drafts"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            model.generate("hello", **options)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="beside rows with beams"):
        model.generate([[5], [6]], row_options=[{"beams": 2}, {"temperature": 1.0}])
    with model.scheduler() as scheduler, pytest.raises(OptionError, match="a scheduler follows one"):
        scheduler.submit("hello", beams=2)
