from __future__ import annotations

import json
import re

import click
import pytest
from click.testing import CliRunner
from generation_fakes import fake_model
from tiny_bundles import attention_bundle

import edgellm_runtime
from edgellm.cli.bench import bench
from edgellm.cli.chat import chat
from edgellm.cli.generate import generate


@pytest.fixture
def model(tmp_path, monkeypatch):
    model = fake_model(tmp_path, max_context=300)
    monkeypatch.setattr(edgellm_runtime, "load", lambda path, *, device="auto", threads=None: model, raising=False)
    return model


def run(command, *arguments, **keywords):
    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False, **keywords)
    assert result.exit_code == 0, result.output
    return result


def test_generate_streams_the_answer_and_keeps_the_figures_apart(model, tmp_path):
    expected = model.chat([{"role": "user", "content": "hello"}], max_new_tokens=9)
    result = run(generate, str(tmp_path), "hello", "--max-new-tokens", "9")
    assert result.stdout == expected.text + "\n"
    assert "9 new tokens, length" in result.stderr
    assert "tok/s" in result.stderr


def test_generate_json_is_one_object(model, tmp_path):
    result = run(
        generate, str(tmp_path), "-", "--raw", "--json", "--max-new-tokens", "9", "--temperature", "1", "--seed", "3",
        "--stop", "zzz", "--stop", "yyy", input="hello",
    )  # fmt: skip
    expected = model.generate("hello", max_new_tokens=9, temperature=1.0, seed=3)
    data = json.loads(result.output)
    assert data["tokens"] == list(expected.tokens)
    assert data["text"] == expected.text
    assert set(data) == {"text", "tokens", "prompt_tokens", "cached_tokens", "finish_reason", "timings"}


def test_generate_takes_the_options_of_the_runtime(model, tmp_path):
    result = run(
        generate, str(tmp_path), "hello", "--raw", "--json", "--max-new-tokens", "9", "--logprobs", "2", "--stop-token",
        "40", "--stop-token", "50", "--min-tokens", "3", "--no-repeat-ngram", "2", "--presence-penalty", "0.5",
        "--frequency-penalty", "0.25",
    )  # fmt: skip
    expected = model.generate(
        "hello", max_new_tokens=9, logprobs=2, stop_tokens=[40, 50], min_tokens=3, no_repeat_ngram=2,
        presence_penalty=0.5, frequency_penalty=0.25,
    )  # fmt: skip
    data = json.loads(result.output)
    assert data["tokens"] == list(expected.tokens)
    assert [p["token"] for p in data["logprobs"]] == data["tokens"] and len(data["logprobs"][0]["top"]) == 2


def test_the_bundles_own_options_hold_where_none_is_given_and_are_told(model, tmp_path):
    model.bundle.manifest.generation = {"temperature": 0.7, "max_new_tokens": 5}
    result = run(generate, str(tmp_path), "hello", "--raw", "--seed", "3")
    assert "5 new tokens" in result.stderr and "the bundle's own: temperature 0.7, max_new_tokens 5" in result.stderr
    assert result.stdout.strip("\n") == model.generate("hello", temperature=0.7, max_new_tokens=5, seed=3).text
    given = run(generate, str(tmp_path), "hello", "--raw", "--temperature", "0", "--max-new-tokens", "4")
    assert given.stdout.strip("\n") == model.generate("hello", temperature=0, max_new_tokens=4).text
    assert "the bundle's own" not in given.stderr
    said = run(chat, str(tmp_path), input="hello\n/stats\n")
    assert "5 new tokens" in said.stderr


def test_logprobs_without_json_are_a_usage_error(model, tmp_path):
    result = CliRunner().invoke(generate, [str(tmp_path), "hello", "--logprobs", "2"])
    assert result.exit_code == 2 and "add --json" in result.stderr


def test_generate_modes(model, tmp_path):
    def count(*arguments):
        return json.loads(run(generate, str(tmp_path), *arguments, "--json", "--max-new-tokens", "1").output)[
            "prompt_tokens"
        ]

    user, system = {"role": "user", "content": "hello"}, {"role": "system", "content": "the"}
    assert count("z", "--raw") == 1
    assert count("hello") == count("hello", "--chat") == len(model.chat_template.encode([user]))
    assert count("hello", "--system", "the") == len(model.chat_template.encode([system, user]))
    assert count("<|im_end|>", "--raw", "--special") == 1
    for wrong in (["--raw", "--system", "x"], ["--special"]):
        assert CliRunner().invoke(generate, [str(tmp_path), "hello", *wrong]).exit_code == 2


def test_chat_talks_over_a_pipe(model, tmp_path):
    lines = "hello\n/stats\n\n/system\n/system the world\n/nonsense\n/help\nhello\n/reset\n"
    result = run(chat, str(tmp_path), "--max-new-tokens", "5", input=lines)
    plain = model.chat([{"role": "user", "content": "hello"}], max_new_tokens=5).text
    ruled = [{"role": "system", "content": "the world"}, {"role": "user", "content": "hello"}]
    assert result.stdout == f"{plain}\n{model.chat(ruled, max_new_tokens=5).text}\n"
    for word in ("state holds", "No command /nonsense", "/exit", "is forgotten"):
        assert word in result.stderr


def test_chat_survives_an_interrupt_and_a_message_too_long(model, tmp_path):
    model.session.fail_at = 20
    result = run(chat, str(tmp_path), "--max-new-tokens", "9", input="hello\n" + "z" * 400 + "\nhello\n/exit\nhello\n")
    assert "[stopped]" in result.stderr
    assert "/reset begins anew" in result.stderr
    assert result.stdout.count("\n") == 3


def test_bench_takes_its_workload_from_the_environment():
    environment, bundle = {"PROMPT_TOKENS": "6", "NEW_TOKENS": "5", "THREADS": "1"}, str(attention_bundle())
    data = json.loads(run(bench, bundle, "--json", "--rounds", "1", env=environment).stdout)
    assert (data["prompt_tokens"], data["new_tokens"], data["threads"]) == (6, 5, 1)
    assert "time to first token" in run(bench, bundle, "--rounds", "1", env=environment).output


@pytest.mark.parametrize("command", [generate, chat, bench])
def test_every_option_has_help(command):
    assert all(p.help for p in command.params if isinstance(p, click.Option))
    assert CliRunner().invoke(command, ["--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--regex", "[xy]{2}z", r"[xy]{2}z"), ("--choice", "either", "either"),
        ("--json-schema", '{"enum": ["a", 12]}', r'"a"|12'), ("--lark", 'start: "qq" | "rr"', "qq|rr"),
    ],
)  # fmt: skip
def test_an_answer_has_the_form_that_is_asked_for(option, text, expected, tmp_path):
    if option in ("--json-schema", "--lark"):
        (tmp_path / "form").write_text(text)
        text = str(tmp_path / "form")
    answer = run(generate, str(attention_bundle()), "it", "--raw", option, text).stdout
    assert re.fullmatch(expected, answer.removesuffix("\n"))
