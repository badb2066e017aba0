"""edgellm diff: the first layer and step at which a bundle parts from its checkpoint or from another bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from families import make
from mutations import Numbers
from tiny_files import copied, sign

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime.checks.divergence import Limits, diverge
from edgellm_runtime.checks.heat_map import heat_map
from edgellm_runtime.errors import OptionError

Report = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a mixed model, and bundles of it."""
    folder, model = tmp_path_factory.mktemp("diff"), make("mixed")
    save_checkpoint(folder / "checkpoint", model, architecture="hybrid", tokenizer_json=None)
    for method in ("none", "int8", "int4"):
        export(model, folder / method, options=ExportOptions(quantize=method))
    export(make("decoder"), folder / "other")
    return folder


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    def call(*arguments: object) -> tuple[int, dict[str, Any]]:
        status = run(["diff", *map(str, arguments), "--json"])
        out = capsys.readouterr().out
        return status, json.loads(out) if out else {}

    return call


def spoiled(source: Path, folder: Path, layer: int) -> Path:
    numbers = Numbers(copied(source, folder))
    gain = numbers.names(lambda n, shape: n.startswith(f"blocks.{layer}.") and "norm" in n)[0]
    numbers.put(gain, numbers.get(gain) * 2)
    numbers.write()
    return folder / "bundle"


@pytest.mark.parametrize(("method", "verdicts"), [("none", {"exact", "rounding"}), ("int4", {"quantization"})])
def test_a_bundle_is_as_far_from_its_checkpoint_as_its_format_makes_it(
    method: str, verdicts: set[str], sources: Path, report: Report
) -> None:
    status, found = report(sources / method, "--against", sources / "checkpoint")
    assert status == 0
    assert {row["verdict"] for row in found["layers"]} <= verdicts
    assert [row["name"] for row in found["layers"]] == [*(f"blocks.{i}" for i in range(5)), "logits"]
    assert set(found["state"]) == {"blocks.0.h", "blocks.0.c", "blocks.1.k", "blocks.1.v", "blocks.2.h", "blocks.3.k",
                                   "blocks.3.v", "blocks.4.h"}  # fmt: skip


@pytest.mark.parametrize("method", ["none", "int8", "int4"])
@pytest.mark.parametrize("layer", [0, 3])
def test_the_layer_that_was_spoiled_is_named(
    method: str, layer: int, sources: Path, report: Report, tmp_path: Path
) -> None:
    status, found = report(spoiled(sources / method, tmp_path, layer), "--against", sources / method)
    assert status == 1
    assert found["wrong"] == found["parts"] == f"blocks.{layer}"
    assert found["step"] == 0
    assert all(row["verdict"] == "exact" for row in found["layers"][:layer])


def test_formats_of_one_model_differ_by_quantization(sources: Path, report: Report) -> None:
    status, found = report(sources / "int4", "--against", sources / "none")
    assert status == 0
    assert {row["verdict"] for row in found["layers"]} == {"quantization"}


def test_a_spoiled_layer_shows_beside_the_checkpoint_too(sources: Path, report: Report, tmp_path: Path) -> None:
    status, found = report(spoiled(sources / "int8", tmp_path, 2), "--against", sources / "checkpoint")
    assert status == 1
    assert found["wrong"] == "blocks.2"


def spoiled_engine(source: Path, folder: Path, layer: int) -> Path:
    """A layer's first norm is doubled in the graphs of both roles."""
    bundle = copied(source, folder)
    for name in ("prefill.onnx", "decode.onnx"):
        model = onnx.load(bundle / name, load_external_data=False)
        gain = next(i for i in model.graph.initializer if i.name.startswith(f"blocks.{layer}.") and "norm" in i.name)
        gain.raw_data = (2 * np.frombuffer(gain.raw_data, np.float16)).astype(np.float16).tobytes()
        assert gain.raw_data
        (bundle / name).write_bytes(model.SerializeToString())
        sign(bundle, name)
    return bundle


