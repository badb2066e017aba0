"""Tokens to text, one token at a time, at constant cost and without half characters.

A tokenizer's decoder is read once into a :class:`Pieces`: the bytes that each token stands for. Where a decoder is not
of that kind (WordPiece, BPE with word suffixes), a short window of tokens is decoded again by the library instead.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

__all__ = ["Pieces", "StreamDecoder"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WINDOW = 6  # tokens that a windowed decoder decodes again; its rules look at neighbours only


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[c] for c in token)
    except KeyError:  # an added token, whose text stands for itself
        return token.encode()


class Pieces:
    """What each token contributes to the text, as bytes.

    Args:
        library: the tokenizer.
        hidden: ids that contribute nothing, such as special tokens.
    """

    def __init__(self, library: Library, hidden: frozenset[int]) -> None:
        self._library = library
        self._hidden = hidden
        self._known: dict[int, bytes] = {}
        self._first: Callable[[bytes], bytes] | None = None  # what happens to the start of the text
        self._rule = self._read(_decoders(library))

    @property
    def local(self) -> bool:
        """Whether every token has bytes of its own, so that :meth:`of` may be called."""
        return self._rule is not None

    def of(self, token: int) -> bytes:
        """The bytes of one token; none for a hidden or unknown one."""
        known = self._known.get(token)
        if known is None:
            text = None if token in self._hidden else self._library.id_to_token(token)
            assert self._rule is not None
            known = self._known[token] = b"" if text is None else self._rule(text)
        return known

    def start(self, piece: bytes) -> bytes:
        """The same for the first token that contributes anything, which may lose a leading space."""
        return self._first(piece) if self._first else piece

    def window(self, tokens: Sequence[int]) -> str:
        """The library's own decoding of a few tokens."""
        text: str = self._library.decode([t for t in tokens if t not in self._hidden], skip_special_tokens=False)
        return text

    def _read(self, decoders: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
        kinds = [d["type"] for d in decoders]
        if kinds == ["ByteLevel"]:
            return _byte_level
        if kinds == ["Metaspace"]:
            mark = str(decoders[0]["replacement"])
            if decoders[0].get("prepend_scheme", "always") != "never":
                self._first = lambda piece: piece.lstrip(b" ")
            return lambda token: token.replace(mark, " ").encode()
        return self._read_sentencepiece(kinds, decoders)

    def _read_sentencepiece(self, kinds: list[str], decoders: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
        """Replace*, ByteFallback, Fuse, and a Strip of the text's leading spaces: Llama 2's form and its kin."""
        head = kinds.index("ByteFallback") if "ByteFallback" in kinds else 0
        if kinds[head:] not in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
            return None
        if any(d["type"] != "Replace" or "String" not in d["pattern"] for d in decoders[:head]):
            return None
        swaps = [(str(d["pattern"]["String"]), str(d["content"])) for d in decoders[:head]]
        if kinds[-1] == "Strip":
            last = decoders[-1]
            if last["stop"] or last["content"] != " ":
                return None
            limit = int(last["start"])
            self._first = lambda piece: piece[min(limit, len(piece) - len(piece.lstrip(b" "))) :]

        def rule(token: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(token)
            if byte:
                return bytes([int(byte[1], 16)])
            for old, new in swaps:
                token = token.replace(old, new)
            return token.encode()

        return rule


def _decoders(library: Library) -> list[dict[str, Any]]:
    """The decoder as the tokenizer's file describes it, sequences flattened."""
    if library.decoder is None:
        return []
    flat, queue = [], [json.loads(library.decoder.__getstate__())]
    while queue:
        item = queue.pop(0)
        if item["type"] == "Sequence":
            queue[:0] = item["decoders"]
        else:
            flat.append(item)
    return flat


class StreamDecoder:
    """Turns tokens into text as they come.

    The texts that :meth:`push` and :meth:`finish` give, joined, are exactly ``Tokenizer.decode`` of all the tokens.
    A character whose bytes have not all come is held back; U+FFFD appears only for bytes that can no longer become
    a character. The cost of a token does not grow with the text.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._started = False
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        if not self._pieces.local:
            return self._push_windowed(token)
        piece = self._pieces.of(token)
        if piece and not self._started:
            piece, self._started = self._pieces.start(piece), True
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """The rest: U+FFFD where a character stayed incomplete."""
        text = self._emit() if self._held else ""
        return text + self._utf8.decode(b"", final=True)

    def _push_windowed(self, token: int) -> str:
        self._held.append(token)
        if len(self._held) < _WINDOW and self._pieces.window(self._context + self._held).endswith("\ufffd"):
            return ""
        return self._emit()

    def _emit(self) -> str:
        before = self._pieces.window(self._context)
        text = self._pieces.window(self._context + self._held)[len(before) :]
        self._context = (self._context + self._held)[-_WINDOW:]
        self._held = []
        return text
