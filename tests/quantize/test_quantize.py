"""Quantizers by their numbers: formats, round to nearest, GPTQ, calibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import VOCAB, as_written, cpu_targets, make, planned
from hypothesis import given
from hypothesis import strategies as st

from edgellm.models.protocol import empty_state
from edgellm_exporters.errors import LoweringError, QuantizeError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.graph.lower import clean, lower_to
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.proof.bounds import bounds_with_a_favourite
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.proof.traces import Trace
from edgellm_exporters.quantize import gptq as gptq_module
from edgellm_exporters.quantize.calibrate import MIN_TOKENS, largest_inputs, quantize_in_turn
from edgellm_exporters.quantize.gptq import gptq
from edgellm_exporters.quantize.lossless import TOLERANCE, smallest_holding
from edgellm_exporters.quantize.methods import METHODS
from edgellm_exporters.quantize.plan import Codes, Plan, Scheme, pack
from edgellm_exporters.quantize.planning import Uses, smoothed
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_exporters.quantize.record import recorded
from edgellm_exporters.quantize.refine import refined
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_runtime import open_session

SCHEMES = [Scheme(b, block, symmetric) for b in (2, 4, 8) for block in (16, 64) for symmetric in (True, False)]
SCHEMES += [Scheme(3, block, symmetric=False) for block in (16, 64)]
SHIFTED = [Scheme(b, 32, symmetric=False, shifted=True) for b in (2, 4, 8)]


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
        (Scheme(3, 64, symmetric=False), Scheme(2, 16, symmetric=False)),
        (Scheme(4, 64, symmetric=False), Scheme(3, 16, symmetric=False)),
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
    ("bits", "block", "said"),
    [
        (3, 32, "3-bit block 32: .* as in 3:32:asymmetric"),
        (5, 32, "5-bit weights"),
        (4, 24, "block size 24"),
        (4, 512, "512"),
    ],
)
def test_an_impossible_scheme_is_refused_by_name(bits: int, block: int, said: str) -> None:
    with pytest.raises(QuantizeError, match=said):
        Scheme(bits, block)


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(3, 32, symmetric=False), Scheme(2, 16)], ids=str
)
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


def test_gptq_with_independent_inputs_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """No input tells of another, so no error can be made good: naive reference for the code that propagates it."""
    monkeypatch.setattr(gptq_module, "refined", lambda weight, codes, hessian, scheme: codes)
    w, scheme = weight(), Scheme(4, 32)
    codes, expected = gptq(w, torch.eye(128) * 10, scheme), round_to_nearest(w, scheme)
    np.testing.assert_array_equal(codes.codes, expected.codes)
    np.testing.assert_array_equal(codes.scales, expected.scales)


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(4, 16, symmetric=False), Scheme(3, 32, symmetric=False), Scheme(2, 64)], ids=str
)
def test_refining_lowers_the_error_and_leaves_no_better_single_code(scheme: Scheme) -> None:
    """Every code against every other value it could have, one at a time: a naive reference for the descent."""
    torch.manual_seed(1)
    x = torch.randn(500, 8) @ torch.randn(8, 64) + 0.5 * torch.randn(500, 64)
    hessian, w = (x.T @ x).double(), weight()[:3, :64]

    def error(codes: Codes) -> torch.Tensor:
        e = torch.from_numpy(codes.dequantize() - w).double()
        return ((e @ hessian) * e).sum(-1)  # (rows,)

    start = round_to_nearest(w, scheme)
    once, found = refined(w, start, hessian, scheme, 1), refined(w, start, hessian, scheme, 50)
    assert (error(once) < error(start)).all() and (error(found) <= error(once) * 1.001).all()
    np.testing.assert_array_equal(found.zeros, start.zeros)
    least = error(found)
    for column in range(64):
        for code in range(scheme.top + 1):
            other = dataclasses.replace(found, codes=found.codes.copy())
            other.codes[:, column] = code
            assert (error(other) >= least * 0.999).all()


def test_the_range_of_inputs_is_what_layers_read() -> None:
    model = make("decoder")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 32)).tolist()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(f"{name}.weight", x[0]))
    found = largest_inputs(model, tokens)
    with torch.no_grad():
        model(torch.tensor(tokens))
    for name in ("layers.0.attention.k_proj.weight", "layers.1.mlp.down_proj.weight"):
        np.testing.assert_array_equal(found[name], seen[name].abs().flatten(0, 1).amax(0).numpy())


def test_gptq_in_turn_sees_inputs_as_they_were_quantized_and_leaves_the_model_as_it_was() -> None:
    """A naive reference: quantize the first layer, run again, take the second one's inputs from that."""
    model = make("decoder")
    windows = np.random.default_rng(0).integers(0, VOCAB, (8, 32)).tolist()
    names, scheme = [f"layers.{i}.mlp.down_proj.weight" for i in (0, 1)], Scheme(4, 32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = quantize_in_turn(model, windows, dict.fromkeys(names, scheme), {}, {})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    inputs: list[torch.Tensor] = []
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in names]
    for name, layer in zip(names, layers, strict=True):
        handle = layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
        with torch.no_grad():
            model(torch.tensor(windows))
            handle.remove()
            codes = gptq(layer.weight.numpy(), inputs[-1].T @ inputs[-1], scheme)
            layer.weight.copy_(torch.from_numpy(codes.dequantize()))
        np.testing.assert_array_equal(found[name].codes, codes.codes)


