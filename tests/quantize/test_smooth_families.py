"""Smoothing finds every input that a gain or a weight makes, in families that nobody wrote it for."""

from __future__ import annotations

import numpy as np
import pytest
from families import CONTEXT, VOCAB, make, planned

from edgellm_exporters.passes.merge_linears import parts_of
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.quantize.calibrate import largest_inputs

ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# All but what reads the attended values, which no gain and no gate makes, and the vocabulary, whose table is tied.
INPUTS: dict[str, list[tuple[str, ...]]] = {
    "decoder": [(*ATTENTION, *MLP)] * 2,
    "windows and soft caps": [(*ATTENTION, *MLP)] * 2,  # its gains are 1 + w, folded into weights
    "short convolutions and attention": [("in_proj", "out_proj", *MLP), (*ATTENTION, *MLP)],
    "state space": [("in_proj", "out_proj")] * 2,
}


@pytest.mark.parametrize("target", ["cpu", "onnx"])
@pytest.mark.parametrize("family", INPUTS)
def test_every_layers_inputs_are_smoothed(family: str, target: str) -> None:
    _, plan = planned(make(family), target, "int8")
    found = {tuple(part.split(".")) for name in plan.smoothing.columns for part in parts_of(name)}
    expected = {(str(layer), name) for layer, names in enumerate(INPUTS[family]) for name in names}
    assert {(path[1], path[-2]) for path in found} == expected


def test_a_block_that_is_run_at_several_places_has_the_range_of_all() -> None:
    model = make("state space and shared attention")
    rows = golden_rows(None, VOCAB, CONTEXT).rows
    calls: list[np.ndarray] = []
    block = model.get_submodule("layers.3.shared.in_proj")
    block.register_forward_pre_hook(lambda _, given: calls.append(given[0].abs().amax((0, 1)).numpy()))
    found = largest_inputs(model, rows)
    assert len(calls) == 2
    assert (calls[1] > calls[0]).any() and (calls[0] > calls[1]).any()
    np.testing.assert_array_equal(found["layers.3.shared.in_proj.weight"], np.max(calls, axis=0))
