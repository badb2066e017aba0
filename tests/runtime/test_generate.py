from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_runtime.errors import ContextError, OptionError
from edgellm_runtime.generation.generate import GenerationOptions
from edgellm_runtime.generation.stops import StopMatcher


@pytest.fixture
def model(tmp_path):
    return fake_model(tmp_path)


def naive(model, prompt: list[int], count: int) -> list[int]:
    """Greedy without a state: read everything again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        state = model.session.new_state(1, 100)
        tokens.append(int(model.session.step(np.array([tokens]), state)[0, 0].argmax()))
    return tokens[len(prompt) :]


def test_greedy_is_what_reading_everything_again_gives(model):
    prompt = model.tokenizer.encode("hello the world")
    answer = model.generate("hello the world", max_new_tokens=20, ignore_eos=True)
    assert list(answer.tokens) == naive(model, prompt, 20)
    assert answer.text == model.tokenizer.decode(answer.tokens)
    assert (answer.prompt_tokens, answer.finish_reason) == (len(prompt), "length")
    assert answer.timings.ttft_ms > 0
    assert answer.timings.decode_tokens_per_s > 0


def test_a_texts_tokens_give_the_same(model):
    tokens = model.tokenizer.encode("hello")
    expected = model.generate("hello", max_new_tokens=5).tokens
    assert model.generate(tokens, max_new_tokens=5).tokens == expected
    assert model.generate(np.array(tokens), max_new_tokens=5).tokens == expected
    assert model.generate([tokens], max_new_tokens=5)[0].tokens == expected


PROMPTS = ["hello", "the world and the user said hello", "a", "user user user"]


@pytest.mark.parametrize("options", [
    {}, {"ignore_eos": True}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "seed": 0, "top_p": 0.9},
    {"repetition_penalty": 1.5}, {"stop": ["e", "th"], "temperature": 2.0, "seed": 9},
])  # fmt: skip
def test_a_row_of_a_batch_gets_what_it_gets_alone(tmp_path, options):
    model = fake_model(tmp_path, eos=(2, *range(40, 60)), max_context=40)
    together = model.generate(PROMPTS, max_new_tokens=30, **options)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        alone = model.generate(prompt, max_new_tokens=30, **options)
        assert (answer.tokens, answer.text, answer.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
    if not options:
        assert len({len(a.tokens) for a in together}) > 1  # rows did end at different times


def test_the_stream_joined_is_the_answer(model):
    for options in ({}, {"temperature": 1.5, "seed": 1, "stop": "e"}, {"ignore_eos": True}):
        answer = model.generate("hello", max_new_tokens=25, **options)
        stream = model.stream("hello", max_new_tokens=25, **options)
        chunks = list(stream)
        assert "".join(c.text for c in chunks) == answer.text == stream.generation.text
        assert tuple(t for c in chunks for t in c.token_ids) == answer.tokens
        assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + [answer.finish_reason]


def test_leaving_a_stream_early_disturbs_nothing(model):
    expected = model.generate("hello", max_new_tokens=10).tokens
    stream = model.stream("hello", max_new_tokens=10)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.generation.tokens == first.token_ids == expected[:1]
    assert stream.generation.finish_reason == "cancelled"
    assert model.generate("hello", max_new_tokens=10).tokens == expected


def test_eos_ends_the_answer_and_is_counted_but_not_shown(tmp_path):
    model = fake_model(tmp_path)
    free = model.generate("hello", max_new_tokens=12, ignore_eos=True)
    token = free.tokens[4]
    at = free.tokens.index(token)
    ended = fake_model(tmp_path, eos=(2, token)).generate("hello", max_new_tokens=12)
    assert (ended.finish_reason, ended.tokens) == ("eos", free.tokens[: at + 1])
    assert ended.text == model.tokenizer.decode(free.tokens[:at])


def test_stop_strings_span_tokens_and_never_show(tmp_path):
    model = fake_model(tmp_path)
    options = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 1.2, "seed": 4}
    text = model.generate("hello", **options).text
    for start in range(0, len(text) - 6, 3):
        stop = text[start : start + 5]
        chunks = list(model.stream("hello", stop=[stop, "nowhere to be found"], **options))
        assert "".join(c.text for c in chunks) == text[: text.index(stop)]
        assert chunks[-1].finish_reason == "stop"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3), st.data())
@settings(deadline=None)
def test_stop_matcher_cuts_before_the_first_stop_and_loses_nothing(text, stops, data):
    matcher, out, stopped, at = StopMatcher(stops), "", False, 0
    while at < len(text) and not stopped:
        step = data.draw(st.integers(1, 4))
        piece, stopped = matcher.push(text[at : at + step])
        out, at = out + piece, at + step
        assert not any(s in out for s in stops)
    if stopped:
        assert any(text[len(out) :].startswith(s) for s in stops)
    else:
        assert out + matcher.finish() == text
        assert not any(s in text for s in stops)


def test_the_answer_ends_where_the_context_does(tmp_path):
    model = fake_model(tmp_path, max_context=10)
    answer = model.generate([5, 6, 7], max_new_tokens=100, ignore_eos=True)
    assert (len(answer.tokens), answer.finish_reason) == (7, "length")
    full = model.generate([5] * 10)
    assert (full.tokens, full.finish_reason, full.text) == ((), "length", "")
    rows = model.generate([[5] * 10, [5, 6, 7]], max_new_tokens=100, ignore_eos=True)
    assert rows[0].tokens == ()
    assert rows[1].tokens == answer.tokens


def test_a_prompt_longer_than_the_context_is_told_with_both_numbers(tmp_path):
    model = fake_model(tmp_path, max_context=10)
    for call in (model.generate, model.stream):
        with pytest.raises(ContextError, match=r"11 tokens.* holds 10; shorten"):
            call([5] * 11)


def test_no_new_tokens_ask_the_model_nothing(model):
    before = model.session.read
    assert model.generate("hello", max_new_tokens=0).finish_reason == "length"
    assert [c.token_ids for c in model.stream("hello", max_new_tokens=0)] == [()]
    assert model.session.read == before


def test_an_empty_prompt_needs_a_bos_token(tmp_path, model):
    for empty in ("", np.array([], dtype=np.int64)):
        with pytest.raises(OptionError, match="the prompt is empty"):
            model.generate(empty)
    with pytest.raises(OptionError, match="prompt 1 is empty"):
        model.generate(["hello", ""])
    with pytest.raises(OptionError, match="the prompt is empty"):
        model.stream([])
    assert model.generate([]) == []
    assert model.session.read == 0
    started = fake_model(tmp_path, bos=1)
    assert started.generate("").prompt_tokens == 1
    assert started.generate("", max_new_tokens=3).tokens == started.generate([1], max_new_tokens=3).tokens
    assert started.generate("hello").prompt_tokens == 1 + len(model.tokenizer.encode("hello"))


def test_a_bundle_without_tokenizer_takes_and_gives_tokens(tmp_path):
    model = fake_model(tmp_path, with_tokenizer=False)
    answer = model.generate([3, 4, 5], max_new_tokens=4)
    assert (len(answer.tokens), answer.text) == (4, "")
    for call in (lambda: model.generate("hello"), lambda: model.generate([3], stop="x"), lambda: model.chat([])):
        with pytest.raises(OptionError):
            call()


@pytest.mark.parametrize("options", [
    {"max_new_tokens": -1}, {"max_new_tokens": 1.5}, {"stop": [""]}, {"stop": ""}, {"stop": [1]}, {"temperature": -1},
])  # fmt: skip
def test_options_out_of_range_are_refused_before_anything_runs(model, options):
    for call in (model.generate, model.stream):
        with pytest.raises(OptionError):
            call("hello", **options)
    assert model.session.read == 0


@pytest.mark.parametrize("tokens", [[-1], [10**6], [1.5], [True], [None]])
def test_tokens_that_are_none_are_refused(model, tokens):
    with pytest.raises(OptionError, match="token id"):
        model.generate(tokens)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        GenerationOptions(temprature=1.0)


def test_generation_is_json(model):
    data = json.loads(json.dumps(model.generate("hello", max_new_tokens=3).to_json()))
    assert set(data) == {"text", "tokens", "prompt_tokens", "finish_reason", "timings", "cached_tokens"}
    assert set(data["timings"]) == {
        "prefill_s", "decode_s", "ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s",
    }  # fmt: skip


def test_importing_the_parts_loads_nothing_heavy():
    code = (
        "import edgellm_runtime.model, edgellm_runtime.checks.bench, sys;"
        "print(sorted({'torch', 'onnxruntime', 'tokenizers', 'jinja2', 'onnx', 'edgellm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