def test_gptq_of_a_block_that_is_run_at_several_places_weighs_the_inputs_of_all() -> None:
    model = make("state space and shared attention")
    windows = np.random.default_rng(0).integers(0, VOCAB, (8, 32)).tolist()
    name, scheme = "layers.3.shared.out_proj.weight", Scheme(4, 32)
    block = model.get_submodule(name.removesuffix(".weight"))
    calls: list[torch.Tensor] = []
    with block.register_forward_pre_hook(lambda _, x: calls.append(x[0].flatten(0, 1))), torch.no_grad():
        model(torch.tensor(windows))
    assert len(calls) == 2
    products = [x.T @ x for x in calls]
    found = quantize_in_turn(model, windows, {name: scheme}, {}, {})[name]
    np.testing.assert_array_equal(found.codes, gptq(block.weight.detach().numpy(), sum(products), scheme).codes)

    def error(codes: Codes) -> float:
        wrong = block.weight.detach() - torch.from_numpy(codes.dequantize())
        return sum(float((x @ wrong.T).square().sum()) for x in calls)

    assert error(found) < 0.9 * error(gptq(block.weight.detach().numpy(), products[0], scheme))


def test_gptq_of_a_block_that_is_run_at_several_places_leaves_it_as_it_was_and_counts_smoothing() -> None:
    """Factors of columns that are powers of two change the numbers of a weight, and no code."""
    model = make("state space and shared attention")
    windows = np.random.default_rng(0).integers(0, VOCAB, (8, 32)).tolist()
    name, scheme = "layers.3.shared.out_proj.weight", Scheme(4, 32)
    before = {n: p.clone() for n, p in model.named_parameters(remove_duplicate=False)}
    factors = np.full(model.get_parameter(name).shape[1], 4.0, dtype=np.float32)
    plain, smoothed_too = (quantize_in_turn(model, windows, {name: scheme}, c, {})[name] for c in ({}, {name: factors}))
    np.testing.assert_array_equal(plain.codes, smoothed_too.codes)
    np.testing.assert_array_equal(4 * plain.scales, smoothed_too.scales)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters(remove_duplicate=False))


