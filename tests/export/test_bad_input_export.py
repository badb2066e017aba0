"""Exports that cannot be: one clear sentence, and nothing left behind but what was there before."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import only, refusal
from safetensors.torch import load_file, save_file
from tiny_bundles import attention_model, copied, recurrent_bundle, recurrent_model, text_assets
from torch import Tensor

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm_exporters import graph_sets, graph_writer, pipeline
from edgellm_exporters.errors import CaptureError, ExportError
from edgellm_exporters.export import ExportOptions
from edgellm_exporters.graph.write import GRAPH_FILE
from edgellm_exporters.quantize.narrow_caches import NarrowCaches
from edgellm_exporters.quantize.plan import Plan
from edgellm_runtime.bundle import Bundle

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    tokenizer = text_assets().tokenizer_json
    save_checkpoint(path, attention_model(), architecture="decoder", tokenizer_json=tokenizer, eos_token_ids=(0,))
    return path


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, *arguments: str) -> str:
    """The sentence of an export that fails and leaves nothing."""
    folder = checkpoint.parent
    before = sorted(folder.rglob("*"))
    message = refusal(capsys, "export", str(checkpoint), "-o", str(folder / "out"), *arguments)
    assert sorted(folder.rglob("*")) == before
    return message


def test_checkpoint_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, tmp_path / "none")
    assert f"{tmp_path / 'none'} does not exist; expected a directory with edgellm.json" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "toaster"], "unknown target 'toaster'; there are "),
        (["--quantize", "int3"], "unknown quantization 'int3'; there are "),
        (["--dtype", "int4"], "target cpu has no dtype 'int4'; it has "),
        (["--quantize", "2:16"], "2-bit block 16 weights: ONNX Runtime's MatMulNBits has no 2-bit kernel for such"),
        (["--quantize", "2:256:asymmetric"], "use blocks of 32, 64, 128, or 4 bits"),
    ],
)
def test_unknown_option_value(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, checkpoint, *arguments)


def change(checkpoint: Path, **entries: Any) -> None:
    file = checkpoint / "edgellm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_unknown_architecture(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    change(checkpoint, architecture="perceptron")
    message = refused(capsys, checkpoint)
    assert "edgellm.json: unknown architecture 'perceptron'; known: " in message


def test_unknown_foreign_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "perceptron"}))
    assert "unknown architecture 'perceptron'; edgellm loads " in refused(capsys, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "gemma22"}))
    assert "did you mean gemma2 or " in refused(capsys, tmp_path / "hf")


def test_checkpoint_of_a_newer_format(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    change(checkpoint, format=9)
    assert "format 9, this edgellm reads up to 1; update edgellm" in refused(capsys, checkpoint)


def edit_tensors(checkpoint: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


NAME = "layers.1.attention.k_proj.weight"


def test_missing_tensor(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t.pop(NAME))
    message = refused(capsys, checkpoint)
    assert message.endswith(f"tensor {NAME} of shape (16, 32) is missing, so the checkpoint is incomplete")


def test_misshaped_tensor(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t.update({NAME: torch.zeros(8, 32)}))
    assert f"tensor {NAME} has shape (8, 32), its configuration says (16, 32)" in refused(capsys, checkpoint)


def test_tensor_without_a_place(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t.update(extra=torch.zeros(1)))
    assert "tensors extra have no place in the model" in refused(capsys, checkpoint)


def test_weights_that_are_not_numbers(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: t[NAME][0].fill_(float("nan")))
    assert f"tensor {NAME} is not finite as torch.float32; use sound weights" in refused(capsys, checkpoint)


def test_truncated_weights(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "model.safetensors" in refused(capsys, checkpoint)


def test_rows_that_no_block_divides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = recurrent_model().config
    odd = type(recurrent_model())(type(config)(**{**config.to_json(), "width": 40, "recurrent_width": 40}))  # type: ignore[operator, union-attr, call-arg]
    save_checkpoint(tmp_path / "odd", odd, architecture="hybrid", tokenizer_json=None)
    message = refused(capsys, tmp_path / "odd", "--quantize", "int8")
    assert "no weight's rows divide into blocks of 32, such as " in message
    assert "of 40 weights; choose another format, or quantize nothing" in message


# where to


def test_destination_that_holds_other_files(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    (checkpoint.parent / "out").mkdir()
    (checkpoint.parent / "out" / "thesis.tex").write_text("years of work")
    message = refused(capsys, checkpoint)
    assert "out: holds thesis.tex and is no bundle; choose an empty or new directory" in message
    assert (checkpoint.parent / "out" / "thesis.tex").read_text() == "years of work"


def test_destination_that_is_a_file(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    (checkpoint.parent / "out").write_text("a file")
    assert "out: is not a directory; choose another place for the bundle" in refused(capsys, checkpoint)


def test_destination_below_a_file(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    (checkpoint.parent / "file").write_text("a file")
    message = refusal(capsys, "export", str(checkpoint), "-o", str(checkpoint.parent / "file" / "out"))
    assert "cannot be written" in message
    only(checkpoint.parent, "checkpoint", "file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_destination_that_may_not_be_written(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    locked = checkpoint.parent / "locked"
    locked.mkdir(mode=0o500)
    message = refusal(capsys, "export", str(checkpoint), "-o", str(locked / "out"))
    assert "cannot be written (Permission denied)" in message


@pytest.fixture
def there() -> Path:
    """A whole bundle, made before the exporter is tampered with: name it first among the fixtures."""
    return recurrent_bundle()


@pytest.fixture
def graphless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the seconds of tracing; what is tested comes after."""
    nothing = SimpleNamespace(step=None, encoder=None, all=())
    monkeypatch.setattr(graph_writer.GraphWriter, "_planned", lambda _: (nothing, Plan()))
    monkeypatch.setattr(graph_writer, "hidden_of", lambda *_: None)
    monkeypatch.setattr(graph_sets.OneGraph, "_lowered", lambda *_, **__: {GRAPH_FILE: None})
    monkeypatch.setattr(NarrowCaches, "declare", lambda *_: None)
    monkeypatch.setattr(graph_sets, "write_graphs", lambda *_: None)
    monkeypatch.setattr(pipeline, "take_traces", lambda *_, **__: ([None], []))
    monkeypatch.setattr(pipeline, "bounds_with_a_favourite", lambda bounds, _: bounds)
    monkeypatch.setattr(pipeline, "far_start", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "layers_in", lambda *_: [])
    monkeypatch.setattr(pipeline, "meaning_of", lambda _: {})
    monkeypatch.setattr(pipeline, "Bundle", lambda *_, **__: None)


