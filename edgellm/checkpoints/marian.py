"""Folders of the Bergamot project's translators: a configuration, Marian's model, a vocabulary and a shortlist."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from edgellm.checkpoints.assemble import assemble
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.marian_file import MarianSource, read_lists, read_shortlist
from edgellm.checkpoints.marian_npz import NpzSource, read_vocabulary
from edgellm.checkpoints.unigram_tokenizer import pair_tokenizer, unigram_tokenizer
from edgellm.checkpoints.weights import Layout
from edgellm.errors import CheckpointError, ModelError
from edgellm.models.registry import Architecture, find_foreign

__all__ = ["marian_config", "marian_npz", "open_marian", "open_marian_npz"]

_END = 0  # Marian's token that ends a text
_MOST = 64 << 10  # bytes of a configuration


def marian_config(path: Path) -> Path | None:
    """The file of a folder that says which files a translator is made of; None where there is none."""
    found = sorted(path.glob("config*.yml"))
    return found[0] if len(found) == 1 and found[0].is_file() and found[0].stat().st_size <= _MOST else None


def marian_npz(path: Path) -> Path | None:
    """The only ``.npz`` file of a folder that says how it is decoded; None where there is none."""
    found = sorted(path.glob("*.npz"))
    return found[0] if len(found) == 1 and (path / "decoder.yml").is_file() else None


def open_marian_npz(weights: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read a folder as OPUS-MT publishes them: a model in ``.npz``, its vocabulary and sentencepiece models.

    Args:
        weights: of :func:`marian_npz`.
        dtype: what weights will be read as.

    Raises:
        CheckpointError: as :func:`edgellm.checkpoints.open_checkpoint`.
    """
    path, source = weights.parent, NpzSource(weights)
    lists = read_lists((path / "decoder.yml").read_bytes()[:_MOST])
    vocabularies = set(_files(path / "decoder.yml", lists, "vocabs"))
    if len(vocabularies) != 1:
        raise CheckpointError(f"{path / 'decoder.yml'} names two vocabularies; edgellm reads one for both sides")
    numbers = read_vocabulary(vocabularies.pop())
    size = source.shapes.get("Wemb", (0,))[0]
    if size != len(numbers) + 1:
        raise CheckpointError(
            f"{weights} has {size - 1} embeddings and its vocabulary {len(numbers)} tokens; copy it again"
        )
    architecture, ours = _translated(source, size, weights)
    assert architecture.marian is not None
    ours = dataclasses.replace(ours, start_tokens=(size - 1,))
    model, read = assemble(architecture, ours, source, Layout(name=architecture.marian.name), dtype=dtype, path=path)
    start = "<pad>" if "<pad>" not in numbers else "<answer>"
    tokenizer, notes = pair_tokenizer(path, {}, {**numbers, start: size - 1})
    return Checkpoint(
        architecture=architecture.name, model=model, tokenizer_json=tokenizer, chat_template=None, bos_token_id=None,
        eos_token_ids=(_END,), add_bos=False, add_eos=True, source="Marian npz, float32", weights=read,
        generation={"banned_tokens": [size - 1]}, notes=notes,
    )  # fmt: skip


def open_marian(config: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read such a folder.

    Args:
        config: of :func:`marian_config`.
        dtype: what weights will be read as.

    Raises:
        CheckpointError: as :func:`edgellm.checkpoints.open_checkpoint`.
    """
    path, lists = config.parent, read_lists(config.read_bytes())
    weights, *others = _files(config, lists, "models")
    vocabularies = _files(config, lists, "vocabs")
    if others or len(set(vocabularies)) != 1:
        raise CheckpointError(f"{config} names several models, or two vocabularies; edgellm reads one of each")
    source = MarianSource(weights)
    size = source.shapes.get("Wemb", (0,))[0]
    if lists.get("shortlist"):
        source.shortlist = read_shortlist(_files(config, lists, "shortlist")[0], size)
    architecture, ours = _translated(source, size, weights)
    assert architecture.marian is not None
    layout = Layout(name=architecture.marian.name)
    model, read = assemble(architecture, ours, source, layout, dtype=dtype, path=path)
    notes = ("words of answers are those of the shortlist, and the commonest",) if source.shortlist else ()
    return Checkpoint(
        architecture=architecture.name, model=model, tokenizer_json=unigram_tokenizer(vocabularies[0]),
        chat_template=None, bos_token_id=None, eos_token_ids=(_END,), add_bos=False, add_eos=True,
        source=f"Marian {'8 bits' if source.coded else 'float32'}, {source.settings['dec-cell']}", weights=read,
        notes=notes,
    )  # fmt: skip


def _translated(source: MarianSource | NpzSource, size: int, path: Path) -> tuple[Architecture, Any]:
    try:
        said, answers = source.settings, "transformer-decoder-autoreg"
        recurrent = said.get(answers, "rnn") == "rnn"
        architecture = find_foreign("marian", said.get("dec-cell", "") if recurrent else said[answers])
        assert architecture.marian is not None
        fields: dict[str, Any] = {"vocab_size": size, **architecture.marian.read(source.settings)}
        if source.shortlist is not None:
            fields |= {"listed": source.shortlist.table.shape[1], "commonest": source.shortlist.commonest}
        return architecture, architecture.config(**fields)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _files(config: Path, lists: dict[str, list[str]], key: str) -> list[Path]:
    """Files beside the configuration; of a shortlist, the first of what is listed."""
    names = lists.get(key, [])[: 1 if key == "shortlist" else None]
    if not names:
        raise CheckpointError(f"{config} names no {key}; copy the folder again")
    for name in names:
        if Path(name).name != name or not (config.parent / name).is_file():
            raise CheckpointError(f"{config} names {name!r}, which is no file beside it; copy it there")
    return [config.parent / name for name in names]
