"""A bundle's receipt: measured once, and measured again by anyone who has the text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import Numbers
from tiny_bundles import CONTEXT, attention_model, text_assets
from tiny_files import copied, edit_manifest

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import open_session
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.evaluate import mean_interval
from edgellm_runtime.checks.receipt import differences_from
from edgellm_runtime.checks.verify import verify

Call = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def evaluate(*arguments: object) -> tuple[int, dict[str, Any]]:
        status = run(["eval", *map(str, arguments), "--json"])
        out = capsys.readouterr().out
        return status, json.loads(out) if out else {}

    return evaluate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its bundle with a receipt, and the text."""
    folder, model = tmp_path_factory.mktemp("receipt"), attention_model()
    save_checkpoint(folder / "c", model, architecture="decoder", tokenizer_json=text_assets().tokenizer_json)
    export(model, folder / "b", options=ExportOptions(quantize="int4"), text=text_assets())
    (folder / "text.txt").write_text("the user said hello to the assistant and the world. " * 20)
    status = run(["eval", str(folder / "b"), "--text", str(folder / "text.txt"), "--against", str(folder / "c"),
                  "--tokens", "200", "--window", "40", "--write-receipt", "--json"])  # fmt: skip
    assert status == 0
    return folder


def test_the_receipt_is_in_the_bundle_which_stays_what_it_was(made: Path) -> None:
    bundle = Bundle(made / "b")
    receipt = bundle.manifest.receipt
    figures = receipt["figures"]
    assert figures["kl_low"] < figures["kl_mean"] < figures["kl_high"]
    assert receipt["text"]["name"] == "text.txt"
    assert receipt["made_with"]["onnxruntime"]
    assert str(made) not in json.dumps(receipt)
    assert verify(bundle, open_session(bundle)).ok


def test_it_is_measured_again_with_and_without_the_checkpoint(made: Path, call: Call) -> None:
    status, found = call(made / "b", "--receipt", "--text", made / "text.txt")
    assert (status, found["holds"]) == (0, True)
    assert "kl_mean" not in found["found"]
    status, found = call(made / "b", "--receipt", "--text", made / "text.txt", "--against", made / "c")
    assert (status, found["apart"]) == (0, [])
    assert found["found"]["kl_mean"] == pytest.approx(found["receipt"]["kl_mean"], rel=0.02)


@pytest.fixture(scope="module")
def exported(made: Path) -> Path:
    """Another bundle, calibrated, that got its receipt as it was exported."""
    (made / "long.txt").write_text("the user said hello to the world and the assistant said hello to the user. " * 900)
    status = run(["export", str(made / "c"), "-o", str(made / "e"), "--quantize", "int4", "--calibrate",
                  str(made / "long.txt"), "--json"])  # fmt: skip
    assert status == 0
    return made


def test_an_export_that_has_a_text_writes_the_receipt(exported: Path) -> None:
    receipt = Bundle(exported / "e").manifest.receipt
    asked, figures = receipt["asked"], receipt["figures"]
    assert asked["tokens"] == 1024
    assert asked["skip"] == 8192 - 8192 % CONTEXT  # what it was calibrated with is not judged on
    assert "calibrated" not in receipt["text"]
    assert figures["kl_low"] < figures["kl_mean"] < figures["kl_high"]
    assert figures["tokens"] >= 1024 - CONTEXT
    assert str(exported) not in json.dumps(receipt)


def test_a_stranger_reproduces_it_elsewhere_with_other_settings(exported: Path, tmp_path: Path) -> None:
    for name in ("e", "c"):
        shutil.copytree(exported / name, tmp_path / f"given {name}")
    shutil.copy(exported / "long.txt", tmp_path / "another name.txt")
    command = [sys.executable, "-m", "edgellm", "eval", "given e", "--receipt", "--text", "another name.txt",
               "--against", "given c", "--threads", "2", "--json"]  # fmt: skip
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "2",
        "LANG": "de_DE.UTF-8",
        "TZ": "Asia/Tokyo",
    }
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    found = json.loads(ended.stdout)
    assert (ended.returncode, found["apart"]) == (0, []), ended.stderr
    assert found["found"]["kl_mean"] == pytest.approx(found["receipt"]["kl_mean"], rel=0.02)


