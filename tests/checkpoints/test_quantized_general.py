"""Checkpoints that others quantized on the general road: their floats, and their codes where kernels hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import quantized_files as files
import torch
from quantized_rows import EVERY
from safetensors.torch import load_file, save_file

from edgellm.cli.export import export_checkpoint
from edgellm.streaming import OwnWeights, resident


def saved(kind: str, folder: Path, **changes):
    """A model of transformers in a folder, and its logits once its weights are what the folder then stands for."""
    pytest.importorskip("transformers")
    from general_models import build

    model = build(kind, **changes)
    model.save_pretrained(folder)
    return model


def general_logits(checkpoint, tokens):
    with torch.inference_mode(), resident(checkpoint.model, checkpoint.weights or OwnWeights(checkpoint.model)):
        return checkpoint.model(tokens)[0]


def test_the_general_road_reads_quantized_folders_and_keeps_their_codes(tmp_path):
    saved("granite", tmp_path / "model", intermediate_size=96)
    files.write(tmp_path / "model", tmp_path / "plain", *EVERY["gptq, asymmetric"])
    from edgellm.general import open_general

    found, plain = open_general(tmp_path / "model"), open_general(tmp_path / "plain")
    tokens = torch.arange(5, 25)[None]
    expected = general_logits(plain, tokens)
    assert (general_logits(found, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert any(note.startswith("14 matrices are stored as GPTQ, 4 bits, groups of 32") for note in found.notes)
    said = export_checkpoint(
        tmp_path / "model", tmp_path / "kept", target="cpu", quantize="keep", road="general", tell=lambda *_: None
    )
    assert "14 matrices keep the checkpoint's own codes" in said["notes"]


def test_gpt_oss_experts_in_mxfp4_go_the_general_road(tmp_path):
    model = saved("gpt_oss", tmp_path / "model", hidden_size=64, intermediate_size=32)
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, blocks.shape[:-1], dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).data = convert(blocks, scales, dtype=torch.float32)
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    from edgellm.general import open_general

    found = open_general(tmp_path / "model")
    tokens = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
    assert (general_logits(found, tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert any(note.startswith("4 matrices are stored as MXFP4, groups of 32") for note in found.notes)
