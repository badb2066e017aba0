"""Smoothing finds every input that a gain or a weight makes, in families that nobody wrote it for."""

from __future__ import annotations

import pytest
from families import make, planned

from edgellm_exporters.passes.merge_linears import parts_of

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
