"""Prompts, tokens and options that no model can follow: one clear sentence each."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal
from tiny_bundles import CONTEXT, attention_bundle, recurrent_bundle

from edgellm_runtime import ContextError, OptionError, load

LONG = "z" * (CONTEXT + 1)


def generate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    return refusal(capsys, "generate", str(attention_bundle()), *arguments)


def test_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    message = generate(capsys, LONG, "--raw")
    assert message == (
        f"the prompt has {CONTEXT + 1} tokens, but the model's context holds {CONTEXT}; shorten the prompt"
    )


def test_prompt_as_long_as_the_context_gets_an_empty_answer() -> None:
    answer = load(attention_bundle(), threads=1).generate(LONG[1:])
    assert (answer.text, answer.tokens, answer.finish_reason) == ("", (), "length")


def test_empty_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    message = generate(capsys, "", "--raw")
    assert message == "the prompt is empty and the model has no bos token to start from; pass some text"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "-1", "temperature is -1.0; it must be a number at least 0 and at most 1e+06"),
        ("--temperature", "nan", "temperature is nan; it must be a number at least 0"),
        ("--temperature", "inf", "temperature is inf; it must be a number"),
        ("--top-k", "-1", "top_k is -1; it must be an integer of at least 0"),
        ("--top-p", "0", "top_p is 0.0; it must be a number above 0 and at most 1"),
        ("--top-p", "1.1", "top_p is 1.1; it must be"),
        ("--min-p", "2", "min_p is 2.0; it must be"),
        ("--repetition-penalty", "0", "repetition_penalty is 0.0; it must be"),
        ("--seed", "-1", "seed is -1; it must be an integer of at least 0"),
        ("--max-new-tokens", "-1", "max_new_tokens is -1; it must be an integer of at least 0"),
        ("--stop", "", "stop holds ''; each stop must be a text of at least one character"),
        ("--threads", "0", "threads is 0; it must be an integer from 1 to"),
        ("--device", "warp", "unknown device 'warp'"),
    ],
)
def test_impossible_option(capsys: pytest.CaptureFixture[str], option: str, value: str, message: str) -> None:
    assert message in generate(capsys, "x", option, value)


@pytest.mark.parametrize("option", ["--top-k", "--max-new-tokens", "--temperature"])
def test_option_that_is_no_number_is_wrong_usage(capsys: pytest.CaptureFixture[str], option: str) -> None:
    message = refusal(capsys, "generate", str(attention_bundle()), "x", option, "many", status=2)
    assert option in message
    assert "many" in message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([61], "token id 61 is outside the model's vocabulary; use 0 to 60"),
        ([3, -1], "token id -1 is outside"),
        ([1.5], "token id 1.5 is outside"),
        ([True], "token id True is outside"),
        ([[3], [99]], "token id 99 is outside"),
        ([[1], []], "prompt 1 is empty and the model has no bos token"),
        ([[1], [2, 61]], "prompt 1: token id 61 is outside the model's vocabulary"),
        ([[1], [1] * (CONTEXT + 1)], f"prompt 1 has {CONTEXT + 1} tokens, but the model's context holds {CONTEXT}"),
        ([[1], 5], "prompt 1 is 5; it must be a text or a list of token ids"),
        (b"text", "the prompt is b'text'; it must be a text or a list of token ids"),
        ({1: 2}, "the prompt is {1: 2}; it must be"),
        (None, "the prompt is None; it must be"),
        ("text", "the prompt is a text, but the bundle has no tokenizer; pass token ids"),
    ],
)
def test_impossible_tokens(prompt: Any, message: str) -> None:
    with pytest.raises((OptionError, ContextError), match=message):
        load(recurrent_bundle(), threads=1).generate(prompt)


def test_no_prompts_are_given_no_answers_and_ask_the_model_nothing() -> None:
    model = load(recurrent_bundle(), threads=1)
    assert model.generate([]) == []
    assert model.generate(()) == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "pass a list of at least one"),
        ("hello", "pass a list of at least one"),
        ([{"role": "user"}], "must have the keys 'role' and 'content'"),
        ([{"role": "king", "content": "x"}], "role 'king'; use one of system, developer, user, assistant, tool"),
        ([{"role": "user", "content": 3}], "content 3; it must be a text"),
        ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_impossible_messages(messages: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load(attention_bundle(), threads=1).chat(messages)


def test_chat_with_a_bundle_that_has_no_template() -> None:
    with pytest.raises(OptionError, match="has no chat template; use generate with a plain prompt"):
        load(recurrent_bundle(), threads=1).conversation()


def test_conversation_longer_than_the_context_keeps_what_was_said() -> None:
    conversation = load(attention_bundle(), threads=1).conversation()
    conversation.say("hello", max_new_tokens=2)
    before = list(conversation.messages)
    with pytest.raises(ContextError, match="shorten the prompt"):
        conversation.say(LONG)
    assert conversation.messages == before
    assert conversation.say("x", max_new_tokens=1).tokens


@pytest.mark.parametrize("rounds", ["0", "-1"])
def test_bench_of_nothing(capsys: pytest.CaptureFixture[str], rounds: str) -> None:
    message = refusal(capsys, "bench", str(attention_bundle()), "--rounds", rounds)
    assert message == f"rounds is {rounds}; it must be an integer of at least 1"


def test_bench_longer_than_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "bench", str(attention_bundle()), "--prompt-tokens", "90")
    assert f"do not fit into the model's context of {CONTEXT}; measure fewer" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "not UTF-8 at byte 0; convert it first"), (b"", "0 tokens in windows of"), (None, "No such file")],
)
def test_eval_of_a_text_that_is_none(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert message in refusal(capsys, "eval", str(attention_bundle()), "--text", str(tmp_path / "text"))


def test_missing_onnxruntime_names_what_to_install() -> None:
    code = f"""
        import sys
        sys.modules["onnxruntime"] = None
        from edgellm.cli import run
        sys.exit(run(["generate", {str(attention_bundle())!r}, "x"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "Error: ONNX Runtime is not installed; pip install onnxruntime (or onnxruntime-gpu for CUDA, never both)\n"
    )
