"""The hook in the decode loop: what a processor is given, when, and what it can do."""

from __future__ import annotations

import numpy as np
import pytest
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle, device_session

from edgellm_runtime import LogitsProcessor, OptionError, load
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.generation.processors import RepetitionPenalty
from edgellm_runtime.generation.sampling import Sampler, SamplingOptions
from edgellm_runtime.model import Model


@pytest.fixture
def model(tmp_path):
    return fake_model(tmp_path, max_context=400)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[list[int], np.ndarray]] = []

    def __call__(self, tokens, logits):
        self.calls.append((tokens.tolist(), logits.copy()))


def test_a_processor_is_given_the_tokens_so_far_and_the_models_own_logits(model):
    seen = Recorder()
    prompt = model.tokenizer.encode("hello the world")
    answer = model.generate("hello the world", max_new_tokens=6, ignore_eos=True, logits_processors=[seen])
    assert answer.tokens == model.generate("hello the world", max_new_tokens=6, ignore_eos=True).tokens
    assert [tokens for tokens, _ in seen.calls] == [[*prompt, *answer.tokens[:n]] for n in range(6)]
    for tokens, logits in seen.calls:
        state = model.session.new_state(1, 100)
        np.testing.assert_array_equal(logits, model.session.step(np.array([tokens]), state)[0, 0])
        assert logits.dtype == np.float32


def forbid_in_place(*tokens):
    def process(_, logits):
        logits[list(tokens)] = -np.inf

    return process


def forbid_in_a_copy(*tokens):
    def process(_, logits):
        return [(-np.inf if i in tokens else x) for i, x in enumerate(logits)]

    return process


@pytest.mark.parametrize("forbid", [forbid_in_place, forbid_in_a_copy])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3, "top_k": 20}, {"repetition_penalty": 1.3}])
def test_a_forbidden_token_is_never_chosen(model, forbid, options):
    free = model.generate("hello", max_new_tokens=30, ignore_eos=True, **options).tokens
    banned = set(free[:10])
    kept = model.generate("hello", max_new_tokens=30, ignore_eos=True, logits_processors=[forbid(*banned)], **options)
    assert not banned & set(kept.tokens)


def test_every_way_of_generating_takes_processors(model):
    force = [lambda tokens, logits: np.where(np.arange(len(logits)) == 70, 0.0, -np.inf)]
    messages = [{"role": "user", "content": "hello"}]
    options = {"max_new_tokens": 3, "logits_processors": force}
    assert model.generate("hello", **options).tokens == (70,) * 3
    assert [c.token_ids for c in model.stream("hello", **options)] == [(70,)] * 3
    assert model.chat(messages, **options).tokens == (70,) * 3
    assert [c.token_ids for c in model.stream_chat(messages, **options)] == [(70,)] * 3
    talk = model.conversation()
    assert talk.say("hello", **options).tokens == (70,) * 3
    assert [c.token_ids for c in talk.stream("hello", **options)] == [(70,)] * 3


def test_in_a_conversation_a_processor_is_given_the_whole_of_it(model):
    talk, seen = model.conversation(), Recorder()
    talk.say("hello", max_new_tokens=3, logits_processors=[seen])
    talk.say("the world", max_new_tokens=3, logits_processors=[seen])
    assert seen.calls[0][0] == model.chat_template.encode([{"role": "user", "content": "hello"}])
    assert seen.calls[3][0] == model.chat_template.encode(talk.messages[:-1])


