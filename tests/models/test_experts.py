"""A mixture of experts against its definition, and as graphs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from families import CONTEXT, VOCAB
from general_models import build

from edgellm.general.model import GeneralModel
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


@pytest.mark.parametrize("packed", [False, True])
def test_training_computes_the_chosen_experts_and_gets_the_gradients_of_all(packed: bool) -> None:
    torch.manual_seed(0)
    layer = Experts(6, 10, 5, 2, packed=packed).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    seen: list[int] = []
    first = layer.experts[0].in_proj if packed else layer.experts[0].up_proj
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[0]))
    found = layer(x)
    chosen = torch.softmax(layer.router(x), -1).topk(2, -1).indices
    assert seen == [int((chosen == 0).sum())]
    with torch.no_grad():
        torch.testing.assert_close(found, layer(x))
    for weight in (layer.router.weight, first.weight):  # against differences of the form that computes every token
        (slope,) = torch.autograd.grad(layer(x).square().sum(), weight, retain_graph=True)
        with torch.no_grad():
            step = torch.randn_like(weight) * 1e-6
            weight += step
            above = layer(x).square().sum()
            weight -= 2 * step
            below = layer(x).square().sum()
            weight += step
        torch.testing.assert_close((slope * step).sum() * 2, above - below, rtol=1e-4, atol=1e-9)


def products_of_a_token(bundle: Path, folder: Path) -> list[str]:
    """The names of the nodes that multiplied matrices when one token was read, as often as they ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options, ["CPUExecutionProvider"])
    feeds = {}
    for given in session.get_inputs():
        shape = [{"batch": 1, "time": 1, "count": 1, "capacity": CONTEXT}.get(d, d) for d in given.shape]
        kind = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}[given.type]
        feeds[given.name] = np.full(shape, 1 if given.name in ("tokens", "lengths") else 0, kind)
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [e["name"] for e in events if e["name"].endswith("_kernel_time") and "MatMul" in e["args"]["op_name"]]


CHOSEN = [
    ("onnx", "none"), ("cpu", "int4"), ("cpu", "w8a8"), ("cpu", "3:32:asymmetric"), ("cpu", "3:32:asymmetric:scales8"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "quantize"), CHOSEN)
def test_a_token_multiplies_with_its_chosen_experts_alone(target: str, quantize: str, tmp_path: Path) -> None:
    """32 experts of which a token has 4: counted by the kernels that a step ran."""
    experts, chosen = 32, 4
    config = Qwen3NextConfig(
        vocab_size=VOCAB, width=32, pattern=("attention",), num_heads=2, num_kv_heads=1, head_dim=16, rotated=8,
        delta_heads=1, delta_groups=1, delta_key_dim=1, delta_value_dim=1, mlp_width=1, max_context=CONTEXT,
        experts=(0,), num_experts=experts, num_chosen=chosen, expert_width=32, shared_width=32,
    )  # fmt: skip
    torch.manual_seed(0)
    exported = export(
        qwen3_next(config).eval(), tmp_path / "b", options=ExportOptions(target=target, quantize=quantize)
    )
    assert exported.verification.ok
    names = products_of_a_token(exported.bundle.path, tmp_path)
    counts = Counter(names)  # each expert's nodes have the same names within its branch
    matrices = 3 if target == "onnx" else 2  # cpu has the gate and what it multiplies in one
    assert sorted(counts.values())[-matrices:] == [chosen] * matrices
    assert len(names) - matrices * chosen == len(counts) - matrices <= 10


def test_experts_that_read_a_block_of_rows_each_are_found_by_numbers_and_skipped(tmp_path: Path) -> None:
    """Llama 4's follow no interface: rows are multiplied by their shares before the experts, by zero if not chosen."""
    experts, chosen = 4, 2
    theirs = build("llama4_text", num_hidden_layers=1, num_local_experts=experts, num_experts_per_tok=chosen)
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(input_ids=tokens, use_cache=False).logits
        model = GeneralModel(theirs).eval()
        torch.testing.assert_close(model(tokens)[0], wanted, rtol=1e-5, atol=1e-5)
    assert len({name.split(".")[-3] for name in model.experts}) == experts
    exported = export(model, tmp_path / "b", options=ExportOptions(target="onnx"))
    counts = Counter(products_of_a_token(exported.bundle.path, tmp_path))
    assert sorted(counts.values())[-3:] == [1, chosen, chosen]


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text"])
def test_experts_of_the_general_road_are_quantized_and_run_on_rows_of_any_length(kind: str, tmp_path: Path) -> None:
    """One tensor of all experts there, or one by columns with gate and up in turns: here each expert has its own."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 8, "num_hidden_layers": 1}
    theirs = build(kind, **sizes)
    with torch.no_grad():  # experts differ little, so that it matters little which of them 8 bits choose
        for name, weight in theirs.named_parameters():
            if "experts" in name:
                weight.copy_(weight[:1] + 0.1 * (weight - weight[:1]))
    model = GeneralModel(theirs).eval()
    experts = [
        p for name, p in model.named_parameters() if name.rpartition(".")[0].endswith("_proj") and "experts" in name
    ]
    numbers = sum(p.numel() for p in experts)
    exported = export(model, tmp_path / "b", options=ExportOptions(target="cpu", quantize="int8"))
    assert exported.verification.ok
    rest = sum(p.numel() for p in model.parameters()) - numbers
    held = sum(f.stat().st_size for f in exported.bundle.path.glob("model.onnx*"))
    assert held < 1.25 * numbers + 4 * rest + 100_000  # a byte a number and its share of a scale, not four bytes
    ids = np.random.default_rng(0).integers(3, 96, (3, 9))
    session = open_session(exported.bundle, device="cpu", threads=1)
    together, lengths = session.new_state(batch=3), np.array([9, 4, 1])
    found = session.step(ids, together, lengths=lengths, logits="last").copy()
    for row, length in enumerate(lengths):
        alone = session.step(ids[row : row + 1, :length], session.new_state(batch=1), logits="last")
        np.testing.assert_allclose(found[row], alone[0], rtol=1e-3, atol=1e-3)
