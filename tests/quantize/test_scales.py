"""Scales of 8 bits: what they can be, how they lie in a file, and what they cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import VOCAB, make, planned
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_quantize import feeds

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.graph.lower import lower_to
from edgellm_exporters.graph.targets import TARGETS
from edgellm_exporters.graph.write import write_graph
from edgellm_exporters.quantize.gptq import gptq
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.plan import ROW, Codes, Scheme
from edgellm_exporters.quantize.planning import Uses
from edgellm_exporters.quantize.rtn import round_to_nearest
from edgellm_exporters.quantize.scales import in_bytes, stored_scales, units_of
from edgellm_runtime.graphs.narrow_scales import LEAST_POWER, POWERS

EIGHT = [
    Scheme(4, 32, symmetric=False, scale_bits=8), Scheme(4, 32, symmetric=False, shifted=True, scale_bits=8),
    Scheme(2, 64, symmetric=False, scale_bits=8), Scheme(8, 32, scale_bits=8),
    Scheme(4, 32, positive=True, scale_bits=8),
]  # fmt: skip
SIZES = st.floats(2**-24, 65280, width=32)


def sixteen(scheme: Scheme) -> Scheme:
    return dataclasses.replace(scheme, scale_bits=16)


def weight(rows: int = 24, columns: int = 256) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((rows, columns)) * rng.uniform(0.01, 1, (rows, 1))).astype(np.float32)


@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=SIZES))
def test_a_stored_scale_is_a_float16_half_a_unit_away_at_most(scales: np.ndarray) -> None:
    found, units = stored_scales(scales, EIGHT[0]), units_of(scales)
    assert (found == found.astype(np.float16)).all() and (found > 0).all()
    assert (np.log2(units) == np.rint(np.log2(units))).all()
    large = scales >= units / 2
    assert (np.abs(found - scales)[large] <= np.broadcast_to(units / 2, scales.shape)[large]).all()
    assert (found[~large] == np.broadcast_to(units, scales.shape)[~large]).all()
    assert ((scales.max(-1, keepdims=True) > 127.5 * units) | (units == 2.0**LEAST_POWER)).all()  # the finest that fits


@given(arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=SIZES), st.integers(0, 5))
def test_bytes_say_what_was_stored_whatever_the_units_were(scales: np.ndarray, coarser: int) -> None:
    found = stored_scales(scales, EIGHT[0], np.minimum(units_of(scales) * 2.0**coarser, 256).astype(np.float32))
    told = in_bytes(found).astype(np.float64)
    np.testing.assert_array_equal(told[:, 1:] * 2.0 ** (told[:, :1] + LEAST_POWER), found)
    np.testing.assert_array_equal(stored_scales(found, EIGHT[0]), found)


@given(arrays(np.float32, (2, 3), elements=SIZES), arrays(np.bool_, (2, 3)))
def test_a_scale_of_16_bits_keeps_its_sign(sizes: np.ndarray, below: np.ndarray) -> None:
    found = stored_scales(np.where(below, -sizes, sizes), Scheme(4))
    np.testing.assert_array_equal(found < 0, below)
    np.testing.assert_array_equal(np.abs(found), np.maximum(sizes.astype(np.float16), np.float16(2**-24)))


@pytest.mark.parametrize("scheme", EIGHT, ids=str)
def test_codes_make_good_what_scales_of_8_bits_lose(scheme: Scheme) -> None:
    w = weight()

    def error(codes: Codes) -> float:
        return float(np.square(codes.dequantize() - w).mean())

    found = round_to_nearest(w, scheme)
    np.testing.assert_array_equal(found.scales, stored_scales(found.scales, scheme))
    assert error(found) < 1.02 * error(round_to_nearest(w, sixteen(scheme)))


@pytest.mark.parametrize("scheme", [s for s in EIGHT if s.bits < 8 and not s.shifted], ids=str)
def test_gptq_chooses_codes_for_the_scales_that_are_stored(scheme: Scheme) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2000, 24) @ torch.randn(24, 256) + 0.3 * torch.randn(2000, 256), weight()

    def change(codes: Codes) -> float:
        return float((x @ torch.from_numpy(codes.dequantize() - w).T).square().mean())

    found = gptq(w, x.T @ x, scheme)
    np.testing.assert_array_equal(found.scales, stored_scales(found.scales, scheme))
    assert change(found) < 0.7 * change(round_to_nearest(w, scheme))
    assert change(found) < 1.1 * change(gptq(w, x.T @ x, sixteen(scheme)))


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_blocks_on_one_side_of_zero_keep_their_shifts(spread: float, share: float) -> None:
    """A row has one unit, and their shifts' scales are many times as large as their own."""
    rng = np.random.default_rng(0)
    w = (np.arange(256) < share * 256) + rng.uniform(-spread, spread, (4, 256))
    for scheme in (EIGHT[1], sixteen(EIGHT[1])):
        found = round_to_nearest(w.astype(np.float32), scheme)
        np.testing.assert_array_equal(found.scales, stored_scales(found.scales, scheme))
        assert np.square(found.dequantize() - w).mean() < 1e-4 * np.square(w).mean()