def test_processors_run_in_order_and_before_the_penalty_and_the_temperature():
    logits = np.array([[4.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    seen = Recorder()
    double: LogitsProcessor = lambda tokens, logits: logits * 2  # noqa: E731
    options = SamplingOptions(temperature=0.5, repetition_penalty=4.0, logits_processors=[double, seen])
    sampler = Sampler(options, rows=1, vocab_size=4)
    sampler.observe(0, [0])
    ids, probabilities = sampler.distribution(logits[0])
    np.testing.assert_array_equal(seen.calls[0][1], [8, 6, 4, 2])
    expected = np.exp(np.array([8 / 4, 6, 4, 2]) / 0.5)
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-5)
    assert ids.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(logits, [[4, 3, 2, 1]])  # the session's own are left as they are


def test_a_row_of_a_batch_is_processed_as_alone(tmp_path):
    model = fake_model(tmp_path, eos=(2, *range(40, 60)), max_context=60)

    def no_repeats(tokens, logits):
        logits[tokens] -= 5

    prompts, seen = ["hello", "the world and the user said hello", "a"], Recorder()
    options = {"max_new_tokens": 30, "logits_processors": [no_repeats]}
    together = model.generate(prompts, **{**options, "logits_processors": [seen, no_repeats]})
    alone = [model.generate(p, **options) for p in prompts]
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert len({len(a.tokens) for a in alone}) > 1  # rows did leave the batch
    starts = [model.tokenizer.encode(p) for p in prompts]
    assert [tokens for tokens, _ in seen.calls[:3]] == starts  # the rows in turn


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=20), st.lists(st.integers(0, 2), max_size=6),
    st.floats(0.1, 5),
)  # fmt: skip
@settings(deadline=None)
def test_the_repetition_penalty_is_a_processor_like_any_other(values, tokens, penalty):
    logits = np.array([values], dtype=np.float32)
    both = []
    for options in (
        SamplingOptions(temperature=1.0, repetition_penalty=penalty),
        SamplingOptions(temperature=1.0, logits_processors=[RepetitionPenalty(penalty)]),
    ):
        sampler = Sampler(options, rows=1, vocab_size=len(values))
        sampler.observe(0, tokens)
        both.append(sampler.distribution(logits[0]))
    np.testing.assert_array_equal(both[0][0], both[1][0])
    np.testing.assert_array_equal(both[0][1], both[1][1])
    naive = [v / penalty if v > 0 else v * penalty for v in values]
    changed = logits[0].copy()
    RepetitionPenalty(penalty)(np.array(tokens, dtype=np.int64), changed)
    expected = [n if i in tokens else v for i, (n, v) in enumerate(zip(naive, values, strict=True))]
    np.testing.assert_allclose(changed, np.array(expected, dtype=np.float32), rtol=1e-5)


def test_with_processors_the_device_does_not_choose(monkeypatch):
    bundle = Bundle(attention_bundle("cuda"))
    session = device_session(bundle)
    assert session.candidates > 0
    model = Model(session, load(attention_bundle()).tokenizer, bundle)
    asked = []
    best = type(session).best
    monkeypatch.setattr(type(session), "best", lambda *a: asked.append(1) or best(*a))
    plain = model.generate("hello", max_new_tokens=5, ignore_eos=True)
    assert asked
    asked.clear()
    processed = model.generate("hello", max_new_tokens=5, ignore_eos=True, logits_processors=[lambda t, x: None])
    assert not asked
    assert processed.tokens == plain.tokens
    banned = plain.tokens[0]
    free = model.generate("hello", max_new_tokens=5, ignore_eos=True, logits_processors=[forbid_in_place(banned)])
    assert banned not in free.tokens


@pytest.mark.parametrize(("processor", "message"), [
    (lambda t, x: x[:-1], r"returned float32 of shape \(291,\); it must return 292 numbers"),
    (lambda t, x: "no", "returned <U2 of shape"),
    (lambda t, x: x[None], r"of shape \(1, 292\)"),
    (lambda t, x: x.fill(-np.inf), "leave a best logit of -inf; they must leave a token possible"),
    (lambda t, x: x + np.nan, "leave a best logit of nan"),
    (lambda t, x: x + np.inf, "leave a best logit of inf"),
])  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_a_processor_that_leaves_no_logits_is_named(model, processor, message, options):
    with pytest.raises(OptionError, match=message):
        model.generate([5] * 3, max_new_tokens=2, logits_processors=[processor], **options)


@pytest.mark.parametrize("wrong", [None, "abc", 5, lambda t, x: x, [None], ["abc"], {"a": 1}, b"x"])
def test_what_is_no_list_of_functions_is_refused_before_anything_runs(model, wrong):
    with pytest.raises(
        OptionError, match=r"logits_processors(\[0\])? is .*; it must be a (list of functions|function of)"
    ):
        model.generate("hello", logits_processors=wrong)
    assert model.session.read == 0


def test_a_processors_own_error_comes_through_and_spoils_nothing(model):
    def fails(tokens, logits):
        raise LookupError("mine")

    talk = model.conversation()
    with pytest.raises(LookupError, match="mine"):
        talk.say("hello", logits_processors=[fails])
    assert talk.messages == []
    assert talk.say("hello", max_new_tokens=4).tokens == model.chat(talk.messages[:-1], max_new_tokens=4).tokens


def test_the_tokens_cannot_be_changed_through_what_is_given(model):
    def scribbles(tokens, logits):
        tokens[0] = 0

    with pytest.raises(ValueError, match="read-only"):
        model.generate("hello", logits_processors=[scribbles])
