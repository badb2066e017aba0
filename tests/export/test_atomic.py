"""A bundle takes the place of a bundle and of nothing else, and what killed exports leave is swept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from refusals import only, refusal
from tiny_bundles import attention_bundle, attention_model, copied, recurrent_bundle, text_assets

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm_exporters.atomic import check_destination, scratch_directory, sweep, whole_directory
from edgellm_exporters.engines.rebuild import build_engines
from edgellm_exporters.errors import ExportError
from edgellm_exporters.export import export
from edgellm_runtime.bundle import Bundle

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    tokenizer = text_assets().tokenizer_json
    save_checkpoint(path, attention_model(), architecture="decoder", tokenizer_json=tokenizer, eos_token_ids=(0,))
    return path


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_folder_of_a_web_app_is_never_replaced(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, force: tuple[str, ...]
) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text(json.dumps({"name": "My app", "start_url": "index.html", "icons": []}))
    (app / "index.html").write_text("<h1>mine</h1>")
    before = contents(app)
    message = refusal(capsys, "export", str(checkpoint), "-o", str(app), *force)
    assert f"{app}: holds index.html, manifest.json, and manifest.json is not one that edgellm reads" in message
    assert message.endswith("choose an empty or new directory, or delete this one yourself")
    assert contents(app) == before


@pytest.mark.parametrize("other", ["notes.txt", "runs/log.txt"])
def test_notes_beside_a_bundle_are_never_lost(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path, other: str
) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    (bundle / other).parent.mkdir(exist_ok=True)
    (bundle / other).write_text("years of work")
    before = contents(bundle)
    message = refusal(capsys, "export", str(checkpoint), "-o", str(bundle), "--force")
    assert message.startswith(f"{bundle}: holds {other.split('/')[0]} beside the bundle 'bundle'; move that away")
    with pytest.raises(ExportError, match="beside the bundle"):
        check_destination(bundle, force=True)
    assert contents(bundle) == before


def test_listed_name_that_is_a_folder_is_not_the_bundles(tmp_path: Path) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").mkdir()
    with pytest.raises(ExportError, match=r"holds tokenizer\.json beside the bundle"):
        check_destination(bundle, force=True)


def test_bundle_is_replaced_with_force_and_else_refused_by_its_name(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    bundle = copied(recurrent_bundle(), tmp_path)
    before = contents(bundle)
    message = refusal(capsys, "export", str(checkpoint), "-o", str(bundle))
    expected = "holds the bundle 'bundle'; replace it with --force (in Python force=True), or choose another directory"
    assert message == f"{bundle}: {expected}"
    with pytest.raises(ExportError, match="replace it with --force"):
        export(attention_model(), bundle)  # type: ignore[arg-type]
    assert contents(bundle) == before
    assert run(["export", str(checkpoint), "-o", str(bundle), "--force", "--name", "another"]) == 0
    assert Bundle(bundle).manifest.name == "another"
    only(tmp_path, "checkpoint", "bundle")


def test_damaged_manifest_is_not_replaced(tmp_path: Path) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    for text in ("{", "[" * 100_000, "{}", '{"format": 1}', '{"format": 9}', "\udcff"):
        (bundle / "manifest.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ExportError, match="is not one that edgellm reads"):
            check_destination(bundle, force=True)


def test_what_appears_while_a_bundle_is_made_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with whole_directory(tmp_path / "out") as scratch:
            (scratch / "model").write_text("new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes.txt").write_text("put there in the meantime")

    with pytest.raises(ExportError, match=r"holds notes\.txt and is no bundle"):
        write()
    assert contents(tmp_path) == {"out/notes.txt": b"put there in the meantime"}


def test_engines_are_not_rebuilt_over_notes(tmp_path: Path) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    (bundle / "notes.txt").write_text("mine")
    before = contents(bundle)
    with pytest.raises(ExportError, match=r"holds notes\.txt beside the bundle 'bundle'"):
        build_engines(bundle, lambda most: None)
    assert contents(bundle) == before


@pytest.mark.parametrize("name", ["run.json", "loss.png", "best", "data/train.bin", "data/tokenizer.json"])
def test_run_is_not_begun_over_files_of_others(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 500)
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text('{"mine": true}')
    message = refusal(
        capsys, "train", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out"), "--steps", "1", "--context", "16"
    )
    assert message.endswith(f"out holds {name}, which no run wrote and a run would write over; choose another folder")
    assert contents(tmp_path / "out") == {name: b'{"mine": true}'}


def test_predictions_are_not_written_over_examples(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text('{"source": "a", "target": "b"}\n')
    message = refusal(
        capsys,
        "eval",
        str(attention_bundle()),
        "--task",
        "translation",
        "--data",
        str(data),
        "--predictions",
        str(data),
    )
    assert message == f"{data}: holds something else than predictions; name another file with --predictions"
    assert data.read_text() == '{"source": "a", "target": "b"}\n'


@pytest.mark.parametrize("record", ['{"name": "my-demo"}', "[]", "not json"])
def test_demo_does_not_take_another_demo_json_for_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, record: str
) -> None:
    (tmp_path / "demo.json").write_text(record)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").write_text("mine")
    assert run(["demo", "--skip-real", "-o", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert contents(tmp_path) == {"demo.json": record.encode(), "tiny/thesis.txt": b"mine"}


# what killed processes leave


def ended(destination: Path, number: signal.Signals) -> int:
    """The status of a command that was sent a signal while it wrote a bundle there."""
    code = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        import edgellm.cli as cli
        from edgellm_exporters.atomic import whole_directory

        def write(arguments):
            try:
                with whole_directory(Path({str(destination)!r})) as scratch:
                    (scratch / "weights").write_bytes(b"w" * 100_000)
                    print(scratch.name, flush=True)
                    time.sleep(60)
            except KeyboardInterrupt:
                return 130

        cli.run = write
        cli.main()
    """)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f".{destination.name}.edgellm-{process.pid}-")
        process.send_signal(number)
        return process.wait(timeout=60)


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_that_can_be_handled_leaves_no_scratch_folder(tmp_path: Path, number: signal.Signals) -> None:
    assert ended(tmp_path / "out", number) == 130
    only(tmp_path)


