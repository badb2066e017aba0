"""Ordinary adapters, learned by PEFT in a few steps, on every target in every precision; and one of wild size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoints_huggingface import transformers_model

from edgellm.checkpoints import open_checkpoint, switchable
from edgellm.checkpoints.assemble import fill
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.models.protocol import Step, empty_state
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.export import Exported, ExportOptions, export
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.graph.lower import prepare
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.proof.samples import golden_rows
from edgellm_exporters.quantize.methods import find_method
from edgellm_exporters.quantize.planning import make_plan
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime import load
from edgellm_runtime.spec import ADAPTER

pytestmark = pytest.mark.filterwarnings("default")  # the warnings here are transformers' and PEFT's own
ADAPTERS = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
}
ROWS = [
    ("onnx", "float32", "none"), ("cpu", "float32", "none"), ("cpu", "float32", "int4"),
    *(("cuda", "float16", method) for method in ("none", "int8", "int4")), ("cuda", "bfloat16", "none"),
    *(("tensorrt", "float16", method) for method in ("none", "int8", "int4")), ("tensorrt", "bfloat16", "none"),
    *(("tensorrt", "float32", method) for method in ("w8a8", "fp8")),  # whose codes' edges float16 would blur
]  # fmt: skip
CLOSE = {"float32": 1e-5, "float16": 4e-3}
LEARNING_STEPS, LEARNING_RATE = 8, 5e-3
TOKENS = torch.randint(0, 61, (3, 24), generator=torch.Generator().manual_seed(7))


def llama() -> Any:
    """The base, always the same."""
    return transformers_model("Llama", hidden_size=64, head_dim=16, intermediate_size=96, initializer_range=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two adapters that PEFT has trained, and one drawn as large as the base's own weights."""
    peft = pytest.importorskip("peft")
    made = tmp_path_factory.mktemp("trained")
    llama().save_pretrained(made / "base")
    for name, options in ADAPTERS.items():
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        learns = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), LEARNING_RATE)
        for _ in range(LEARNING_STEPS):
            model(TOKENS, labels=TOKENS.flip(1)).loss.backward()
            learns.step()
            learns.zero_grad()
        model.save_pretrained(made / name)
    places = ["q_proj", "o_proj", "down_proj", "lm_head"]
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=places, use_rslora=True))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(made / "wild")
    return made


def exported(opened: Checkpoint, target: str, dtype: str, method: str, there: Path) -> Exported:
    engine = EngineOptions(build=False, chunk=16) if target == "tensorrt" else None
    options = ExportOptions(target=target, dtype=dtype, quantize=method, engine=engine)
    return export(opened.model, there, weights=opened.weights, options=options)


def same_numbers(model: Any, target: str, method: str, context: int) -> Any:
    """PyTorch with the numbers of a bundle that was made without a text."""
    goal = find_target(target)
    rows = golden_rows(None, model.config.vocab_size, context).rows
    plan = make_plan(find_method(method, goal.methods), prepare(capture(model), goal), model, rows, [])
    return quantized_model(model, plan, integer_products=target != "tensorrt", block_products=target == "cpu")


@torch.inference_mode()
@pytest.mark.parametrize(("target", "dtype", "method"), ROWS)
def test_a_trained_adapter_computes_what_pytorch_computes(
    target: str, dtype: str, method: str, folder: Path, tmp_path: Path
) -> None:
    opened = switchable(open_checkpoint(folder / "base"), {name: folder / name for name in ADAPTERS})
    made = exported(opened, target, dtype, method, tmp_path / "b")
    checks = {check.name: check for check in made.verification.checks}
    assert all(checks[f"adapters.{name}"].value < 0.5 for name in ADAPTERS)  # far from the bound
    if dtype == "bfloat16":
        return  # no kernels here; its stand-in was verified
    reference = fill(opened.model, opened.weights)
    if method != "none":  # those very numbers, so that nothing but the graph can differ
        reference = same_numbers(reference, target, method, made.bundle.manifest.max_context)
    bundle = load(made.bundle.path, device="cpu", threads=1)
    found, wanted = [], []
    for number, name in enumerate((None, *ADAPTERS)):
        session = bundle.with_adapter(name).session
        found.append(session.step(TOKENS.numpy(), session.new_state(3), logits="all").copy())
        state = {**empty_state(reference, 3, 24), ADAPTER: torch.full((3, 1), number, dtype=torch.int32)}
        wanted.append(reference(TOKENS, state, Step.whole(TOKENS))[0].numpy())
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.abs(ours - theirs).max() < CLOSE[dtype] * np.abs(theirs).max()
    assert np.abs(found[1] - found[0]).max() > 0.05 * np.abs(wanted[0]).max()
    assert np.abs(found[2] - found[1]).max() > 0.05 * np.abs(wanted[0]).max()


@torch.inference_mode()
def test_a_wild_adapter_costs_no_more_than_float16_costs_pytorch(folder: Path, tmp_path: Path) -> None:
    """Where an export in 16 bits is refused for an adapter, it is for the rounding that PyTorch's own half has too."""
    peft = pytest.importorskip("peft")
    opened = switchable(open_checkpoint(folder / "base"), {"wild": folder / "wild"})
    options = ExportOptions(target="cuda", dtype="float16", bounds={"logits": 1.0, "kl": 1.0, "state": 1.0})
    made = export(opened.model, tmp_path / "b", weights=opened.weights, options=options)
    session = load(made.bundle.path, device="cpu", threads=1).with_adapter("wild").session
    ours = torch.from_numpy(session.step(TOKENS.numpy(), session.new_state(3), logits="all"))
    wide, half = (
        peft.PeftModel.from_pretrained(llama(), folder / "wild").merge_and_unload().to(dtype)(TOKENS).logits.float()
        for dtype in (torch.float32, torch.float16)
    )
    assert (half - wide).abs().max() > 0.005 * wide.abs().max()  # it is wild
    assert (ours - wide).abs().max() < 1.2 * (half - wide).abs().max()
    assert (ours - wide).square().mean() < 1.2 * (half - wide).square().mean()