def test_a_text_of_its_own_and_no_receipt_at_all(made: Path, tmp_path: Path) -> None:
    call = ["export", str(made / "c"), "--json", "--quantize", "int8", "-o"]
    assert run([*call, str(tmp_path / "a"), "--text", str(made / "text.txt")]) == 0
    receipt = Bundle(tmp_path / "a").manifest.receipt
    assert (receipt["text"]["name"], receipt["asked"]["skip"]) == ("text.txt", 0)
    (tmp_path / "short.txt").write_text("the user said hello to the assistant and the world. " * 250)
    short = ["--calibrate", str(tmp_path / "short.txt")]  # all of it is calibrated with
    assert run([*call, str(tmp_path / "b"), *short]) == 0
    assert Bundle(tmp_path / "b").manifest.receipt["text"]["calibrated"]
    assert run([*call, str(tmp_path / "d"), *short, "--no-receipt"]) == 0
    assert Bundle(tmp_path / "d").manifest.receipt == {}
    assert run([*call, str(tmp_path / "f"), "--text", str(made / "text.txt"), "--no-receipt"]) == 2


def test_what_reads_no_text_has_no_receipt(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", attention_model(), architecture="decoder", tokenizer_json=None)
    (tmp_path / "text.txt").write_text("hello world")
    export_call = ["export", str(tmp_path / "c"), "-o", str(tmp_path / "b"), "--text", str(tmp_path / "text.txt")]
    assert run(export_call) == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"figures": {"perplexity": "many"}},
        {"asked": {"tokens": -1, "window": 5}},
        {"asked": []},
        {"text": {}},
        {"figures": []},
    ],
)
def test_a_receipt_that_is_none_cannot_tell(made: Path, tmp_path: Path, call: Call, wrong: dict[str, Any]) -> None:
    bundle = copied(made / "b", tmp_path)
    edit_manifest(bundle, receipt={**Bundle(made / "b").manifest.receipt, **wrong})
    assert call(bundle, "--receipt", "--text", made / "text.txt") == (2, {})


def test_another_model_does_not_reproduce_it_and_what_differs_is_said(made: Path, tmp_path: Path, call: Call) -> None:
    numbers = Numbers(copied(made / "b", tmp_path))
    gain = numbers.names(lambda n, shape: "norm" in n and len(shape) == 1)[0]
    numbers.put(gain, numbers.get(gain) * 3)
    numbers.write()
    receipt = Bundle(tmp_path / "bundle").manifest.receipt
    edit_manifest(tmp_path / "bundle", receipt={**receipt, "made_with": {**receipt["made_with"], "torch": "1.0"}})
    status, found = call(tmp_path / "bundle", "--receipt", "--text", made / "text.txt")
    assert (status, found["apart"]) == (1, ["perplexity"])
    assert any(line.startswith("torch: 1.0 there") for line in found["differs"])


def test_another_text_or_no_receipt_cannot_tell(made: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "other.txt").write_text("another text")
    assert call(made / "b", "--receipt", "--text", tmp_path / "other.txt") == (2, {})
    edit_manifest(copied(made / "b", tmp_path), receipt={})
    assert call(tmp_path / "bundle", "--receipt", "--text", made / "text.txt") == (2, {})


def test_figures_are_held_to_two_percent() -> None:
    assert differences_from({"perplexity": 100.0, "kl_mean": 1e-9}, {"perplexity": 101.9, "kl_mean": 1.5e-8}) == []
    assert differences_from({"perplexity": 100.0}, {"perplexity": 102.1}) == ["perplexity"]
    assert differences_from({"top1_agreement": 0.5}, {"top1_agreement": float("nan")}) == ["top1_agreement"]


def test_an_interval_holds_the_mean_and_narrows_with_the_tokens() -> None:
    draw = np.random.default_rng(1)
    hits, widths = 0, []
    for count in (400, 6400):
        found = [mean_interval(draw.exponential(size=count), draws=400) for _ in range(100)]
        hits += sum(low <= 1 <= high for low, high in found)
        widths.append(np.mean([high - low for low, high in found]))
    assert hits > 2 * 100 * 0.85
    assert 3 < widths[0] / widths[1] < 5
