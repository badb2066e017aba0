"""Reading a Hugging Face folder by the general road, and making sure that it computes what transformers computes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from edgellm.checkpoints import Checkpoint
from edgellm.checkpoints.assemble import fill
from edgellm.checkpoints.files import read_json
from edgellm.checkpoints.find_weights import find_weights
from edgellm.checkpoints.huggingface_text import read_text_files
from edgellm.checkpoints.lora_source import ADAPTER_CONFIG
from edgellm.checkpoints.quantized.find import dequantized
from edgellm.checkpoints.weights import CheckpointWeights, TensorSource
from edgellm.errors import CheckpointError, UnsupportedError
from edgellm.general.experts import Apart
from edgellm.general.model import GeneralModel
from edgellm.general.probe import FOREIGN_FAULTS, told
from edgellm.general.stored import CannotStream, Converted, built_without_weights, renamed, weights_of
from edgellm.general.types import causal_types, nearest, transformers_version
from edgellm.models.protocol import Step, empty_state
from edgellm.models.registry import foreign_names
from edgellm.streaming import OwnWeights, resident

__all__ = ["has_transformers", "load_general", "open_general"]

_LOOKED_AT, _MOST_LOOKED_AT = 64, 512  # tokens that are compared; more, if a window is to be left
_CLOSE = 1e-3  # largest difference of logits, relative to the largest logit


def has_transformers() -> bool:
    """Whether transformers is installed; it is not imported."""
    return importlib.util.find_spec("transformers") is not None


def load_general(path: Path, *, trust_remote_code: bool = False, fused: bool = True) -> Checkpoint:
    """As :func:`open_general`, with every weight in memory."""
    opened = open_general(path, trust_remote_code=trust_remote_code, fused=fused)
    if opened.weights is None:
        return opened
    return dataclasses.replace(opened, model=fill(opened.model, opened.weights), weights=None)


def open_general(path: Path, *, trust_remote_code: bool = False, fused: bool = True) -> Checkpoint:
    """Read everything of any causal language model that the installed transformers knows but its weights.

    Args:
        path: a Hugging Face folder.
        trust_remote_code: whether to run Python code that the folder brings; never without the user's word.
        fused: as for :class:`GeneralModel`.

    Returns:
        The checkpoint, its model's parameters on the meta device, with ``weights`` to read them one by one; where
        transformers had to load them itself (a folder that only it can dequantize, an adapter), in memory and without.

    Raises:
        CheckpointError: transformers is not installed or does not know the model, or it has no form here.
    """
    config = read_json(path / "config.json")
    kind = str(config.get("model_type", ""))
    if not has_transformers():
        raise CheckpointError(
            f"{path}: {kind!r} is no architecture of edgellm's own, and transformers, through which others go, is not "
            "installed: install the extra hf"
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{path / 'config.json'}: {kind} has an encoder beside its decoder (is_encoder_decoder); the general road "
            f"knows decoders alone, and edgellm has files of its own for {', '.join(foreign_names('huggingface'))}"
        )
    _check_beside(path, config, trust_remote_code)
    _check_known(path, kind, config, trust_remote_code)
    floats, stored_as = (None, ()) if (path / ADAPTER_CONFIG).exists() else _as_floats(path, config)
    model, source, weights = _opened(path, floats, trust_remote_code)
    tokens = _tokens(model)
    vocab = int(model.config.get_text_config().vocab_size)
    with torch.no_grad(), resident(model, weights or OwnWeights(model), vocab_size=vocab):
        try:
            wanted = model(input_ids=tokens, use_cache=False).logits
        except FOREIGN_FAULTS as error:
            why = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: {kind}: transformers cannot run it on tokens alone ({why})") from error
        try:
            ours = GeneralModel(model, fused=fused).eval()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {kind}: {error}") from error
    weights = None if source is None else renamed(ours, Apart(source, ours.experts), "model", path)
    with resident(ours, weights or OwnWeights(ours)):
        _check(ours, tokens, wanted, f"{path}: {kind}")
    text = read_text_files(path, config)
    note = (
        f"{kind} took the general road through transformers: {ours.norms} norms and the rotation of {ours.rotating} of "
        f"{len(ours.layers)} layers recognised"
    )
    return Checkpoint(
        architecture=kind, model=ours, tokenizer_json=text.tokenizer_json, chat_template=text.chat_template,
        bos_token_id=text.bos_token_id, eos_token_ids=text.eos_token_ids, add_bos=text.add_bos,
        source=f"Hugging Face, {kind}, through transformers", special_tokens=text.special_tokens,
        weights=weights, generation=text.generation, notes=(note, *stored_as, *ours.notes, *text.notes),
    )  # fmt: skip


def _check_beside(path: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuse what transformers would leave aside without a word: the folder's own code, and an adapter without PEFT."""
    own = config.get("auto_map")
    if isinstance(own, Mapping) and any(name.startswith("AutoModel") for name in own) and not trust_remote_code:
        raise CheckpointError(
            f"{path}: auto_map says that code of the checkpoint's own computes the model; --trust-remote-code runs it, "
            "or remove the key if the code does what the model_type says"
        )
    if (path / ADAPTER_CONFIG).exists() and importlib.util.find_spec("peft") is None:
        raise CheckpointError(f"{path} has an adapter, which transformers loads with PEFT only; pip install peft")