def test_a_grid_with_a_minimum_is_held_as_well() -> None:
    rng, scheme = np.random.default_rng(0), EIGHT[1]
    steps, lows = rng.uniform(0.01, 0.03, (8, 8, 1)), rng.uniform(-9, -6, (8, 8, 1))
    codes = rng.integers(0, 16, (8, 8, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    w = ((codes + lows) * steps).astype(np.float32).reshape(8, 256)

    def error(scheme: Scheme) -> float:
        return float(np.sqrt(np.square(round_to_nearest(w, scheme).dequantize() - w).mean() / np.square(w).mean()))

    assert error(scheme) < 0.1 * error(Scheme(4, 32, symmetric=False))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"bits": 4}, "4-bit block 32, 8-bit scales: scales of 8 bits have no sign; make the format asymmetric"),
     ({"bits": 8, "block": ROW}, "a row's one scale has 16 bits"), ({"bits": 8, "scale_bits": 4}, "4-bit scales")],
)  # fmt: skip
def test_scales_that_cannot_have_8_bits_are_refused(options: dict[str, int], said: str) -> None:
    with pytest.raises(QuantizeError, match=said):
        Scheme(**{"scale_bits": 8, **options})


def test_a_format_is_written_with_its_scales() -> None:
    method = find_method("4:32:shifted:scales8")
    assert (method.layers, method.ends) == (EIGHT[1], EIGHT[3])
    assert method.summary == "4-bit block 32 shifted, 8-bit scales weights"


def test_what_is_kept_has_scales_of_8_bits_only_where_that_is_asked_for() -> None:
    found = {method: planned(make("decoder"), "cpu", method)[1] for method in ("keep", "keep:scales8")}
    bits = {method: {scheme.scale_bits for scheme in plan.schemes.values()} for method, plan in found.items()}
    assert bits == {"keep": {16}, "keep:scales8": {8}}
    with pytest.raises(QuantizeError, match="has no quantization 'keep:scales8'"):
        find_method("keep:scales8", TARGETS["tensorrt"].methods)


@dataclasses.dataclass(frozen=True)
class Written:
    """A graph in a file: its logits, the operators that the library is left with, and the bytes of its weights."""

    logits: Any
    operators: list[str]
    stored: int
    told: int  # of the weights that are quantized, by their schemes


def written(method: str, scale_bits: int, folder: Path) -> Written:
    """With numbers of 8-bit scales, which are stored in so many bits."""
    model = make("decoder")
    graph, plan = planned(model, "cpu", method)
    quantize, schemes, shapes = plan.quantize, dict(plan.schemes), Uses(graph).shapes
    plan.schemes = {name: dataclasses.replace(s, scale_bits=scale_bits) for name, s in schemes.items()}
    plan.quantize = lambda name, w, _: quantize(name, w, schemes[name])
    lower_to(graph, TARGETS["cpu"], plan)
    stored = sum(v.const_value.nbytes for v in graph.graph.initializers.values())
    folder.mkdir()
    write_graph(graph, folder, lambda what, share: None)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    logits = session.run(["logits"], feeds(model, np.random.default_rng(0).integers(0, VOCAB, (2, 12))))[0]
    left = onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node
    told = sum(scheme.nbytes(*shapes[name]) for name, scheme in plan.schemes.items())
    return Written(logits, sorted(node.op_type for node in left), stored, told)


@pytest.mark.parametrize("method", ["4:32:asymmetric:scales8", "4:32:shifted:scales8"])
def test_scales_of_8_bits_take_what_is_told_and_are_folded_when_a_graph_is_loaded(method: str, tmp_path: Path) -> None:
    narrow, wide = (written(method, bits, tmp_path / str(bits)) for bits in (8, 16))
    np.testing.assert_array_equal(narrow.logits, wide.logits)
    assert narrow.operators == wide.operators and "GatherBlockQuantized" in narrow.operators
    powers = 4 * len(POWERS) + 4 * 8 * 3  # the table, and a few sizes of splits
    assert 0 < wide.told - narrow.told - powers < wide.stored - narrow.stored <= wide.told - narrow.told