def test_smoothing_changes_no_number_of_the_float_graph_and_evens_out_the_inputs(tmp_path: Path) -> None:
    from edgellm_exporters.graph.write import write_graph

    model = make("decoder untied with biases")
    with torch.no_grad():
        model.layers[0].attention_norm.weight[3] = 50.0  # one loud channel, as real models have
        model.layers[0].mlp.up_proj.weight[5] *= 40
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 32))
    seen = largest_inputs(model, tokens.tolist())
    logits = []
    for wanted in (False, True):
        graph, plan = planned(model, "cpu", "none")
        if wanted:
            done = smoothed(graph, seen)
            assert len(done.columns) == 6  # qkv, gate+up and down of both layers
            assert len(done.rows) == 2
        folder = tmp_path / str(wanted)
        folder.mkdir()
        write_graph(lower_to(graph, TARGETS["cpu"], plan), folder, lambda what, share: None)
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        logits.append(session.run(["logits"], feeds(model, tokens))[0])
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def feeds(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    batch, time = tokens.shape
    state = {f"past.{k}": v.numpy() for k, v in empty_state(model, batch, time).items()}
    every = np.tile(np.arange(time), (batch, 1))
    lengths = np.full(batch, time, np.int32)
    return {"tokens": tokens, "past_lengths": lengths * 0, "lengths": lengths, "logit_positions": every, **state}


def test_int8_needs_smoothing_where_a_channel_is_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    model = make("decoder")
    with torch.no_grad():
        for layer in model.layers:
            layer.mlp_norm.weight[3] = 60.0
            layer.mlp.gate_proj.weight[:, 3] /= 60
            layer.mlp.up_proj.weight[:, 3] /= 60
    kl = {}
    for smooth in (True, False):
        method = dataclasses.replace(METHODS["w8a8"], smooth=smooth, bounds={"kl": 100.0})
        monkeypatch.setitem(METHODS, "trial", method)  # type: ignore[arg-type]
        kl[smooth] = export(model, tmp_path / str(smooth), options=ExportOptions(quantize="trial")).parity.kl
    assert kl[True] < 0.3 * kl[False]


@pytest.mark.parametrize(("stored", "exact"), [("Q4_0", True), ("Q8_0", True), ("Q4_1", False)])
def test_keeping_holds_what_gguf_rounded(stored: str, exact: bool) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[stored]
    w = dequantize(quantize(weight(64, 256), kind), kind).astype(np.float32)
    found = smallest_holding({"w": ir.tensor(w)}, set(), lambda share: None)["w"]
    assert (found.bits, found.block, found.shifted) == (int(stored[1]), 32, stored == "Q4_1")
    error = np.abs(round_to_nearest(w, found).dequantize() - w).max()
    second = np.abs(round_to_nearest(w, Scheme(found.bits, 32, symmetric=False)).dequantize() - w).max()
    assert error == 0 if exact else error < 0.1 * second  # of rounding to a whole zero, a second time


@pytest.mark.parametrize(("stored", "bits"), [("Q4_0", 16), ("Q8_0", 8), ("Q4_1", 8)])
def test_keeping_with_scales_of_8_bits_takes_fewer_bytes_where_that_holds_what_gguf_rounded(
    stored: str, bits: int
) -> None:
    """Q4_0's scales have a sign, for which 8 bits have no room."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[stored]
    w = dequantize(quantize(weight(64, 256), kind), kind).astype(np.float32)
    wide, narrow = (smallest_holding({"w": ir.tensor(w)}, set(), lambda share: None, narrow=n)["w"] for n in ("", "w"))
    assert narrow == dataclasses.replace(wide, scale_bits=bits)
    error = round_to_nearest(w, narrow).dequantize() - w
    assert np.square(error).mean() <= TOLERANCE**2 * np.square(w).mean()


def test_keeping_free_weights_takes_eight_bits() -> None:
    assert smallest_holding({"w": ir.tensor(weight())}, set(), lambda share: None)["w"].bits == 8


@pytest.mark.parametrize("scheme", SHIFTED, ids=str)
def test_shifts_reach_values_that_no_whole_zero_can(scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, scheme.top + 1, (8, 4, 32))
    codes[..., 0], codes[..., 1] = 0, scheme.top
    w = (codes * 0.01 + rng.uniform(-0.5, 0.1, (8, 4, 1)) * 0.01 * scheme.top).astype(np.float32).reshape(8, 128)
    found = round_to_nearest(w, scheme).dequantize()
    plain = round_to_nearest(w, Scheme(scheme.bits, 32, symmetric=False)).dequantize()
    assert np.square(found - w).mean() < 0.3 * np.square(plain - w).mean()


def test_calibration_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=f"has 64 tokens, and needs {MIN_TOKENS}"):
        export(make("decoder"), tmp_path / "b", options=ExportOptions(quantize="int4", calibration=[[1] * 64]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", cpu_targets())
def test_a_calibrated_bundle_is_nearer_than_a_rounded_one(target: str, tmp_path: Path) -> None:
    model = make("attention")
    windows = np.random.default_rng(0).integers(0, VOCAB, (MIN_TOKENS // 32, 32)).tolist()
    kl = {}
    for name, calibration in (("rounded", []), ("calibrated", windows)):
        options = ExportOptions(target=target, quantize="int4", calibration=calibration)
        kl[name] = export(model, tmp_path / name, options=options).parity.kl
    assert kl["calibrated"] < kl["rounded"]


@pytest.mark.parametrize(
    ("method", "rounding"), [("int8", "round to nearest"), ("keep", "round to nearest"), ("3:32:asymmetric", "GPTQ")]
)
def test_gptq_is_said_of_a_bundle_only_where_it_chose_codes(method: str, rounding: str) -> None:
    windows = np.random.default_rng(0).integers(0, VOCAB, (MIN_TOKENS // 32, 32)).tolist()
    plan = planned(make("decoder"), "cpu", method, windows)[1]
    assert recorded(plan, method)["rounding"] == rounding


FORMATS = [f"{bits}:32{kind}" for bits in (2, 4, 8) for kind in ("", ":asymmetric", ":shifted")]
FORMATS += ["3:32:asymmetric", "3:32:asymmetric:scales8", "8:row", "8:32:scales8", "2:32:asymmetric:scales8"]
FORMATS += ["4:32:shifted:scales8", "keep:scales8"]


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("family", ["decoder", "mixed"])
@pytest.mark.parametrize("target", cpu_targets())
def test_every_format_that_a_target_has_computes_what_it_stores(
    target: str, family: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against PyTorch with the very numbers that the codes stand for."""
    if target == "onnx":  # ONNX Runtime turns some of these into kernels that round activations; the graph does not
        monkeypatch.setattr(onnxruntime, "SessionOptions", as_written)
    model = make(family)
    loose = {"kl": 100.0, "split": 100.0, "batch": 100.0, "top1": 0.0, "state": 100.0}
    options = ExportOptions(target=target, quantize=method, bounds=loose)
    if target == "onnx" and method.startswith("2:"):
        with pytest.raises(LoweringError, match="no 2-bit type"):
            export(model, tmp_path / "b", options=options)
        return
    exported = export(model, tmp_path / "b", options=options)
    graph, plan = planned(model, target, method)
    assert len(plan.schemes.keys() - Uses(graph).ends) > 3
    rounded = quantized_model(model, plan, integer_products=target == "cpu")
    window = np.random.default_rng(2).integers(0, VOCAB, 40).tolist()
    report = compare(rounded, open_session(exported.bundle, threads=1), [window])
    assert report.kl < (1e-6 if target == "onnx" else 2e-3)  # the cpu kernels also round activations to 8 bits


@pytest.mark.parametrize(
    ("method", "said"),
    [("int5", "unknown quantization .int5.; there are none, int8"), ("3:32", "as in 3:32:asymmetric"),
     ("4:48", "size 48"), ("4:row", "for symmetric 8-bit"), ("4:32:wide", "BITS:BLOCK")],
)  # fmt: skip
def test_an_unknown_quantization_is_refused_before_any_work(method: str, said: str) -> None:
    with pytest.raises(QuantizeError, match=said):
        ExportOptions(quantize=method)


def test_rows_that_divide_into_no_block_stay_float_and_are_named() -> None:
    plan = planned(make("decoder"), "cpu", "4:64")[1]
    assert plan.floats["layers.1.mlp.down_proj.weight"] == (96, 160)
    assert "layers.1.mlp.down_proj.weight" not in plan.schemes
    assert plan.schemes["layers.1.attention.o_proj.weight"] == Scheme(4, 64)  # of 128 weights
    fitted = planned(make("decoder"), "cpu", "int4")[1]
    assert fitted.schemes["layers.0.mlp.down_proj.weight"].block == 32
    assert not fitted.floats


def compute(graph: ir.Model) -> None:
    for value in graph.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.numpy()


def test_nan_weights_and_blocks_that_do_not_divide_are_named() -> None:
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


def test_the_top_token_is_held_only_where_the_model_prefers_one() -> None:
    flat = Trace([1, 2], torch.zeros(2, 50_000), {})
    sure = Trace([1, 2], torch.zeros(2, 50_000).index_fill(1, torch.tensor([7]), 20.0), {})
    bounds = {"kl": 0.6, "top1": 0.5}
    assert bounds_with_a_favourite(bounds, [sure, flat]) == bounds
    assert bounds_with_a_favourite(bounds, [flat, flat]) == {"kl": 0.6}
