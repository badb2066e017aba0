"""RWKV-7 against its authors' own package, and from a folder."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edgellm.checkpoints import load_checkpoint
from edgellm.errors import CheckpointError
from edgellm.models.protocol import Step
from edgellm.models.rwkv7 import RWKV7, RWKV7Config
from edgellm.models.rwkv7_files import HUGGING_FACE
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.proof.parity import compare
from edgellm_runtime import open_session

CONFIG = RWKV7Config(
    vocab_size=61, width=128, num_layers=3, head_dim=64, hidden=80, decay_rank=7, share_rank=5, value_rank=6,
    gate_rank=9, max_context=64,
)  # fmt: skip
TOKENS = torch.randint(0, 61, (1, 23), generator=torch.Generator().manual_seed(2))


def scrambled() -> RWKV7:
    torch.manual_seed(0)
    model = RWKV7(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.shape[0] in (1, 2):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    every = torch.arange(tokens.shape[1])[None]
    found: Tensor = model(tokens, None, Step.whole(tokens)._replace(logit_positions=every))[0]
    return found


def as_theirs(model: RWKV7) -> dict[str, Tensor]:
    """The tensors as the authors' files have them."""
    ends = {"emb.weight": model.embedding.weight, "head.weight": model.head.weight}
    norms = {"blocks.0.ln0": model.embedding_norm, "ln_out": model.norm}
    for i, layer in enumerate(model.layers):
        block: Any = layer
        time, channel, name = block.time, block.channel, f"blocks.{i}"
        norms |= {f"{name}.ln1": block.time_norm, f"{name}.ln2": block.channel_norm, f"{name}.att.ln_x": time.norm}
        ends |= {f"{name}.att.x_{use}": 1 - getattr(time.shift, use) for use in "rwkvag"}
        for letter, low in (("w", time.decay), ("a", time.share), ("v", time.value), ("g", time.gate)):
            if low is not None:
                ends |= {f"{name}.att.{letter}{n}": x.weight.T for n, x in ((1, low.down), (2, low.up))}
                ends |= {} if low.up.bias is None else {f"{name}.att.{letter}0": low.up.bias[None, None]}
        ends |= {f"{name}.att.k_k": time.key_gain, f"{name}.att.k_a": time.key_share, f"{name}.att.r_k": time.bonus}
        projections = {"receptance": time.r_proj, "key": time.k_proj, "value": time.v_proj, "output": time.out_proj}
        ends |= {f"{name}.att.{part}.weight": x.weight for part, x in projections.items()}
        ends |= {
            f"{name}.ffn.{part}.weight": x.weight for part, x in (("key", channel.k_proj), ("value", channel.v_proj))
        }
        ends[f"{name}.ffn.x_k"] = 1 - channel.shift.key
    ends |= {f"{name}.{part}": getattr(norm, part) for name, norm in norms.items() for part in ("weight", "bias")}
    return {name: tensor.detach().clone() for name, tensor in ends.items()}


@torch.no_grad()
def test_it_computes_what_its_authors_package_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}.items():
        monkeypatch.setenv(name, value)
    model = scrambled()
    torch.save(as_theirs(model), tmp_path / "model.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles itself by what PyTorch has deprecated
        from rwkv.model import RWKV

        theirs = RWKV(str(tmp_path / "model"), "cpu fp32")
        wanted, state = theirs.forward(TOKENS[0].tolist(), None, full_output=True)
        later, _ = theirs.forward([7], state)
    torch.testing.assert_close(logits(model, TOKENS)[0], wanted, rtol=1e-5, atol=1e-5)
    whole = torch.cat([TOKENS, torch.tensor([[7]])], dim=1)
    torch.testing.assert_close(logits(model, whole)[0, -1], later, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_folder_of_its_tensors_is_read_and_exported(tmp_path: Path) -> None:
    model = scrambled()
    names = {name: HUGGING_FACE.names(name) for name, _ in model.named_parameters()}
    tensors = {names[n]: (1 - p if ".shift." in n else p).detach().clone() for n, p in model.named_parameters()}
    assert {"model.layers.1.attn.v_lora.lora.2.bias", "model.layers.0.ffn.x_k", "model.layers.0.pre_norm.weight"} <= (
        tensors.keys()
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "rwkv7", "vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 3, "head_dim": 64,
        "intermediate_size": 80, "decay_low_rank_dim": 7, "a_low_rank_dim": 5, "v_low_rank_dim": 6,
        "gate_low_rank_dim": 9, "max_position_embeddings": 64, "norm_eps": 1e-5, "hidden_act": "sqrelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = load_checkpoint(folder).model
    torch.testing.assert_close(logits(read, TOKENS), logits(model, TOKENS), rtol=1e-6, atol=1e-6)
    exported = export(read, tmp_path / "b", options=ExportOptions(target="cpu"))
    report = compare(model, open_session(exported.bundle, device="cpu", threads=1), [TOKENS[0].tolist()])
    assert exported.verification.ok
    assert report.logits < 1e-5


@torch.no_grad()
def test_its_authors_files_are_read_and_are_their_packages_and_the_folders_model(tmp_path: Path) -> None:
    model, tensors = scrambled(), as_theirs(scrambled())
    shared = {"blocks.0.att.v0": torch.zeros(1, 1, 128), "blocks.0.att.v1": torch.zeros(128, 6)}  # in some, unused
    as_stored = {
        n: t.reshape(1, 1, -1) if ".x_" in n or n.endswith((".k_k", ".k_a")) else t for n, t in tensors.items()
    }
    torch.save(as_stored | shared, tmp_path / "RWKV-x070.pth")
    read = load_checkpoint(tmp_path / "RWKV-x070.pth")
    assert read.architecture == "rwkv7"
    assert read.eos_token_ids == (0,)
    assert dataclasses.replace(read.model.config, max_context=CONFIG.max_context) == CONFIG  # type: ignore[type-var]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(read.model.get_parameter(name), parameter, rtol=0, atol=1e-7)
    torch.testing.assert_close(logits(read.model, TOKENS), logits(model, TOKENS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.att.r_k": torch.zeros(4, 32)}, r"blocks\.0\.att\.r_k is \(4, 32\), which edgellm's form"),
        ({"blocks.1.ffn.s_emb.weight": torch.zeros(61, 4)}, r"blocks\.1\.ffn\.s_emb\.weight have no place"),
        ({"blocks.2.att.w2": torch.zeros(6, 128)}, r"blocks\.2\.att\.w2 has shape \(6, 128\)"),
        ({"emb.weight": None}, r"emb\.weight is missing"),
        ({"blocks.1.att.k_k": None}, r"blocks\.1\.att\.k_k .* missing"),
    ],
)
def test_what_is_no_such_file_is_refused_by_the_tensor(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: t for name, t in (as_theirs(scrambled()) | changes).items() if t is not None}
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.pth")
