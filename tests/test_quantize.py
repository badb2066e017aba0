"""Quantizers by their numbers: formats, round to nearest, GPTQ, calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families import VOCAB, make
from hypothesis import given
from hypothesis import strategies as st

from edgellm_exporters.errors import LoweringError, QuantizeError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.lower import clean, lower_to
from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.quantize.calibrate import MIN_TOKENS, calibrate
from edgellm_exporters.quantize.gptq import gptq
from edgellm_exporters.quantize.methods import METHODS, Method
from edgellm_exporters.quantize.plan import Codes, Plan, Scheme, pack
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_exporters.targets import TARGETS

SCHEMES = [Scheme(b, block, symmetric) for b in (2, 4, 8) for block in (16, 64) for symmetric in (True, False)]


def weight(rows: int = 24, columns: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.05


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_is_further_from_its_code_than_the_plain_grid_allows(scheme: Scheme) -> None:
    w = weight()
    codes = round_to_nearest(w, scheme)
    assert codes.codes.max() <= scheme.top
    assert (codes.scales == codes.scales.astype(np.float16)).all()
    if scheme.symmetric:
        assert (codes.zeros == scheme.middle).all()
    blocks = w.reshape(len(w), -1, scheme.block)
    reach = blocks.max(-1) - blocks.min(-1) if not scheme.symmetric else 2 * np.abs(blocks).max(-1)
    plain = (reach / (scheme.top - (scheme.bits == 8)))[:, :, None]  # one step of the full range
    error = (codes.dequantize() - w).reshape(blocks.shape)
    assert (error**2).mean() <= (plain**2).mean() / 12 * 1.1  # a uniform error within a step, or better by the search


def test_more_bits_and_smaller_blocks_are_nearer() -> None:
    w = weight()
    error = {s: float(((round_to_nearest(w, s).dequantize() - w) ** 2).mean()) for s in SCHEMES}
    for small, large in (
        (Scheme(4, 16), Scheme(2, 16)),
        (Scheme(8, 16), Scheme(4, 16)),
        (Scheme(4, 16), Scheme(4, 64)),
    ):
        assert error[small] < error[large]


@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 3), columns=st.integers(1, 19), seed=st.integers(0, 99))
def test_packing_keeps_every_code_in_its_place(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    packed, each = pack(codes, bits), 8 // bits
    for row in range(rows):
        for column in range(columns):
            byte = int(packed[row, column // each])
            assert (byte >> (bits * (column % each))) & (2**bits - 1) == codes[row, column]


def test_a_block_of_zeros_and_an_extreme_block_stay_finite() -> None:
    w = weight()
    w[0, :64], w[1, :64] = 0, 1e-9
    for scheme in SCHEMES:
        found = round_to_nearest(w, scheme).dequantize()
        assert np.isfinite(found).all()
        assert (found[0, :16] == 0).all()


@pytest.mark.parametrize(
    ("bits", "block", "said"), [(3, 32, "3-bit weights are not supported"), (4, 24, "block size 24"), (4, 512, "512")]
)
def test_an_impossible_scheme_is_refused_by_name(bits: int, block: int, said: str) -> None:
    with pytest.raises(QuantizeError, match=said):
        Scheme(bits, block)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(2, 16)], ids=str)
def test_gptq_changes_products_less_than_rounding(scheme: Scheme) -> None:
    """The criterion that the method minimises, measured on other inputs of the same distribution."""
    torch.manual_seed(0)
    mixing = torch.randn(24, 128)  # few causes for many features: inputs that tell of each other, as in a model
    seen, unseen = (torch.randn(4000, 24) @ mixing + 0.3 * torch.randn(4000, 128) for _ in range(2))
    w = weight()
    chosen = gptq(w, seen.T @ seen, scheme)

    def change(codes: Codes) -> float:
        return float((unseen @ torch.from_numpy(codes.dequantize() - w).T).square().mean())

    assert change(chosen) < 0.7 * change(round_to_nearest(w, scheme))


def test_gptq_with_independent_inputs_is_rounding() -> None:
    """No input tells of another, so no error can be made good: naive reference for the code that propagates it."""
    w, scheme = weight(), Scheme(4, 32)
    codes, expected = gptq(w, torch.eye(128) * 10, scheme), round_to_nearest(w, scheme)
    np.testing.assert_array_equal(codes.codes, expected.codes)
    np.testing.assert_array_equal(codes.scales, expected.scales)


def test_calibration_gathers_what_layers_read_and_shares_it_between_tied_weights() -> None:
    model = make("decoder")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (MIN_TOKENS // 32, 32)).tolist()
    found = calibrate(model, tokens)
    names = parts_of("layers.0.attention.q_proj+k_proj+v_proj.weight")
    assert names == [f"layers.0.attention.{n}_proj.weight" for n in "qkv"]
    hessian = found.find(names)
    assert hessian is not None
    assert torch.equal(hessian, hessian.T)
    embedding, head = found.find(["embedding.weight"]), found.find(["head.weight"])
    assert embedding is head
    assert embedding is not None
    assert found.find(["norm.weight"]) is None


def test_calibration_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=f"has 64 tokens, and needs {MIN_TOKENS}"):
        export(make("decoder"), tmp_path / "b", options=ExportOptions(quantize="int4", calibration=[[1] * 64]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_calibrated_bundle_is_nearer_than_a_rounded_one(target: str, tmp_path: Path) -> None:
    model = make("attention")
    windows = np.random.default_rng(0).integers(0, VOCAB, (MIN_TOKENS // 32, 32)).tolist()
    kl = {}
    for name, calibration in (("rounded", []), ("calibrated", windows)):
        options = ExportOptions(target=target, quantize="int4", calibration=calibration)
        kl[name] = export(model, tmp_path / name, options=options).parity.kl
    assert kl["calibrated"] < kl["rounded"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_every_format_that_a_target_has_computes_what_it_stores(
    target: str, bits: int, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PyTorch with the very weights that the codes stand for."""
    from edgellm_exporters.parity import compare
    from edgellm_exporters.quantize.reference import round_weights
    from edgellm_runtime import open_session

    ends = Scheme(max(bits, 4), 32, symmetric)  # no kernel looks up 2-bit rows
    loose = {"kl": 100.0, "split": 100.0, "batch": 100.0}
    monkeypatch.setitem(METHODS, "trial", Method("", Scheme(bits, 32, symmetric), ends, loose))  # type: ignore[arg-type]
    model = make("decoder")
    options = ExportOptions(target=target, quantize="trial")
    if target == "onnx" and bits == 2:
        with pytest.raises(LoweringError, match="no 2-bit type"):
            export(model, tmp_path / "b", options=options)
        return
    exported = export(model, tmp_path / "b", options=options)
    rounded = round_weights(model, "trial", VOCAB)
    window = np.random.default_rng(2).integers(0, VOCAB, 40).tolist()
    report = compare(rounded, open_session(exported.bundle, threads=1), [window])
    assert report.kl < (1e-6 if target == "onnx" else 2e-3)  # the cpu kernels also round activations to 8 bits


def compute(graph: ir.Model) -> None:
    for value in graph.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()


def test_nan_weights_and_blocks_that_do_not_divide_are_named() -> None:
    from edgellm_exporters.capture import capture

    for scheme, spoil, said in ((Scheme(8, 64), False, "do not divide"), (Scheme(8, 32), True, "NaN")):
        graph = capture(make("decoder"))
        clean(graph)
        name = "layers.0.mlp.down_proj.weight"  # rows of 160
        if spoil:
            tensor = graph.graph.initializers[name].const_value
            assert tensor is not None
            tensor.numpy()[0, 0] = np.nan
        plan = Plan({name: scheme}, lambda name, w, scheme: round_to_nearest(w, scheme))
        with pytest.raises(QuantizeError, match=f"{name}.*{said}"):
            compute(lower_to(graph, TARGETS["onnx"], plan))