def test_engines_are_compared_by_the_graphs_that_they_are_built_from(
    sources: Path, report: Report, tmp_path: Path
) -> None:
    engine = EngineOptions(build=False, max_context=48)
    options = ExportOptions(target="tensorrt", dtype="float16", engine=engine)
    export(make("mixed"), tmp_path / "engines", options=options)
    layers = [f"blocks.{number}" for number in range(5)]
    for other in ("checkpoint", "none"):
        status, found = report(tmp_path / "engines", "--against", sources / other)
        assert status == 0
        assert [row["name"] for row in found["layers"]] == [*layers, "logits"]
    (tmp_path / "spoiled").mkdir()
    spoiled = spoiled_engine(tmp_path / "engines", tmp_path / "spoiled", 3)
    status, found = report(spoiled, "--against", tmp_path / "engines")
    assert (status, found["wrong"], found["parts"]) == (1, "blocks.3", "blocks.3")
    status, found = report(spoiled, "--against", sources / "checkpoint")
    assert (status, found["wrong"]) == (1, "blocks.3")


def test_engines_cannot_be_compared_without_a_gpu(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ExportOptions(target="tensorrt", dtype="float16", engine=EngineOptions(build=False, max_context=48))
    export(make("decoder"), tmp_path / "engines", options=options)
    for bundle, said in ((tmp_path / "engines", ""), (sources / "none", "which has no engines")):
        assert run(["diff", str(bundle), "--engines", "--json"]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert "Cannot tell: " in told.err
        assert said in told.err
        assert "Traceback" not in told.err
    assert run(["diff", str(sources / "none")]) == 2
    assert "--engines" in capsys.readouterr().err


def test_what_cannot_be_compared_is_neither_right_nor_wrong(sources: Path, report: Report) -> None:
    assert report(sources / "none", "--against", sources / "other") == (2, {})


def test_page_and_picture_are_written_and_the_page_needs_nothing_else(sources: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "map.html", tmp_path / "map.png"
    assert run(["diff", str(sources / "int8"), "--against", str(sources / "none"), "--html", str(page),
                "--png", str(picture)]) == 0  # fmt: skip
    text = page.read_text()
    assert "src=" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert text.count("<rect") > 6 * 48  # a cell for each layer and step
    assert picture.read_bytes().startswith(b"\x89PNG")


def reading(scale: float, row_off: int = -1) -> Any:
    def read(row: np.ndarray) -> tuple[Any, Any, Any]:
        x = np.outer(np.arange(1, len(row) + 1), np.ones(4)).astype(np.float32)
        x[row_off:][:1] *= scale
        return x, {"a": np.ones((len(row), 4), np.float32), "b": x}, {"s": x}

    return read


def test_the_first_step_is_counted_over_all_rows_and_no_number_passes_unseen() -> None:
    limits = {"a": Limits(1e-4), "b": Limits(1e-4, 0.5), "logits": Limits(1e-4)}
    found = diverge(reading(1.5), reading(1.0), [[1, 2, 3], [4, 5, 6]], limits)
    assert [row.verdict for row in found.layers] == ["exact", "quantization", "wrong"]
    assert found.first is not None
    assert (found.first.name, found.first.first_step) == ("b", 2)
    assert found.layers[1].norm_ratio == pytest.approx(1.5)
    lost = diverge(reading(float("nan")), reading(1.0), [[1, 2]], limits)
    assert lost.layers[2].verdict == "wrong"
    assert "<svg" in heat_map(lost, "a <b>")


def test_shapes_that_differ_are_no_versions_of_one_model() -> None:
    def other(row: np.ndarray) -> tuple[Any, Any, Any]:
        return np.ones((len(row), 4)), {"a": np.ones((len(row), 5))}, {}

    with pytest.raises(OptionError, match="versions of one model"):
        diverge(reading(1.0), other, [[1, 2]], {"a": Limits(1e-4)})
