"""What a target's kernels do not take runs in its standard form, equal to PyTorch, and the summary says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import only, refusal

from edgellm.checkpoints import save_checkpoint
from edgellm.cli import run
from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm_exporters.errors import CaptureError, ExportError
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load
from edgellm_runtime.backends.faults import load_fault

VOCAB = 61


def model(head_dim: int, *, heads: int = 2) -> Any:
    torch.manual_seed(head_dim)
    return Decoder(
        DecoderConfig(
            vocab_size=VOCAB, width=32, num_layers=2, num_heads=heads, num_kv_heads=1, head_dim=head_dim, mlp_width=32,
            max_context=64,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("head_dim", [8, 20, 24, 40, 72, 100, 120])
def test_bundle_for_cpu_equals_pytorch_whatever_the_head_size(tmp_path: Path, head_dim: int) -> None:
    made = export(model(head_dim), tmp_path / "out")
    assert made.verification.ok
    assert {check.name for check in made.verification.checks} >= {"split", "batch", "state"}  # ragged rows too
    assert made.parity.greedy == 1
    assert made.parity.logits < 1e-4
    (note,) = (note for note in made.notes if "standard form" in note)
    assert note == (
        f"Attention of layers.0, layers.1 runs in its standard form: head size {head_dim}, and the kernel takes "
        "multiples of 16"
    )


@pytest.mark.parametrize("head_dim", [16, 48])
def test_head_sizes_that_the_kernel_takes_keep_it(tmp_path: Path, head_dim: int) -> None:
    made = export(model(head_dim), tmp_path / "out")
    assert not [note for note in made.notes if "standard form" in note]
    assert b"GroupQueryAttention" in (tmp_path / "out/model.onnx").read_bytes()


@pytest.mark.parametrize("options", [{"target": "cuda", "dtype": "float16"}, {"quantize": "int8"}, {"target": "onnx"}])
def test_standard_form_beside_other_precisions_and_targets(tmp_path: Path, options: dict[str, Any]) -> None:
    made = export(model(24), tmp_path / "out", options=ExportOptions(**options))
    assert made.verification.ok
    assert bool([n for n in made.notes if "standard form" in n]) == (options.get("target") != "onnx")


def test_batch_of_unequal_prompts_in_several_chunks_gets_what_each_gets_alone(tmp_path: Path) -> None:
    export(model(20), tmp_path / "out")
    loaded = load(tmp_path / "out", threads=1)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9]]
    together = loaded.generate(prompts, max_new_tokens=12, ignore_eos=True)
    alone = [loaded.generate(prompt, max_new_tokens=12, ignore_eos=True) for prompt in prompts]
    assert [row.tokens for row in together] == [row.tokens for row in alone]


def test_eight_bit_cache_without_its_kernel_is_refused_before_the_weights_are_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="such a cache needs target cpu's kernel, but Attention of layers"):
        export(model(24), tmp_path / "out", options=ExportOptions(kv_cache="int8"))
    only(tmp_path)


def test_hidden_64_with_8_heads_trains_and_exports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n\n" * 400)
    shape = ("--set", "width=64", "--set", "num_heads=8", "--set", "num_kv_heads=8", "--set", "pattern=attention")
    small = ("--steps", "1", "--batch-size", "2", "--context", "16", "--vocab-size", "300", "--threads", "1")
    assert run(["train", str(text), "-o", str(tmp_path / "run"), *shape, *small]) == 0
    assert run(["export", str(tmp_path / "run/last"), "-o", str(tmp_path / "out"), "--json"]) == 0
    (result,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert "head size 8, and the kernel takes multiples of 16" in result["notes"][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_own_module_in_another_precision_is_widened_and_equal(tmp_path: Path, dtype: torch.dtype, target: str) -> None:
    own = model(16).to(dtype)
    before = {name: (p.data_ptr(), p.dtype) for name, p in own.named_parameters()}
    made = export(own, tmp_path / "out", options=ExportOptions(target=target))
    assert made.verification.ok
    assert made.parity.logits < 1e-4
    name = str(dtype).removeprefix("torch.")
    assert any(note.startswith(f"the model's {name} weights were read as float32") for note in made.notes)
    assert {name: (p.data_ptr(), p.dtype) for name, p in own.named_parameters()} == before


def test_state_that_is_declared_in_16_bits_is_one_sentence(tmp_path: Path) -> None:
    own = model(16)
    specs = [dataclasses.replace(spec, dtype="bfloat16") for spec in own.state_specs()]
    own.state_specs = lambda: specs
    with pytest.raises(CaptureError, match="is declared bfloat16; declare float32, for --dtype says what"):
        export(own, tmp_path / "out")
    only(tmp_path)


def test_head_dim_24_from_a_checkpoint_exports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", model(24), architecture="decoder", tokenizer_json=None)
    assert run(["export", str(tmp_path / "c"), "-o", str(tmp_path / "out")]) == 0
    assert "Note: Attention of layers.0, layers.1 runs in its standard form: head size 24" in capsys.readouterr().out
    message = refusal(capsys, "export", str(tmp_path / "c"), "-o", str(tmp_path / "o"), "--kv-cache", "int8")
    assert "onnxruntime" not in message.lower()


def test_nobody_sees_a_status_line_of_onnx_runtime() -> None:
    raw = (
        "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for MatMul(13) node with name 'm'"
    )
    fault = load_fault("ONNX Runtime 1.32.0", "model.onnx", RuntimeError(raw + "\nand a page more"))
    assert str(fault) == (
        "model.onnx: ONNX Runtime 1.32.0 refuses the graph: it has no kernel for MatMul(13) in this precision (node m)"
    )
