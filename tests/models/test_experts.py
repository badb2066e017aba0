"""A mixture of experts against its definition, and as graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONTEXT, VOCAB

from edgellm.models.layers import Experts
from edgellm.models.qwen3_next import Qwen3NextConfig, qwen3_next
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.parity import compare
from edgellm_runtime import open_session


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("chosen", "shared"), [(1, 0), (3, 8), (5, 8)])
@torch.no_grad()
def test_each_token_has_the_experts_that_it_chooses(chosen: int, shared: int, normalised: bool) -> None:
    torch.manual_seed(0)
    layer = Experts(6, 10, 5, chosen, normalised=normalised, shared_hidden=shared).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64) * 3
    found = layer(x)
    for row in range(2):
        for t in range(7):
            token = x[row, t]
            shares = torch.softmax(layer.router.weight @ token, -1)
            best = sorted(range(5), key=lambda i: -float(shares[i]))[:chosen]
            total = float(shares[best].sum()) if normalised else 1.0
            expected = sum(shares[i] / total * layer.experts[i](token) for i in best)
            if shared:
                expected = expected + torch.sigmoid(layer.shared_gate.weight[0] @ token) * layer.shared(token)
            torch.testing.assert_close(found[row, t], expected)


@pytest.mark.parametrize(
    "options",
    [{"target": "onnx"}, {"target": "cpu"}, {"target": "cuda", "dtype": "float16"}],
    ids=lambda options: options["target"],
)
def test_experts_are_exported(options: Mapping[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=VOCAB, width=64, pattern=("attention",), num_heads=2, num_kv_heads=1, head_dim=32, rotated=8,
        delta_heads=1, delta_groups=1, delta_key_dim=1, delta_value_dim=1, mlp_width=1, max_context=CONTEXT,
        experts=(0,), num_experts=3, num_chosen=2, expert_width=32, shared_width=32,
    )  # fmt: skip
    model = qwen3_next(config).eval()
    exported = export(model, tmp_path / "b", options=ExportOptions(**options))
    assert exported.verification.ok
    window = np.random.default_rng(1).integers(0, VOCAB, CONTEXT).tolist()
    report = compare(model, open_session(exported.bundle, device="cpu", threads=1), [window])
    assert report.logits < (0.003 if "dtype" in options else 1e-5)
