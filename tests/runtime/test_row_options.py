"""Rows of one batch with options of their own, and several answers to each: every row is what it is alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle

from edgellm_runtime import Generation, Model, OptionError, load

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.5]), "seed": st.integers(0, 5), "top_k": st.integers(0, 9),
        "top_p": st.sampled_from([0.5, 1.0]), "max_new_tokens": st.integers(0, 12),
        "stop": st.sampled_from(["e", ["a", "t"]]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]), "presence_penalty": st.sampled_from([0.0, 2.0]),
        "logprobs": st.sampled_from([None, 0, 2]), "echo": st.booleans(), "ignore_eos": st.booleans(),
        "banned_tokens": st.lists(st.integers(3, 50), max_size=3), "no_repeat_ngram": st.integers(0, 3),
        "forced_tokens": st.lists(st.integers(3, 50), max_size=2), "skip_special_tokens": st.booleans(),
    },
)  # fmt: skip
ROWS = st.lists(st.tuples(st.lists(st.integers(3, 50), min_size=1, max_size=6), OPTIONS), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return fake_model(tmp_path_factory.mktemp("rows"))


def same(a: Generation, b: Generation) -> None:
    assert (a.text, a.tokens, a.finish_reason, a.logprobs) == (b.text, b.tokens, b.finish_reason, b.logprobs)


@given(rows=ROWS, common=st.fixed_dictionaries({"seed": st.integers(0, 3)}, optional={
    "temperature": st.sampled_from([0.0, 1.0]), "top_k": st.integers(0, 5)}))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_row_with_its_own_options_is_what_it_is_alone(model: Model, rows: Any, common: dict[str, Any]) -> None:
    prompts, own = [prompt for prompt, _ in rows], [options for _, options in rows]
    common = {"max_new_tokens": 8, **common}
    for prompt, options, found in zip(prompts, own, model.generate(prompts, row_options=own, **common), strict=True):
        same(found, model.generate(prompt, **{**common, **options}))


@given(rows=ROWS, n=st.integers(1, 3), seed=st.none() | st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_several_answers_to_each_prompt_are_what_each_prompt_gets_alone(
    model: Model, rows: Any, n: int, seed: int | None
) -> None:
    prompts = [prompt for prompt, _ in rows]
    common: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0 if seed is not None else 0.0, "seed": seed}
    for prompt, answers in zip(prompts, model.generate(prompts, n=n, **common), strict=True):
        assert len(answers) == n
        for found, alone in zip(answers, model.generate(prompt, n=n, **common), strict=True):
            same(found, alone)
    own = [options for _, options in rows]
    seeded = [{"seed": 7, **options} for options in own]
    for i, answers in enumerate(model.generate(prompts, n=n, row_options=seeded, max_new_tokens=6)):
        for found, alone in zip(
            answers, model.generate(prompts[i], n=n, **{"max_new_tokens": 6, **seeded[i]}), strict=True
        ):
            same(found, alone)


def test_several_answers_read_a_prompt_once(model: Model) -> None:
    session = model.session
    before = session.read  # type: ignore[attr-defined]
    model.generate([[5, 6, 7, 8], [9, 10]], n=3, max_new_tokens=1)
    assert session.read - before == 6  # type: ignore[attr-defined]


def test_the_best_of_several_are_given_of_each_prompt(model: Model) -> None:
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 1, "max_new_tokens": 5, "best_of": 4}
    prompts = [[5, 6], [7, 8, 9]]
    for prompt, found in zip(prompts, model.generate(prompts, n=2, **asked), strict=True):
        assert [a.tokens for a in found] == [a.tokens for a in model.generate(prompt, n=2, **asked)]
    assert [a.tokens for a in model.generate(prompts, **asked)] == [model.generate(p, **asked).tokens for p in prompts]


def test_a_row_may_be_ended_by_itself(model: Model) -> None:
    gone = threading.Event()
    gone.set()
    rows = [{"cancel": gone}, {}, {"deadline": 0.0}]
    found = model.generate([[5, 6]] * 3, row_options=rows, max_new_tokens=6, ignore_eos=True)
    assert [(len(a.tokens), a.finish_reason) for a in found] == [(1, "cancelled"), (6, "length"), (1, "deadline")]


def test_rows_may_have_forms_of_their_own() -> None:
    model = load(attention_bundle(), threads=1)
    forms = [model.grammar(choices=["hello", "world"]), model.grammar(regex="[0-9]{3}")]
    found = model.generate(
        ["the", "the", "the"], max_new_tokens=12, row_options=[{"grammar": forms[0]}, {"grammar": forms[1]}, {}]
    )
    assert found[0].text in ("hello", "world")
    assert len(found[1].text) == 3 and found[1].text.isdecimal()
    assert found[2].tokens == model.generate("the", max_new_tokens=12).tokens


def test_what_cannot_be_is_told(model: Model, tmp_path: Path) -> None:
    for prompt, rows, said in (
        ([5], [{}], "row_options goes with a list of prompts"), ([[5], [6]], [{}], "has 1 entries for 2 prompts"),
        ([[5]], [3], r"row_options\[0\] is 3"), ([[5]], [{"temprature": 1}], "did you mean temperature"),
        ([[5]], [{"top_p": 3}], r"row_options\[0\]: top_p"), ([[5]], [{"seed": [1]}], "it must be one number"),
        ([[5]], [{"draft": "lookup"}], "names draft, which is the whole call's"), ([[5]], "ab", "row_options"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=said):
            model.generate(prompt, row_options=rows)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="seed has 3 numbers for 2 prompts"):
        model.generate([[5], [6]], n=2, seed=[1, 2, 3])