@POSIX
def test_next_export_sweeps_what_killed_ones_left_and_nothing_else(tmp_path: Path) -> None:
    for destination in (tmp_path / "out", tmp_path / "other"):
        assert ended(destination, signal.SIGKILL) == -signal.SIGKILL
        (left,) = tmp_path.iterdir()  # the second has swept what the first left
        assert left.name.startswith(f".{destination.name}.edgellm-")
    mine = tmp_path / ".notes.edgellm"
    mine.mkdir()
    (tmp_path / ".out.abcdefgh").mkdir()
    with scratch_directory(tmp_path / "living") as living, whole_directory(tmp_path / "out") as scratch:
        (scratch / "weights").write_text("new")
        only(tmp_path, living.name, scratch.name, mine.name, ".out.abcdefgh")
    only(tmp_path, "out", mine.name, ".out.abcdefgh")


@POSIX
def test_scratch_folder_of_another_living_process_is_not_swept(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        from pathlib import Path
        from edgellm_exporters.atomic import scratch_directory
        with scratch_directory(Path({str(tmp_path / "out")!r})) as scratch:
            print(scratch.name, flush=True)
            input()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        sweep(tmp_path)
        only(tmp_path, name)
        # another container's process has a number that means nothing here: its lock says that it lives
        renamed = tmp_path / name.replace(str(process.pid), str(os.getpid()))
        (tmp_path / name).rename(renamed)
        sweep(tmp_path)
        only(tmp_path, renamed.name)
        process.communicate("\n", timeout=60)
    sweep(tmp_path)
    only(tmp_path)


@POSIX
def test_bundle_that_was_set_aside_by_a_killed_export_gets_its_name_back(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=subprocess.PIPE, check=True)
    aside = tmp_path / f".out.edgellm-{dead.stdout.decode().strip()}-abcdefgh.old"
    shutil.copytree(attention_bundle(), aside)
    with pytest.raises(ExportError, match="holds the bundle 'bundle'"), whole_directory(tmp_path / "out"):
        pass
    only(tmp_path, "out")
    assert Bundle(tmp_path / "out").manifest == Bundle(attention_bundle()).manifest


def test_failed_replacement_keeps_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = copied(attention_bundle(), tmp_path)
    rename = Path.rename

    def fails(self: Path, target: Any) -> Path:
        if Path(target) == bundle and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(KeyboardInterrupt), whole_directory(bundle, force=True):
        pass
    only(tmp_path, "bundle")
    assert Bundle(bundle).manifest == Bundle(attention_bundle()).manifest
