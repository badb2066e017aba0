"""Each option of generation does what it says, against a plain reference where there is arithmetic."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
from generation_fakes import fake_model
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundles import device_session, window_bundle

from edgellm_runtime import OptionError
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.generation.generate import GenerationOptions, Run
from edgellm_runtime.generation.logprobs import logprobs_of
from edgellm_runtime.generation.penalties import CountPenalty, MinTokens, NoRepeatNgram, Windowed
from edgellm_runtime.generation.processors import RepetitionPenalty
from edgellm_runtime.generation.sampling import Sampler, SamplingOptions
from edgellm_runtime.softmax import log_softmax


@pytest.fixture
def model(tmp_path):
    return fake_model(tmp_path, max_context=300)


tokens = st.lists(st.integers(0, 5), min_size=0, max_size=30)


@given(tokens, st.integers(1, 5))
def test_the_ngrams_forbidden_are_those_that_a_plain_search_finds(row, size):
    logits = np.zeros(6, dtype=np.float32)
    NoRepeatNgram(size)(np.array(row, dtype=np.int64), logits)
    runs = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
    tail = row[len(row) - size + 1 :] if size > 1 else []
    expected = [len(row) >= size - 1 and (*tail, t) in runs for t in range(6)]
    assert np.isneginf(logits).tolist() == expected


@given(tokens, st.integers(0, 30), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_the_answer_alone(row, start, presence, frequency):
    logits = np.ones(6, dtype=np.float32)
    CountPenalty(presence, frequency, start)(np.array(row, dtype=np.int64), logits)
    answer = row[start:]
    expected = [1 - (presence * (t in answer) + frequency * answer.count(t)) for t in range(6)]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_ends_are_forbidden_until_enough_tokens_are_there():
    for held, expected in ((4, [0, -np.inf, 0, -np.inf]), (5, [0, 0, 0, 0])):
        logits = np.zeros(4, dtype=np.float32)
        MinTokens({1, 3}, 5)(np.arange(held), logits)
        assert logits.tolist() == expected


@given(st.lists(st.sampled_from([-3.0, 0.0, 0.5, 2.0, 7.5]), min_size=2, max_size=40), st.integers(0, 50))
def test_logprobs_are_the_log_softmax_and_its_greatest(values, count):
    logits = np.array(values, dtype=np.float32)
    found, expected = logprobs_of(logits, 1, count), log_softmax(logits)
    assert found.token == 1 and found.logprob == pytest.approx(expected[1], abs=1e-6)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert [i for i, _ in found.top] == order
    assert [p for _, p in found.top] == pytest.approx(expected[order].tolist(), abs=1e-6)


def test_logprobs_come_with_each_token_and_are_the_models_own(model):
    plain = model.generate("hello", max_new_tokens=6, ignore_eos=True)
    assert plain.logprobs is None
    stream = model.stream("hello", max_new_tokens=6, ignore_eos=True, logprobs=3, logit_bias={5: 1.0}, temperature=0.5,
                          top_k=1)  # fmt: skip
    chunks = list(stream)
    answer = stream.generation
    assert [c.logprobs for c in chunks] == list(answer.logprobs)
    assert [p.token for p in answer.logprobs] == list(answer.tokens)
    first = model.session.step(np.array([model.tokenizer.encode("hello")]), model.session.new_state())[0, 0]
    assert answer.logprobs[0] == logprobs_of(first, answer.tokens[0], 3)
    data = json.loads(json.dumps(answer.to_json()))
    assert data["logprobs"][0]["top"][0][1] == answer.logprobs[0].top[0][1] and "state" not in data
    assert model.generate("hello", max_new_tokens=6, ignore_eos=True, logprobs=0).tokens == plain.tokens


def test_in_a_batch_every_row_has_its_own_logprobs(model):
    prompts = ["hello", "the world and the user", "a"]
    for row, prompt in zip(model.generate(prompts, max_new_tokens=9, logprobs=2), prompts, strict=True):
        assert row.logprobs == model.generate(prompt, max_new_tokens=9, logprobs=2).logprobs


@pytest.mark.parametrize("options", [{"logprobs": 2}, {"banned_tokens": [1]}, {"logit_bias": {9: -1.0}}])
def test_a_device_that_chooses_is_not_asked_where_logits_are_needed(options):
    session = device_session(Bundle(window_bundle("onnx")))
    assert session.candidates

    def refuse(*_):
        raise AssertionError("the device chose")

    answers = []
    for forbidden in (False, True):
        if forbidden:
            session._backend.best = refuse
        run = Run(session, None, [[5, 6, 7]], GenerationOptions(max_new_tokens=5, **options))
        list(run.chunks())
        answers.append(run.result().tokens)
    assert answers[0] == answers[1]
    with pytest.raises(AssertionError, match="the device chose"):
        list(Run(session, None, [[5, 6, 7]], GenerationOptions(max_new_tokens=5)).chunks())


def test_banned_and_biased_tokens(model):
    plain = model.generate("hello", max_new_tokens=12, ignore_eos=True).tokens
    banned = model.generate("hello", max_new_tokens=12, ignore_eos=True, banned_tokens=plain).tokens
    assert not set(plain) & set(banned)
    assert (
        model.generate("hello", max_new_tokens=12, ignore_eos=True, logit_bias=dict.fromkeys(plain, -1e6)).tokens
        == banned
    )
    assert model.generate("hello", max_new_tokens=3, ignore_eos=True, logit_bias={77: 100}).tokens == (77, 77, 77)
    for option in ({"banned_tokens": [10**6]}, {"logit_bias": {10**6: 1}}, {"stop_tokens": [10**6]}):
        with pytest.raises(OptionError, match=r"1000000, outside the vocabulary of \d+; name its own"):
            model.generate("hello", **option)


def test_stop_tokens_end_the_answer_and_are_no_part_of_its_text(model):
    whole = model.generate("hello", max_new_tokens=12, ignore_eos=True)
    at = whole.tokens.index(whole.tokens[5])
    answer = model.generate("hello", max_new_tokens=12, ignore_eos=True, stop_tokens=[whole.tokens[5]])
    assert answer.tokens == whole.tokens[: at + 1] and answer.finish_reason == "stop"
    assert answer.text == model.generate("hello", max_new_tokens=at, ignore_eos=True).text
    longer = model.generate("hello", max_new_tokens=12, ignore_eos=True, stop_tokens=[whole.tokens[5]], min_tokens=9)
    assert whole.tokens[5] not in longer.tokens[:8] and len(longer.tokens) >= 9
    with pytest.raises(OptionError, match="min_tokens is 5; it must be an integer from 0 to 4"):
        model.generate("hello", max_new_tokens=4, min_tokens=5)


def test_min_tokens_puts_off_the_end_token(tmp_path):
    probe = fake_model(tmp_path)
    third = probe.generate("hello", max_new_tokens=3, ignore_eos=True).tokens[2]
    model = fake_model(tmp_path, eos=(third,))
    assert len(model.generate("hello", max_new_tokens=12).tokens) <= 3
    answer = model.generate("hello", max_new_tokens=12, min_tokens=7)
    assert len(answer.tokens) >= 7 and third not in answer.tokens[:6]


def test_no_run_of_three_comes_twice(model):
    options = {"max_new_tokens": 100, "ignore_eos": True, "logit_bias": dict.fromkeys(range(40, 50), 6.0)}
    for limit, repeats in ((0, True), (3, False)):
        row = [*model.tokenizer.encode("hello"), *model.generate("hello", no_repeat_ngram=limit, **options).tokens]
        runs = [tuple(row[i : i + 3]) for i in range(len(row) - 2)]
        assert (len(set(runs)) < len(runs)) is repeats


def test_penalties_of_an_answer_go_on_with_it(model):
    options = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "ignore_eos": True}
    whole = model.generate("hello", max_new_tokens=40, **options).tokens
    assert whole != model.generate("hello", max_new_tokens=40, ignore_eos=True).tokens
    begun = model.generate("hello", max_new_tokens=15, state=model.new_state(), **options)
    assert begun.tokens + model.generate("", max_new_tokens=25, state=begun.state, **options).tokens == whole


def test_special_tokens_have_their_names_where_they_are_asked_for(tmp_path):
    model = fake_model(tmp_path, max_context=200)
    bias = {2: 1e5}  # the end token
    assert model.generate("hello", logit_bias=bias).text == ""
    shown = model.generate("hello", logit_bias=bias, skip_special_tokens=False)
    assert shown.text == "<|im_end|>" and shown.finish_reason == "eos"
    assert (
        model.tokenizer.decode([1, 40, 2], skip_special=False)
        == "<|im_start|>" + model.tokenizer.decode([40]) + "<|im_end|>"
    )


def test_chosen_special_tokens_have_their_names_and_the_others_have_none(tmp_path):
    model = fake_model(tmp_path, max_context=200)
    forced = [1, 40, 0, 40, 2]
    known = model.tokenizer.decode([40])
    for shown, text in (((), known * 2), ((1,), "<|im_start|>" + known * 2), ((0, 2), known + "<|endoftext|>" + known)):
        assert model.generate("hello", forced_tokens=forced, shown_tokens=shown, ignore_eos=not shown,
                              max_new_tokens=5).text == text  # fmt: skip
    stopped = model.generate("hello", forced_tokens=forced, shown_tokens=(1,), stop=["start|>"], max_new_tokens=5)
    assert (stopped.text, stopped.finish_reason) == ("<|im_", "stop")
    with pytest.raises(OptionError, match="shown_tokens"):
        model.generate("hello", shown_tokens=["<think>"])


def test_an_echo_begins_with_the_prompt(model):
    plain = model.generate("hello", max_new_tokens=5)
    stream = model.stream("hello", max_new_tokens=5, echo=True)
    chunks = list(stream)
    assert (chunks[0].text, chunks[0].token_ids, chunks[0].finish_reason) == ("hello", (), None)
    assert stream.generation.text == "".join(c.text for c in chunks) == "hello" + plain.text
    assert stream.generation.tokens == plain.tokens
    assert model.generate("hello", max_new_tokens=0, echo=True).text == "hello"


def test_an_echo_needs_a_text(tmp_path):
    with pytest.raises(OptionError, match="echo is True, but the bundle has no tokenizer"):
        fake_model(tmp_path, with_tokenizer=False).generate([1], echo=True)


def test_progress_is_told_and_may_end_the_call():
    session = device_session(Bundle(window_bundle("onnx")))
    session.chunk = 4
    told = []
    options = GenerationOptions(max_new_tokens=1, progress=lambda *at: told.append(at))
    list(Run(session, None, [list(range(10))], options).chunks())
    assert told == [(4, 10), (8, 10), (10, 10)]
    told.clear()
    list(Run(session, None, [[1] * 6, [2] * 3], options).chunks())
    assert told[-1] == (9, 9) and told == sorted(told)

    def leave(read, total):
        raise TimeoutError("too long")

    with pytest.raises(TimeoutError, match="too long"):
        list(Run(session, None, [list(range(10))], GenerationOptions(progress=leave)).chunks())


def test_the_reprs_of_answers_and_conversations_are_short(model):
    answer = model.generate("hello", max_new_tokens=50, ignore_eos=True)
    assert repr(answer).startswith("<Generation '") and "50 tokens, length" in repr(answer) and len(repr(answer)) < 200
    conversation = model.conversation()
    conversation.say("hello", max_new_tokens=2)
    assert repr(conversation).startswith("<Conversation: 1 turns, ")


def test_the_chain_leaves_the_logits_as_they_are():
    options = SamplingOptions(logit_bias={1: 2.0}, banned_tokens=[0], presence_penalty=1, no_repeat_ngram=2)
    logits = np.array([3, 1, 2, 0], dtype=np.float32)
    sampler = Sampler(options, rows=1, vocab_size=4)
    sampler.observe(0, [2, 1])
    assert sampler(logits[None]).tolist() == [1]
    assert sampler(logits[None]).tolist() == [2]  # 1 is there once, and 1 after 1 is new; 2 has no penalty yet
    assert logits.tolist() == [3, 1, 2, 0]


@given(st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 3.0]), min_size=2, max_size=30), st.floats(0.05, 1))
def test_typical_tokens_are_the_fewest_whose_surprise_is_nearest_to_the_entropy(values, p):
    logits = np.array(values, dtype=np.float32)
    ids, _ = Sampler(SamplingOptions(temperature=1, typical_p=p), rows=1, vocab_size=len(values)).distribution(logits)
    logs = log_softmax(logits).astype(np.float64)
    entropy = -(np.exp(logs) * logs).sum()
    distance = np.abs(-logs - entropy)
    order = sorted(range(len(values)), key=lambda i: (round(distance[i], 5), i))
    left = float(np.exp(logs[ids]).sum())
    assert left >= p - 1e-5
    assert sorted(round(distance[i], 4) for i in ids) == sorted(round(distance[i], 4) for i in order[: len(ids)])
    farthest = max(round(distance[i], 4) for i in ids)
    assert left - max(float(np.exp(logs[i])) for i in ids if round(distance[i], 4) == farthest) < p + 1e-5


@given(tokens, st.integers(1, 8), st.integers(0, 30))
def test_a_window_hides_what_came_before_it_from_penalties(row, window, start):
    held = np.array(row, dtype=np.int64)
    for whole, part in (
        (CountPenalty(0.5, 0.25, start, window), CountPenalty(0.5, 0.25, max(start - max(len(row) - window, 0), 0))),
        (Windowed(RepetitionPenalty(2.0), window), RepetitionPenalty(2.0)),
    ):
        seen, expected = np.arange(6, dtype=np.float32), np.arange(6, dtype=np.float32)
        whole(held, seen)
        part(held[-window:], expected)
        assert seen.tolist() == expected.tolist()


def test_an_answer_begins_with_its_forced_tokens_whatever_is_banned(model):
    free = model.generate("hello", max_new_tokens=6, ignore_eos=True, forced_tokens=[9, 9, 7]).tokens
    assert free[:3] == (9, 9, 7)
    assert free[3:] == model.generate([*model.tokenizer.encode("hello"), 9, 9, 7], max_new_tokens=3,
                                      ignore_eos=True).tokens  # fmt: skip
    again = model.generate("hello", max_new_tokens=6, ignore_eos=True, forced_tokens=[9, 9, 7], banned_tokens=[9],
                           no_repeat_ngram=1, penalty_window=2, repetition_penalty=3.0)  # fmt: skip
    assert again.tokens[:3] == (9, 9, 7) and 9 not in again.tokens[3:]


def test_best_of_gives_the_likeliest_of_so_many_answers(model):
    options = {"temperature": 1.5, "seed": 3, "max_new_tokens": 5, "ignore_eos": True}
    made = model.generate("hello", n=6, logprobs=0, **options)
    order = sorted(made, key=lambda a: -sum(p.logprob for p in a.logprobs))  # all are of one length
    best = model.generate("hello", best_of=6, **options)
    assert best.tokens == order[0].tokens and best.logprobs is None
    two = model.generate("hello", n=2, best_of=6, logprobs=1, **options)
    assert [a.tokens for a in two] == [a.tokens for a in order[:2]] and len(two[0].logprobs[0].top) == 1
    assert model.generate("hello", best_of=3, **options, min_tokens=0).tokens in [a.tokens for a in made[:3]]
    with pytest.raises(OptionError, match="best_of is 2; it must be an integer from 3"):
        model.generate("hello", n=3, best_of=2)
    assert [a.tokens for a in model.generate(["hello", "hello"], best_of=6, **options)] == [best.tokens] * 2


class Clock:
    """Every look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now

    def perf_counter(self) -> float:
        return 0.0


def test_a_deadline_ends_an_answer_with_what_there_is(model, monkeypatch):
    whole = model.generate("hello", max_new_tokens=50, ignore_eos=True).tokens
    monkeypatch.setattr("edgellm_runtime.generation.generate.time", Clock())
    answer = model.generate("hello", max_new_tokens=50, ignore_eos=True, deadline=8.5)
    assert answer.finish_reason == "deadline"
    assert 1 < len(answer.tokens) < 10 and answer.tokens == whole[: len(answer.tokens)]
    assert model.generate("hello", max_new_tokens=5, ignore_eos=True, deadline=1e6).finish_reason == "length"


def test_an_event_cancels_every_row_of_a_batch(model):
    event = threading.Event()

    def fifth(tokens, logits):
        if len(tokens) == 5 + len(model.tokenizer.encode("hello")):
            event.set()

    answers = model.generate(["hello"] * 3, max_new_tokens=50, ignore_eos=True, cancel=event, logits_processors=[fifth])
    assert [a.finish_reason for a in answers] == ["cancelled"] * 3
    assert [len(a.tokens) for a in answers] == [6] * 3
    assert model.generate("hello", cancel=event).tokens == model.generate("hello", max_new_tokens=1).tokens
