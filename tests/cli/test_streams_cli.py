"""Standard streams as they come: closed, of other encodings, of few characters; and what is printed as JSON."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from generation_fakes import byte_level, fake_model
from refusals import refusal
from tiny_bundles import attention_bundle

import edgellm_runtime
from edgellm import cli
from edgellm.cli.standard_streams import read_input, unescaped
from edgellm_runtime.json_text import json_text

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path, monkeypatch):
    model = fake_model(tmp_path, max_context=300)
    monkeypatch.setattr(edgellm_runtime, "load", lambda path, *, device="auto", threads=None: model, raising=False)
    return model


def standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["edgellm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def only(model, character: str) -> None:
    """Let the model say nothing but this."""
    ids = model.tokenizer.encode(character)
    model.session.table[:] = -1
    model.session.table[:, ids[0]] = 1
    assert len(ids) == 1 or not character.isascii()


@pytest.mark.parametrize("as_json", [False, True])
def test_an_output_of_few_characters_gets_the_whole_answer(model, monkeypatch, as_json):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    arguments = ["--raw", "--max-new-tokens", "9", "--ignore-eos", *(["--json"] if as_json else [])]
    only(model, "日")
    free = model.generate("hello", max_new_tokens=9, ignore_eos=True)
    assert "\ufffd" in free.text  # half characters, which cp1252 has not
    assert main(monkeypatch, "generate", "bundle", "hello", *arguments) == 0
    sys.stdout.flush()
    text = written.getvalue().decode("cp1252")
    if as_json:
        assert json.loads(text)["text"] == free.text  # escapes lose nothing
    else:
        assert text.strip("\n") == free.text.encode("cp1252", errors="replace").decode("cp1252").strip("\n")


def test_closed_standard_input_is_told(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    for command in (["generate", "bundle", "-"], ["chat", "bundle"]):
        assert "standard input is closed" in refusal(capsys, *command)


def test_closed_standard_error_stops_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    from edgellm.cli.progress import stages

    with stages() as tell:
        tell("reading", 0.0)


def test_a_stage_that_takes_long_says_twice_a_minute_how_far_it_is(monkeypatch, capsys):
    from edgellm.cli import progress

    times = iter([0.0, 1.0, 2.0, 31.5, 32.0, 70.0, 71.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times))
    with progress.stages() as tell:
        for what, share in [("a", 0.0), ("a", 0.1), ("a", 0.4), ("a", 0.5), ("a", 0.4), ("b", 0.0)]:
            tell(what, share)
    shown = [line.split(" s  ") for line in capsys.readouterr().err.splitlines()]
    assert [(float(at), what) for at, what in shown] == [(1.0, "a"), (31.5, "a · 40%"), (71.0, "b")]


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (b"caf\xe9", "utf-8", "standard input is not UTF-8 at byte 3; convert it first, or say with PYTHONIOENCODING"),
        ("é".encode(), "ascii", "standard input is not ASCII at byte 0"),
    ],
)
def test_input_of_another_encoding_is_named_as_such(model, monkeypatch, capsys, data, encoding, message):
    standard_input(monkeypatch, data, encoding)
    assert message in refusal(capsys, "generate", "bundle", "-")
    standard_input(monkeypatch, b"hello\n" + data + b"\n", encoding)
    assert cli.run(["chat", "bundle", "--max-new-tokens", "1"]) == 1
    assert message.replace("standard", "line 2 of standard", 1) in capsys.readouterr().err


def test_input_in_the_encoding_that_was_said_is_read(monkeypatch):
    standard_input(monkeypatch, b"caf\xe9\r\n", "cp1252")
    assert read_input() == "café"


@pytest.mark.parametrize(
    ("data", "text"), [(b"x\n", "x"), (b"x\r\n", "x"), (b"x", "x"), (b"x\n\n", "x\n"), (b"\n", ""), (b" x \n", " x ")]
)
def test_the_line_break_of_echo_is_no_part_of_the_prompt(monkeypatch, data, text):
    standard_input(monkeypatch, data)
    assert read_input() == text


def test_a_stop_text_may_be_a_line_break(model, monkeypatch, capsys):
    only(model, "\n")
    assert cli.run(["generate", "bundle", "hello", "--raw", "--json", "--stop", r"\n", "--ignore-eos"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize(
    ("given", "text"),
    [(r"\n", "\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\x41\u00e9", "Aé"), (r"\d\end", r"\d\end"), ("\\", "\\")],
)
def test_escapes_of_a_stop_text(given, text):
    assert unescaped(given) == text


def test_messages_that_begin_with_a_slash_are_sent(model, monkeypatch, capsys):
    said = []
    template = type(model.chat_template)
    encode = template.encode
    monkeypatch.setattr(
        template, "encode", lambda self, turn, **k: said.append(turn[-1]["content"]) or encode(self, turn, **k)
    )
    standard_input(monkeypatch, b"//help me\n/etc/hosts: what is it?\n/ 2\n/nonsense\n/stats\n")
    assert cli.run(["chat", "bundle", "--max-new-tokens", "1"]) == 0
    assert said == ["/help me", "/etc/hosts: what is it?", "/ 2"]
    assert "No command /nonsense; /help lists them. Begin a message with //" in capsys.readouterr().err


def test_json_has_null_for_what_is_no_number():
    data = {"a": float("nan"), "b": [float("inf"), 1.5, (float("-inf"),)], "c": {"d": 1}}
    assert json_text(data) == '{"a": null, "b": [null, 1.5, [null]], "c": {"d": 1}}'


def test_nothing_writes_json_that_is_none():
    """Every json.dumps of the packages forbids NaN, but for a template's, which does as the field's renderers do."""
    found = []
    for folder in ("edgellm", "exporters", "runtime", "examples", "scripts"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump")
                if called and not any(keyword.arg == "allow_nan" for keyword in node.keywords):
                    found.append(f"{path.name}:{node.lineno}")
    assert [place for place in found if not place.startswith("template_language.py")] == []


def test_the_command_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "edgellm", "--version"], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.strip().endswith(version("edgellm"))


def test_the_runtime_says_its_version():
    assert edgellm_runtime.__version__ == version("edgellm")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgellm_runtime.nothing  # noqa: B018


def test_a_checkpoint_of_another_vocabulary_is_told(tmp_path, capsys):
    from torch import manual_seed

    from edgellm.checkpoints.native import save_checkpoint
    from edgellm.models.decoder import Decoder, DecoderConfig

    manual_seed(0)
    config = DecoderConfig(
        vocab_size=80, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32, max_context=96
    )
    save_checkpoint(tmp_path / "other", Decoder(config), architecture="decoder", tokenizer_json=byte_level().to_str())
    (tmp_path / "text").write_text("hello the world " * 40)
    bundle, other = str(attention_bundle()), str(tmp_path / "other")
    for command in (
        ["verify", bundle, "--against", other],
        ["eval", bundle, "--text", str(tmp_path / "text"), "--against", other, "--window", "32"],
    ):
        assert cli.run(command) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
        assert len(said) == 1
        assert said[0].startswith(f"Error: {other}: has a vocabulary of 80, and {bundle} has one of 2")


def test_another_model_of_the_same_vocabulary_is_told(tmp_path, capsys):
    from torch import manual_seed

    from edgellm.checkpoints.native import save_checkpoint
    from edgellm.models.decoder import Decoder, DecoderConfig

    manual_seed(0)
    config = DecoderConfig(
        vocab_size=byte_level().get_vocab_size(), width=32, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8,
        mlp_width=32, max_context=96,
    )  # fmt: skip
    save_checkpoint(tmp_path / "other", Decoder(config), architecture="decoder", tokenizer_json=byte_level().to_str())
    bundle, other = str(attention_bundle()), str(tmp_path / "other")
    assert cli.run(["verify", bundle, "--against", other]) == 1
    assert f"Error: {other}: carries another state than {bundle}, so it is another model" in capsys.readouterr().err
