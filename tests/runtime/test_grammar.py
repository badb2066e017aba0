"""Answers of a form: whatever a model would rather say, what comes out is JSON of a schema, matches, is a choice."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_fakes import fake_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundles import attention_bundle, recurrent_bundle

from edgellm_runtime import OptionError, load
from edgellm_runtime.generation.grammar import Grammar

PERSON = {
    "type": "object", "required": ["name", "age", "likes"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain"]}, "maxItems": 2},
    },
}  # fmt: skip
ENOUGH = 90


@pytest.fixture(scope="module")
def model() -> Any:
    return load(attention_bundle())


@pytest.fixture(scope="module")
def forms(model: Any) -> dict[str, Grammar]:
    return {
        "schema": model.grammar(json_schema=PERSON), "regex": model.grammar(regex=r"[ab]{2,4}-\d{3}"),
        "choices": model.grammar(choices=["yes", "no", 'per"haps\n']),
        "lark": model.grammar(lark='start: WORD ("," WORD)~1..2\nWORD: /[x-z]{1,3}/'),
    }  # fmt: skip


def holds(name: str, text: str) -> bool:
    if name == "schema":
        found = json.loads(text)
        return (
            list(found) == ["name", "age", "likes"] and 0 <= found["age"] <= 99 and len(found["name"]) <= 6
            and set(found["likes"]) <= {"tea", "rain"} and len(found["likes"]) <= 2
        )  # fmt: skip
    if name == "choices":
        return text in ("yes", "no", 'per"haps\n')
    return bool(re.fullmatch({"regex": r"[ab]{2,4}-\d{3}", "lark": r"[x-z]{1,3}(,[x-z]{1,3}){1,2}"}[name], text))


@pytest.mark.parametrize("name", ["schema", "regex", "choices", "lark"])
@given(seed=st.integers(0, 2**32), temperature=st.sampled_from([0.0, 0.7, 3.0]))
@settings(max_examples=12, deadline=None)
def test_what_comes_out_is_of_the_form(model: Any, forms: Any, name: str, seed: int, temperature: float) -> None:
    answer = model.generate("it", grammar=forms[name], temperature=temperature, seed=seed, max_new_tokens=ENOUGH)
    assert answer.finish_reason in ("eos", "length")
    if answer.finish_reason == "eos":
        assert holds(name, answer.text)
    assert answer.finish_reason == "eos" or name == "schema"  # whose strings may be as long as the context


def test_rows_of_a_batch_and_streams_get_what_each_gets_alone(model: Any, forms: Any) -> None:
    prompts, how = ["the", "a letter", "keeper of"], {"grammar": forms["regex"], "temperature": 2.0}
    alone = [model.generate(p, seed=i, **how) for i, p in enumerate(prompts)]
    batch = model.generate(prompts, seed=[0, 1, 2], **how)
    assert [a.text for a in alone] == [b.text for b in batch]
    assert all(holds("regex", a.text) for a in alone)
    assert "".join(c.text for c in model.stream("the", seed=0, **how)) == alone[0].text


def test_the_callers_processors_cannot_lift_what_a_form_forbids(model: Any, forms: Any) -> None:
    def insist(tokens: Any, logits: Any) -> None:
        logits[:] = 0
        logits[model.tokenizer.encode("q")[0]] = 1e9

    assert holds("choices", model.generate("a", grammar=forms["choices"], logits_processors=[insist]).text)


def test_a_form_goes_on_in_an_answer_that_a_state_had_begun(model: Any, forms: Any) -> None:
    whole = model.generate("it", grammar=forms["regex"])
    state = model.new_state()
    begun = model.generate("it", grammar=forms["regex"], max_new_tokens=2, state=state)
    rest = model.generate("", grammar=forms["regex"], state=begun.state)
    assert begun.text + rest.text == whole.text


def test_a_matcher_takes_back_what_it_was_shown(model: Any, forms: Any) -> None:
    """As speculation needs it: a row that is shorter than before, or another, gets what it gets the first time."""
    vocabulary = model.session.vocab_size
    encode = model.tokenizer.encode
    matcher = forms["regex"].matcher(0)

    def possible(text: str, by: Any) -> list[int]:
        logits = np.zeros(vocabulary, dtype=np.float32)
        by(np.array(encode(text), dtype=np.int64), logits)
        return np.flatnonzero(np.isfinite(logits)).tolist()

    for text in ("ab", "abab-1", "aba", "b", "ab-12", ""):
        assert possible(text, matcher) == possible(text, forms["regex"].matcher(0)), text
    with pytest.raises(OptionError, match="the answer so far is not of the grammar"):
        possible("zz", matcher)


def test_what_it_costs_is_counted(model: Any) -> None:
    form = model.grammar(choices=["yes", "no"])
    answer = model.generate("a", grammar=form)
    assert form.use.tokens == len(answer.tokens) and form.use.seconds > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a grammar needs one of json_schema, regex, lark, choices, and has none"),
        ({"regex": "a", "lark": "start: a"}, "and has regex, lark; give one"),
        ({"regex": "(a"}, "regex cannot be used .*unclosed group"),
        ({"regex": 3}, "regex is 3; it must be a text"),
        ({"lark": "start: foo"}, 'lark cannot be used .*unknown name: "foo"'),
        ({"json_schema": {"type": "strange"}}, "json_schema cannot be used .*strange"),
        ({"json_schema": '{"type":'}, "json_schema cannot be used"),
        ({"json_schema": 3}, "json_schema is 3; it must be a dict"),
        ({"json_schema": {"a": float("nan")}}, "json_schema cannot be used"),
        ({"choices": []}, r"choices is \[\]; it must be at least one text"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"choices": "abc"}, "choices is 'abc'"),
    ],
)
def test_what_is_no_form_is_told_in_one_sentence(model: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        model.grammar(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grammar": "{}"}, r"grammar is '\{\}'; .*model.grammar\(...\) makes one"),
        ({"ignore_eos": True}, "leave ignore_eos out"),
        ({"forced_tokens": [1]}, "leave forced_tokens and min_tokens out"),
        ({"min_tokens": 2}, "leave forced_tokens and min_tokens out"),
    ],
)
def test_options_that_contradict_a_form_are_refused(model: Any, forms: Any, options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        model.generate("a", **{"grammar": forms["choices"], **options})


def test_models_without_text_or_end_tokens_have_no_forms(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the bundle has no tokenizer"):
        load(recurrent_bundle()).grammar(choices=["a"])
    endless = fake_model(tmp_path)
    endless.tokenizer.eos_token_ids = frozenset()
    with pytest.raises(OptionError, match="the bundle has no end token"):
        endless.grammar(choices=["a"])


def test_the_library_that_is_missing_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError, match="pip install 'llguidance"):
        model.grammar(choices=["a"])