def _check_known(path: Path, kind: str, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Refuse a type that the installed transformers has no causal language model of, naming those it may be."""
    known = causal_types()
    if kind in known or (trust_remote_code and config.get("auto_map")) or _registered(kind):
        return
    near = nearest(kind, known)
    raise UnsupportedError(
        f"{path / 'config.json'}: unknown architecture {kind!r}; edgellm loads "
        f"{', '.join(foreign_names('huggingface'))}, and what transformers {transformers_version()} has a causal "
        f"language model of" + (f"; did you mean {' or '.join(near)}?" if near else "")
    )


def _registered(kind: str) -> bool:
    """Whether the program has taught transformers a type of its own."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in AutoModelForCausalLM._model_mapping


def _opened(
    path: Path, floats: TensorSource | None, trust_remote_code: bool
) -> tuple[Any, Converted | None, CheckpointWeights | None]:
    """Transformers' model and where its weights are; None where it holds them, because it had to load them itself."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _offline(), _told(path):
        if floats is not None:
            found = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
            if hasattr(found, "quantization_config"):  # the weights are read as the floats that they stand for
                del found.quantization_config
            with built_without_weights():
                model = AutoModelForCausalLM.from_config(
                    found, trust_remote_code=trust_remote_code, dtype=torch.float32
                ).eval()
            with contextlib.suppress(CannotStream):
                return model, *weights_of(model, floats, path)
        model, said = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    if absent := sorted(said["missing_keys"]):
        raise CheckpointError(f"{path}: tensor {absent[0]} and {len(absent) - 1} more are missing; copy it again")
    return model.eval(), None, None


def _as_floats(path: Path, config: Mapping[str, Any]) -> tuple[TensorSource | None, tuple[str, ...]]:
    """The folder's tensors, quantized ones as floats, and a note on it; None where transformers alone may know how."""
    stored = find_weights(path)
    try:
        found = dequantized(config, stored, path)
    except CheckpointError:
        return None, ()
    return (stored, ()) if found is None else (found.source, (found.note,))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever transformers raises while it loads, as one sentence."""
    try:
        yield
    except (KeyboardInterrupt, CheckpointError):
        raise
    except Exception as error:  # transformers raises many kinds
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: transformers cannot load it as a causal language model: {why}") from error


def _tokens(model: Any) -> torch.Tensor:
    """Rows of random tokens, as long as a window needs to be left."""
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) or 0
    stated = int(getattr(text, "max_position_embeddings", 0) or 0)  # some say -1 for no bound
    context = stated if stated > 0 else _LOOKED_AT
    length = min(context, _MOST_LOOKED_AT, max(_LOOKED_AT, 2 * window))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, text.vocab_size, (1, length), generator=generator)


def _check(model: GeneralModel, tokens: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Hold the model as it was taken over, in two steps, against transformers' own.

    Raises:
        CheckpointError: it computes something else.
    """
    half, context = tokens.shape[1] // 2, min(model.config.max_context, tokens.shape[1])
    try:
        with torch.no_grad():
            first, state = model(tokens[:, :half], empty_state(model, 1, context))
            rest = Step.whole(tokens[:, half:context])._replace(past_lengths=torch.tensor([half], dtype=torch.int32))
            then, _ = model(tokens[:, half:context], state, rest)
    except FOREIGN_FAULTS as error:
        raise CheckpointError(f"{what}: {told(error)}") from error
    found, wanted = torch.cat([first, then], dim=1), wanted[:, :context]
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    if not apart <= _CLOSE:
        raise CheckpointError(
            f"{what}: taken over from transformers it computes something else (logits {apart:.1e} apart); it keeps a "
            "state or makes a mask that its interfaces do not tell of"
        )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let no hub be asked, and no bars be drawn, while a folder is read."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
