"""Every model, mixer, target and precision: the bundle computes what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from families import CONTEXT, FAMILIES, FURTHER, VOCAB, as_written, cpu_targets, make, planned

from edgellm_exporters.errors import ParityError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.quantize.methods import METHODS
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime import open_session

EXPORTS = [(family, target, method) for family in FAMILIES for target in cpu_targets() for method in METHODS]
EXPORTS += [(f, t, m) for f in FURTHER for t, m in (("onnx", "none"), ("cpu", "int8")) if (f, t, m) not in EXPORTS]


@pytest.mark.parametrize(("family", "target", "method"), EXPORTS)
def test_bundle_equals_pytorch(family: str, target: str, method: str, tmp_path: Path) -> None:
    model = make(family)
    exported = export(model, tmp_path / "b", options=ExportOptions(target=target, quantize=method))
    assert exported.verification.ok
    generator = np.random.default_rng(1)
    windows = [generator.integers(0, VOCAB, n).tolist() for n in (CONTEXT, 17, 2)]
    report = compare(
        model, open_session(exported.bundle, threads=1), windows, greedy_prompts=[windows[1]], greedy_count=24
    )
    failed = [c for c in report.checks(dict(METHODS[method].bounds)) if not c.ok]
    assert not failed
    assert report.first_divergence is None or method != "none"


def test_a_wrong_weight_is_caught_and_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm_exporters.lowering import recurrent

    monkeypatch.setitem(recurrent._GATES, "LSTM", (0, 3, 2, 1))  # two gates changed places
    with pytest.raises(ParityError, match="logits is"):
        export(make("lstm"), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", cpu_targets())
def test_int8_is_smaller_by_what_the_format_promises(target: str, tmp_path: Path) -> None:
    model = make("decoder")
    sizes = {
        m: export(model, tmp_path / m, options=ExportOptions(target=target, quantize=m)).bundle.file("model.onnx.data")
        for m in ("none", "int8")
    }
    ratio = sizes["int8"].stat().st_size / sizes["none"].stat().st_size
    assert ratio < 0.34  # 8.5 of 32 bits a weight, and the rotary tables as they are


@pytest.mark.parametrize("method", [m for m in METHODS if m != "none"])
@torch.no_grad()
def test_the_standard_graph_equals_pytorch_with_the_same_numbers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standard target computes exactly on rounded weights; PyTorch with those weights agrees."""
    monkeypatch.setattr(onnxruntime, "SessionOptions", as_written)
    model = make("mixed")
    exported = export(model, tmp_path / "b", options=ExportOptions(target="onnx", quantize=method))
    rounded = quantized_model(model, planned(model, "onnx", method)[1], integer_products=False)
    window = np.random.default_rng(2).integers(0, VOCAB, 40).tolist()
    report = compare(rounded, open_session(exported.bundle, threads=1), [window])
    assert report.logits < 1e-4
    assert report.kl < 1e-6
    assert report.top1 == 1.0


@pytest.mark.parametrize("family", ["decoder", "decoder untied with biases", "decoder with q/k norm", "attention"])
@torch.no_grad()
def test_integer_products_equal_pytorch_with_the_same_rounding(family: str, tmp_path: Path) -> None:
    """Inputs rounded by rows, on smoothed weights: all that ``w8a8`` rounds in the layers is in the reference."""
    model = make(family)
    exported = export(model, tmp_path / "b", options=ExportOptions(target="cpu", quantize="w8a8"))
    plan = planned(model, "cpu", "w8a8")[1]
    window = np.random.default_rng(2).integers(0, VOCAB, 40).tolist()
    session = open_session(exported.bundle, threads=1)
    with_rounding = compare(quantized_model(model, plan), session, [window])
    without = compare(quantized_model(model, plan, integer_products=False), session, [window])
    assert with_rounding.kl < 0.5 * without.kl  # what is left is the vocabulary's kernel, which rounds what it reads
    assert with_rounding.kl < 1e-3