def test_failed_export_leaves_the_bundle_that_was_there(
    there: Path, graphless: None, capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(there, checkpoint.parent).rename(checkpoint.parent / "out")
    monkeypatch.setattr(graph_sets, "write_graphs", full)
    assert "No space left on device" in refused(capsys, checkpoint, "--force")
    assert Bundle(out).manifest == Bundle(there).manifest


# while at it


def place_of(step: str) -> Any:
    """What a step of an export is looked up in."""
    return {"write_graphs": graph_sets, "_write_text": pipeline.Pipeline}.get(step, pipeline)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("graphless")
@pytest.mark.parametrize("step", ["write_graphs", "write_goldens", "_write_text", "_write_manifest"])
def test_full_disk(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(place_of(step), step, full)
    message = refused(capsys, checkpoint)
    out = checkpoint.parent / "out"
    assert message == f"{out}: cannot be written (No space left on device); free some space or choose another place"


@pytest.mark.usefixtures("graphless")
@pytest.mark.parametrize("step", ["write_graphs", "write_goldens", "_write_manifest"])
def test_interrupt_at_any_step_leaves_nothing(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place_of(step), step, interrupt)
    assert run(["export", str(checkpoint), "-o", str(checkpoint.parent / "out")]) == 130
    assert capsys.readouterr().err.endswith("Error: interrupted\n")
    only(checkpoint.parent, "checkpoint")


def command(checkpoint: Path, before: str = "", **how: Any) -> subprocess.Popen[str]:
    """``edgellm export`` as a program of its own."""
    code = textwrap.dedent(before) + textwrap.dedent(f"""
        import sys
        from edgellm.cli import main
        sys.argv[1:] = ["export", {str(checkpoint)!r}, "-o", {str(checkpoint.parent / "out")!r}]
        main()
    """)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )  # fmt: skip


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_middle_of_an_export_leaves_nothing(checkpoint: Path, number: signal.Signals) -> None:
    with command(checkpoint) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "capturing" in line:
                break
        time.sleep(0.3)
        heard, lines = threading.Event(), list[str]()

        def listen() -> None:
            for line in process.stderr or ():
                lines.append(line)
                if "interrupted" in line:
                    heard.set()
            heard.set()  # it has ended

        listening = threading.Thread(target=listen)
        listening.start()
        for _ in range(5):  # Python drops an interrupt that falls into a finalizer; people press the keys again
            process.send_signal(number)
            if heard.wait(3):  # one more would end it at once, before it has cleared up
                break
        process.wait(60)
        listening.join(60)
        assert process.stdout is not None
        output = process.stdout.read()
        errors = "".join(lines)
    assert process.returncode == 130, errors
    assert output == ""
    assert errors.endswith("Error: interrupted\n")
    assert "Traceback" not in errors
    only(checkpoint.parent, "checkpoint")


@POSIX
def test_disk_that_is_really_full(checkpoint: Path) -> None:
    """A limit on the size of files stands for the end of the disk: the weights do not fit, the manifest would."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"
    with command(checkpoint, before=limit) as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert output == ""
    last = errors.splitlines()[-1]
    assert last.startswith(f"Error: {checkpoint.parent / 'out'}: cannot be written (")
    assert last.endswith("free some space or choose another place")
    assert "Traceback" not in errors
    only(checkpoint.parent, "checkpoint")


def test_missing_onnxruntime_is_told_before_any_work(checkpoint: Path) -> None:
    with command(checkpoint, before="import sys; sys.modules['onnxruntime'] = None") as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Error: ONNX Runtime is not installed; pip install onnxruntime (or" in errors
    assert "capturing" not in errors
    assert "Traceback" not in errors
    only(checkpoint.parent, "checkpoint")


@pytest.mark.parametrize("name", ["torch", "safetensors", "onnx_ir"])
def test_missing_export_library_names_what_to_install(checkpoint: Path, name: str) -> None:
    with command(checkpoint, before=f"import sys; sys.modules[{name!r}] = None") as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    said = f"{name} is not installed and this command needs it; in a clone of edgellm: pip install '.[export]'"
    assert errors.endswith(said + "\n")
    assert "Traceback" not in errors


def test_errors_of_an_export_have_one_base() -> None:
    assert issubclass(CaptureError, ExportError)
    with pytest.raises(ExportError, match="unknown target"):
        ExportOptions(target="x")
