"""A ``tokenizer.json`` from the files that came before it: tokenizer.model, source.spm and target.spm with vocab.json,
or vocab.json with merges.txt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from edgellm.checkpoints.files import read_json, read_text, tokenizer_errors
from edgellm.checkpoints.gguf_tokenizer import build_tokenizer
from edgellm.checkpoints.sentencepiece_model import BPE, read_sentencepiece
from edgellm.checkpoints.unigram_tokenizer import PAIR, pair_tokenizer
from edgellm.errors import CheckpointError

__all__ = ["older_tokenizer"]

_SPLITTINGS = {"GPT2Tokenizer": "gpt-2", "GPT2TokenizerFast": "gpt-2", "Qwen2Tokenizer": "qwen2",
               "Qwen2TokenizerFast": "qwen2"}  # fmt: skip


def older_tokenizer(directory: Path, settings: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """Build one from whatever older files are there.

    Args:
        directory: the checkpoint.
        settings: its ``tokenizer_config.json``.

    Returns:
        The text of the ``tokenizer.json``, or None; and what to say of it, a sentence or none.

    Raises:
        CheckpointError: the files are damaged.
    """
    if all((directory / name).exists() for name in PAIR):
        return pair_tokenizer(directory, settings)
    model, vocabulary, merges = (directory / name for name in ("tokenizer.model", "vocab.json", "merges.txt"))
    if model.exists():
        kind, reason = _sentencepiece(model)
        name = model.name
    elif vocabulary.exists() and merges.exists():
        kind, reason = _byte_pairs(vocabulary, merges, settings)
        name = f"{vocabulary.name} and {merges.name}"
    else:
        return None, ()
    if kind is None:
        return None, (
            f"no tokenizer could be built, because {name} {reason}; save a tokenizer.json beside it with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    built = build_tokenizer(kind, directory)
    assert built is not None  # which only a file without a tokenizer gives
    tokenizer = Tokenizer.from_str(built)
    with tokenizer_errors(f"{directory}: its added tokens do not fit", "copy the checkpoint again"):
        _add(tokenizer, directory, settings)
        text: str = tokenizer.to_str()
    return text, (f"the tokenizer was built from {name}, for there is no tokenizer.json",)


def _sentencepiece(path: Path) -> tuple[dict[str, Any] | None, str]:
    """As GGUF's metadata has it, or why not."""
    found = read_sentencepiece(path)
    if found.kind != BPE:
        return None, "is no byte-pair encoding"
    if found.rewrites or found.remove_extra_whitespaces:
        return None, "rewrites characters or spaces before it encodes"
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(found.pieces),
        "tokenizer.ggml.scores": list(found.scores),
        "tokenizer.ggml.token_type": list(found.types),
        "tokenizer.ggml.add_space_prefix": found.add_dummy_prefix,
    }, ""


def _byte_pairs(vocabulary: Path, merges: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    kind = settings.get("tokenizer_class")
    if kind not in _SPLITTINGS:
        return None, f"do not say how text is split, and tokenizer_class is {kind!r}"
    ids = read_json(vocabulary)
    tokens = sorted(ids, key=lambda token: ids[token] if type(ids[token]) is int else -1)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(f"{vocabulary} does not number its tokens from 0; copy the checkpoint again")
    lines = [line for line in read_text(merges).splitlines() if line and not line.startswith("#version")]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _SPLITTINGS[kind],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": lines,
    }, ""


def _add(tokenizer: Tokenizer, directory: Path, settings: Mapping[str, Any]) -> None:
    """The tokens that were added to the vocabulary, each with the id that it is to have."""
    older = directory / "added_tokens.json"
    wanted = {i: AddedToken(t, normalized=False) for t, i in (read_json(older) if older.exists() else {}).items()}
    for i, said in (settings.get("added_tokens_decoder") or {}).items():
        wanted[int(i)] = AddedToken(
            said["content"], special=bool(said.get("special")), normalized=bool(said.get("normalized")),
            lstrip=bool(said.get("lstrip")), rstrip=bool(said.get("rstrip")), single_word=bool(said.get("single_word")),
        )  # fmt: skip
    for i in sorted(wanted):
        tokenizer.add_tokens([wanted[i]])
        if tokenizer.token_to_id(wanted[i].content) != i:
            raise CheckpointError(f"{directory}: token {wanted[i].content!r} should be {i}, which is taken or too far")
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        said = settings.get(name)
        content = said.get("content") if isinstance(said, dict) else said
        if isinstance(content, str) and tokenizer.token_to_id(content) is not None:
            tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False)])
