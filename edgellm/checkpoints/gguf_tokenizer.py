"""A ``tokenizer.json`` from the vocabulary that a GGUF file carries.

Pre-tokenizers follow each tokenizer's own ``tokenizer.json``; where there is none ("default"), llama.cpp's splits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from edgellm.checkpoints.files import tokenizer_errors
from edgellm.errors import CheckpointError

__all__ = ["adds_bos", "build_tokenizer", "special_tokens"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
SPACE = "\u2581"  # sentencepiece's visible space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class _Splitting:
    """How byte-level BPE cuts text before merging.

    Args:
        patterns: cut out in this order, each match a piece.
        nfc: whether text is normalised to NFC first.
        ignore_merges: whether a piece that is a token is taken whole.
        adds_bos: whether texts begin with the bos token unless the file says otherwise.
    """

    patterns: Sequence[str]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = _Splitting([_CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST], ignore_merges=True, adds_bos=True)
_QWEN2 = _Splitting([_CONTRACTIONS + _WORDS + r"\p{N}" + _REST], nfc=True)
_DIGITS = _Splitting([r"\p{N}", _GPT2])
SPLITTINGS: Mapping[str, _Splitting] = {
    "default": _Splitting([r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
    "gpt-2": _Splitting([_GPT2]),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
}


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> str | None:
    """The text of the ``tokenizer.json`` that does what the file's tokenizer does.

    Args:
        metadata: of the GGUF file.
        path: the file, for messages.

    Returns:
        The text, or None where the file carries no tokenizer.

    Raises:
        CheckpointError: the tokenizer is of an unknown kind or its tables contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in _BUILDERS:
        raise CheckpointError(f"{path}: unknown tokenizer {kind!r}; edgellm reads {', '.join(_BUILDERS)}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens or ())
    if not tokens or len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: its tokens are missing, repeated or without their types; convert it again")
    try:
        with tokenizer_errors("its tokenizer does not hold together", "convert it again"):
            tokenizer = _BUILDERS[kind](metadata, tokens, types)
            for special in (True, False):
                wanted = (CONTROL, UNKNOWN) if special else (USER_DEFINED,)
                added = [t for t, found in zip(tokens, types, strict=True) if found in wanted]
                tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in added])
            text: str = tokenizer.to_str()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return text


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether texts begin with the bos token: what the file says, else what its kind of tokenizer does."""
    said = metadata.get("tokenizer.ggml.add_bos_token")
    if said is not None:
        return bool(said)
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    splitting = SPLITTINGS.get(metadata.get("tokenizer.ggml.pre", "default"))
    return splitting is not None and splitting.adds_bos


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The names of the special tokens, by what transformers calls each."""
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    kinds = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "separator": "sep", "mask": "mask"}
    ids = {f"{ours}_token": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in kinds.items()}
    return {name: tokens[i] for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], _types: Sequence[int]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITTINGS:
        raise CheckpointError(f"unknown pre-tokenizer {name!r}; edgellm knows {', '.join(SPLITTINGS)}")
    splitting = SPLITTINGS[name]
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores", ())
    if len(scores) != len(tokens):
        raise CheckpointError(f"{len(tokens)} tokens have {len(scores)} scores; convert it again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    merges = _merges(vocabulary, scores, types)
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    prepend = [normalizers.Prepend(SPACE)] if prefixed else []
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Sentencepiece joins the neighbours whose union scores best; so every way to make a piece is a merge, by score."""
    merges: list[tuple[str, str]] = []
    pieces = [(token, i) for token, i in vocabulary.items() if types[i] == NORMAL]
    for token, _ in sorted(pieces, key=lambda piece: -scores[piece[1]]):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], Sequence[str], Sequence[int]], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
