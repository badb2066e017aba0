"""A ``tokenizer.json`` from sentencepiece's unigram models: of one vocabulary, or of a pair as Marian's folders have.

In a pair, one model cuts sources into pieces, another joins those of answers, and a list numbers the pieces of both.
Pieces that only the second knows must not be found in sources: in the tokenizer they begin with :data:`HIDDEN`, which
no text holds and decoding takes away. Single characters are found all the same, for one that the first does not know
is looked up as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from edgellm.checkpoints.files import read_json, tokenizer_errors
from edgellm.checkpoints.sentencepiece_model import UNIGRAM, SentencePieceModel, read_sentencepiece
from edgellm.errors import CheckpointError

__all__ = ["HIDDEN", "PAIR", "pair_tokenizer", "unigram_tokenizer"]

HIDDEN = "\ufdd0"  # a noncharacter, which texts do not hold
PAIR = ("source.spm", "target.spm", "vocab.json")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes for a space
_CONTROL, _UNKNOWN = 3, 2  # types of pieces
_NEVER = -1e4  # the score of a piece that texts are never cut into
_PENALTY = 10.0  # sentencepiece's, of what it does not know, below the least score


def unigram_tokenizer(path: Path, end: str = "</s>") -> str:
    """The tokenizer of one model; the numbers of its pieces are their places.

    Args:
        path: sentencepiece's file.
        end: the piece that ends a text.

    Raises:
        CheckpointError: it is damaged, or no unigram model.
    """
    found = _unigram(path)
    vocabulary = [
        (piece, score if kind not in (_CONTROL, _UNKNOWN) else _NEVER)
        for piece, score, kind in zip(found.pieces, found.scores, found.types, strict=True)
    ]
    unknown = next((i for i, kind in enumerate(found.types) if kind == _UNKNOWN), None)
    names = [piece for piece, kind in zip(found.pieces, found.types, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    return _built(found, vocabulary, unknown, [*names, *([end] if end in found.pieces else [])], path)


def pair_tokenizer(
    directory: Path, settings: Mapping[str, Any], numbers: Mapping[str, Any] | None = None
) -> tuple[str, tuple[str, ...]]:
    """The tokenizer of a folder with :data:`PAIR`; it reads sources, and writes answers.

    Args:
        directory: the folder.
        settings: its ``tokenizer_config.json``.
        numbers: of the tokens; None for what its ``vocab.json`` says.

    Returns:
        The text of the ``tokenizer.json``, and what to say of it.

    Raises:
        CheckpointError: a file is damaged, or the pieces are not numbered from 0.
    """
    source, target, listed = (directory / name for name in PAIR)
    numbers = read_json(listed) if numbers is None else numbers
    found = _unigram(source)
    _unigram(target)  # what it joins, joining does without it
    tokens = sorted(numbers, key=lambda token: numbers[token] if type(numbers[token]) is int else -1)
    if [numbers[token] for token in tokens] != list(range(len(tokens))):
        raise CheckpointError(f"{listed} does not number its tokens from 0; copy the checkpoint again")
    scores = {
        piece: score for piece, score, kind in zip(found.pieces, found.scores, found.types, strict=True)
        if kind not in (_CONTROL, _UNKNOWN)
    }  # fmt: skip
    special = [str(settings.get(f"{kind}_token") or usual) for kind, usual in _SPECIAL.items()]
    codes = [token for token in tokens if token.startswith(">>") and token.endswith("<<")]
    apart = {*special, *codes}
    least = min(scores.values(), default=0.0)

    def entry(token: str) -> tuple[str, float]:
        if token in apart:
            return token, _NEVER
        if token in scores:
            return token, scores[token]
        return (token, least - _PENALTY) if len(token) == 1 else (f"{HIDDEN}{token}", least)

    vocabulary = [entry(token) for token in tokens]
    unknown = numbers.get(special[1])
    lost = sorted(piece for piece in scores if piece not in numbers)
    notes = [f"the tokenizer was built from {', '.join(PAIR)}, for there is no tokenizer.json"]
    if lost:
        notes.append(
            f"{len(lost)} pieces of {source.name}, such as {lost[0]!r}, have no number, so that texts which hold them "
            "are cut otherwise than by transformers"
        )
    text = _built(found, vocabulary, unknown, [name for name in special if name in numbers], source, codes=codes)
    return _ending(text, special[0], numbers), tuple(notes)


_SPECIAL = {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


def _unigram(path: Path) -> SentencePieceModel:
    found = read_sentencepiece(path)
    if found.kind != UNIGRAM:
        raise CheckpointError(f"{path} is no unigram model; save a tokenizer.json beside it")
    return found


def _built(
    found: SentencePieceModel, vocabulary: list[tuple[str, float]], unknown: int | None, special: list[str],
    path: Path, codes: list[str] | None = None,
) -> str:  # fmt: skip
    with tokenizer_errors(f"{path} gives no tokenizer", "copy the checkpoint again"):
        model = models.Unigram(vocabulary, unk_id=unknown, byte_fallback=found.byte_fallback)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(_normalizers(found))
        if found.add_dummy_prefix:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False)
        joined: list[Any] = [decoders.Replace(HIDDEN, ""), decoders.Replace(_SPACE, " ")]
        if found.byte_fallback:
            joined.append(decoders.ByteFallback())
        joined.append(decoders.Fuse())
        tokenizer.decoder = decoders.Sequence(
            [*joined, *([decoders.Strip(" ", 1, 0)] if found.add_dummy_prefix else [])]
        )
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
        tokenizer.add_tokens([AddedToken(code, normalized=False, rstrip=True) for code in codes or ()])
        text: str = tokenizer.to_str()
    return text


def _normalizers(found: SentencePieceModel) -> list[Any]:
    """In sentencepiece's order."""
    made: list[Any] = [normalizers.Precompiled(found.charsmap)] if found.charsmap else []
    if found.remove_extra_whitespaces:
        made += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    made.append(normalizers.Replace(" ", _SPACE))
    if found.add_dummy_prefix:  # which the tokenizers library leaves out before a text that begins with its sign
        made.append(normalizers.Replace(Regex(rf"\A{_SPACE}"), 2 * _SPACE))
    return made


def _ending(text: str, end: str, numbers: Mapping[str, Any]) -> str:
    """The same with a post-processor that ends every source, as Marian's do."""
    if end not in numbers:
        return text
    data = json.loads(text)
    last = {"SpecialToken": {"id": end, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    data["post_processor"] = {
        "type": "TemplateProcessing", "single": [one, last], "pair": [one, two, last],
        "special_tokens": {end: {"id": end, "ids": [numbers[end]], "tokens": [end]}},
    }  # fmt: skip
    return json.dumps(data, ensure_ascii=False, allow_nan=False)
