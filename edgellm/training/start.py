"""What a run begins with besides its data: a model, fresh or a checkpoint's, and the tokenizer that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import nn

from edgellm.checkpoints import load_checkpoint
from edgellm.errors import TrainingError
from edgellm.models import registry
from edgellm.models.protocol import answers_sources, reads_in_one_pass
from edgellm.training.lora import adapt
from edgellm.training.run_config import DATA, TOKENIZER, RunConfig
from edgellm.training.tokenizer import end_of_text_id, read_tokenizer_file, train_tokenizer

__all__ = ["Start", "prepare_tokenizer", "start_of"]


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Args:
        build: the model; takes fields of its configuration that the data decides.
        architecture: its name in the registry.
        tokenizer: its tokenizer.
        end: the token that ends a text.
        text: what checkpoints say of the tokenizer: keywords of :func:`edgellm.checkpoints.save_checkpoint`.
        source: the checkpoint, or None for fresh weights.
        start_tokens: what answers begin with, of a model that answers sources; none: it goes on with texts.
        one_pass: whether the model reads rows in one pass.
    """

    build: Callable[..., nn.Module]
    architecture: str
    tokenizer: Tokenizer
    end: int
    text: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    start_tokens: tuple[int, ...] = ()
    one_pass: bool = False


def prepare_tokenizer(
    config: RunConfig, out: Path, texts: Callable[[], Iterable[str]], special: tuple[str, ...] = (), *,
    resume: bool = False,
) -> None:  # fmt: skip
    """Put the tokenizer of fresh weights into a run's folder; a checkpoint brings its own.

    Args:
        config: the run; its ``tokenizer`` is taken if it names one.
        out: the run's folder.
        texts: to train one on.
        special: names of its further special tokens.
        resume: whether one that is there is kept.

    Raises:
        TrainingError: no text, or a file that is no tokenizer.
    """
    path = out / DATA / TOKENIZER
    if config.init is not None or (resume and path.exists()):
        return
    if config.tokenizer is not None:
        tokenizer = read_tokenizer_file(config.tokenizer)
    else:
        tokenizer = train_tokenizer(texts(), config.model["vocab_size"], special)
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f"{TOKENIZER}.tmp")
    pending.write_text(tokenizer.to_str(), encoding="utf-8")
    pending.replace(path)


def start_of(config: RunConfig, out: Path) -> Start:
    """What a run begins with, adapters not yet put in; see :func:`Start`.

    Raises:
        TrainingError: a checkpoint without a tokenizer or an end token.
        CheckpointError: one that cannot be read.
        ConfigError: an impossible model.
    """
    found = _fresh(config, out) if config.init is None else _from_checkpoint(config.init)
    if found.one_pass and config.task != "srl":
        raise TrainingError(
            f"the {found.architecture} model labels words and goes on with no text; train it with --task srl"
        )
    if not config.lora:
        return found

    def build(**fields: Any) -> nn.Module:
        model = found.build(**fields)
        adapt(model, config.lora, config.lora_alpha or 2.0 * config.lora)
        return model

    return dataclasses.replace(found, build=build)


def _fresh(config: RunConfig, out: Path) -> Start:
    tokenizer = Tokenizer.from_file(str(out / DATA / TOKENIZER))
    architecture = registry.find(config.architecture)
    size: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    end = end_of_text_id(tokenizer)
    known = {field.name for field in dataclasses.fields(architecture.config)}
    answers = "start_tokens" in known
    if answers:
        size["start_tokens"] = [end]  # which ends the source, so to say, and begins the answer

    def build(**fields: Any) -> nn.Module:
        if unknown := sorted(fields.keys() - known):
            raise TrainingError(
                f"the {architecture.name} model has no {unknown[0]}, so that it labels no words; use tagger or hybrid"
            )
        apart = {"tie_embeddings": False} if fields and "tie_embeddings" in known else {}  # labels are no tokens
        return architecture.build(architecture.config.from_json({**config.model, **size, **apart, **fields}))

    one_pass = reads_in_one_pass(architecture.config.from_json({**config.model, **size}))
    start, text = (end,) if answers else (), {"eos_token_ids": (end,)}
    return Start(build, config.architecture, tokenizer, end, text, start_tokens=start, one_pass=one_pass)


def _from_checkpoint(path: Path) -> Start:
    loaded = load_checkpoint(path)
    if loaded.apart:
        raise TrainingError(
            f"{path} has an adapter that gives shared blocks weights of their own at each place, which no "
            "checkpoint of edgellm's can say; train the base, and name the adapter when it is exported"
        )
    if loaded.tokenizer_json is None or not loaded.eos_token_ids:
        raise TrainingError(f"{path} has no tokenizer, or none with an end token; begin with another checkpoint")
    text = {
        "eos_token_ids": loaded.eos_token_ids, "bos_token_id": loaded.bos_token_id, "add_bos": loaded.add_bos,
        "add_eos": loaded.add_eos, "chat_template": loaded.chat_template, "special_tokens": loaded.special_tokens,
        "generation": loaded.generation,
    }  # fmt: skip

    def build(**fields: Any) -> nn.Module:
        if fields:
            raise TrainingError(f"{path} predicts tokens and cannot be taught labels; train srl from fresh weights")
        return loaded.model.float()

    tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
    config: Any = loaded.model.config
    start = tuple(config.start_tokens) if answers_sources(loaded.model) else ()
    one_pass = reads_in_one_pass(config)
    return Start(build, loaded.architecture, tokenizer, loaded.eos_token_ids[0], text, path, start, one_pass)
