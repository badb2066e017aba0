"""Engines of models with adapters of several of a layer's projections, whose inputs are rounded to 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_rows import CAPABILITY
from families import VOCAB, make

from edgellm.checkpoints.switchable import Switchable
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load

pytest.importorskip("tensorrt_rtx", reason="pip install 'edgellm[tensorrt]' builds engines without a GPU")
NAMES = ("red", "blue")


def adapted(*modules: str) -> Switchable:
    """A small decoder with two adapters of these modules in its first layer."""
    base, draw = make("decoder"), torch.Generator().manual_seed(5)
    stacks = {}
    for name in modules:
        rows, columns = base.get_submodule(f"layers.0.{name}").weight.shape  # type: ignore[misc]
        down, up = (0.1 * torch.randn(3, *shape, generator=draw) for shape in ((columns, 4), (4, rows)))
        down[0], up[0] = 0, 0
        stacks[f"layers.0.{name}"] = down, up
    return Switchable(base, NAMES, stacks).eval()


def test_adapters_of_query_and_value_build_engines_of_8_bit_inputs(tmp_path: Path) -> None:
    """Added after the Split of the merged product, they ended the process."""
    engine = EngineOptions(compute_capabilities=(CAPABILITY,), chunk=16)
    options = ExportOptions(
        target="tensorrt", dtype="float16", quantize="w8a8", engine=engine, bounds={"top1": 0.0}
    )  # random weights have no favourite
    made = export(adapted("attention.q_proj", "attention.v_proj"), tmp_path / "b", options=options)
    assert {engine.role for engine in made.bundle.manifest.engines} == {"prefill", "decode"}
    checks = {check.name: check.value for check in made.verification.checks}
    assert all(checks[f"adapters.{name}"] < 0.5 for name in NAMES)
    model = load(made.bundle.path, device="cpu", threads=1)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 21))
    sessions = [model.with_adapter(name).session for name in (None, *NAMES)]
    base, *others = (s.step(tokens, s.new_state(1), logits="all").copy() for s in sessions)
    assert all(np.abs(other - base).max() > 0.05 * np.abs(base).max() for other in others)  # they are in the graphs
