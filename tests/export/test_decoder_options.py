"""What checkpoints may ask of the decoder beside its usual form, on the targets of this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from families import CONTEXT, VOCAB, cpu_targets

from edgellm.checkpoints import open_checkpoint, save_checkpoint
from edgellm.errors import CheckpointError
from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm_exporters.export import ExportOptions, export

CONFIG = DecoderConfig(
    vocab_size=VOCAB, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=96,
    max_context=CONTEXT, tie_embeddings=False,
)  # fmt: skip
ASKED = {
    "biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
    "positions and scale": {
        "rope_factors": [1 + i / 4 for i in range(8)], "rope_amplitude": 1.2, "attention_scale": 0.1,
    },
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
}  # fmt: skip


def model(**options: object) -> Decoder:
    torch.manual_seed(0)
    found = Decoder(dataclasses.replace(CONFIG, **options)).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.2)
    return found


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("target", cpu_targets())
def test_a_bundle_computes_it(tmp_path: Path, target: str, asked: str) -> None:
    done = export(model(**ASKED[asked]), tmp_path / "b", options=ExportOptions(target=target))
    assert done.verification.ok
    assert done.parity.logits < 1e-4
    assert done.parity.top1 == 1.0


@pytest.mark.parametrize("asked", ASKED)
def test_it_matters(asked: str) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    changed, usual = model(**ASKED[asked]), model()
    usual.load_state_dict({n: t for n, t in changed.state_dict().items() if n in usual.state_dict()})
    with torch.inference_mode():
        assert (changed(tokens)[0] - usual(tokens)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.attention_norm.weight", "layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("target", cpu_targets())
def test_a_fault_of_a_tensor_that_is_read_while_it_is_written_is_told_as_it_is(tmp_path, target, name) -> None:
    damaged = model()
    damaged.get_parameter(name).data.view(-1)[3] = float("nan")
    save_checkpoint(tmp_path / "m", damaged, architecture="decoder", tokenizer_json=None)
    opened = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=f"tensor {name} is not finite"):
        export(opened.model, tmp_path / "b", weights=opened.weights, options=ExportOptions(target=target))
    assert not (tmp_path / "b").exists()
