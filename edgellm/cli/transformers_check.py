"""``export --check transformers``: whether the model that was loaded is the one that transformers loads.

Parity compares a bundle with the loaded model, so it cannot see a checkpoint that was read as another model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from edgellm.checkpoints import Checkpoint

__all__ = ["TOKENS", "check_transformers"]

TOKENS = 64
_BOUND = 1e-3  # of the largest logit; both compute in float32, and 30 layers differ by about 1e-5


def check_transformers(path: Path, loaded: Checkpoint) -> dict[str, Any]:
    """Compare the loaded model's logits with those of transformers' own on some tokens.

    Args:
        path: the checkpoint.
        loaded: what was read from it.

    Returns:
        ``tokens`` compared, ``logits`` (the largest difference, relative to the largest logit) and ``top1`` (how often
        the most likely token is the same).

    Raises:
        CheckpointError: transformers is not installed, cannot load the checkpoint, or computes something else.
    """
    import torch

    from edgellm.models.protocol import answers_sources, read_rows
    from edgellm.streaming import OwnWeights, resident

    model: Any = loaded.model
    count = min(TOKENS, model.config.max_context)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator)
    expected = _theirs(path, tokens, answers_sources(model))
    with torch.inference_mode(), resident(model, loaded.weights or OwnWeights(model)):
        ours = read_rows(model, tokens)[0].float()  # (1, count, vocab)
    if ours.shape != expected.shape:
        raise CheckpointError(
            f"{path}: transformers gives logits of shape {tuple(expected.shape)}, edgellm {tuple(ours.shape)}; "
            "export with weights that belong to the configuration"
        )
    largest, difference = float(expected.abs().amax()), float((ours - expected).abs().amax())
    found = {
        "tokens": count,
        "logits": difference / largest if largest else difference,
        "top1": float((ours.argmax(-1) == expected.argmax(-1)).float().mean()),
    }
    if not found["logits"] <= _BOUND:
        raise CheckpointError(
            f"{path}: transformers computes other logits, up to {difference:.3g} apart where the largest is "
            f"{largest:.3g}, and the same most likely token at {found['top1']:.0%} of {count} positions; no bundle was "
            "written, because edgellm reads this checkpoint as another model"
        )
    return found


def _theirs(path: Path, tokens: Tensor, sourced: bool) -> Tensor:
    import torch

    try:
        import transformers
    except ModuleNotFoundError as error:
        raise CheckpointError("--check transformers needs transformers: install the extra hf") from error
    if path.is_dir() and not (path / "config.json").exists():
        raise CheckpointError(f"{path} is no checkpoint that transformers can load; leave --check out")
    if (path / "adapter_config.json").exists() and not transformers.utils.is_peft_available():
        raise CheckpointError(f"{path} has an adapter, which transformers loads with PEFT only; pip install peft")
    where = {"pretrained_model_name_or_path": path} if path.is_dir() else {
        "pretrained_model_name_or_path": path.parent, "gguf_file": path.name,
    }  # fmt: skip
    with _quiet(transformers), torch.inference_mode():
        try:
            kind = transformers.AutoModelForSeq2SeqLM if sourced else transformers.AutoModelForCausalLM
            model = kind.from_pretrained(
                **where, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            ).eval()
        except Exception as error:  # of many classes, some of its dependencies' own
            raise CheckpointError(f"{path}: transformers cannot load it ({error}); leave --check out") from error
        answer = {"decoder_input_ids": tokens} if sourced else {}
        logits: Tensor = model(tokens, **answer, use_cache=False).logits.float()
    return logits


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Its bars and reports would stand between ours."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        log.enable_progress_bar()
