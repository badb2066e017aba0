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
_LONGEST_CHARACTER = 4  # bytes of UTF-8


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
        guard: runs what the library may fail in, and names the tokenizer where it does.
    """

    def __init__(
        self, library: Library, hidden: frozenset[int], guard: Callable[[Callable[[], Any]], Any] = lambda run: run()
    ) -> None:
        self._library, self._guard = library, guard
        self._hidden = hidden
        self._known: dict[int, bytes] = {}
        self._first: Callable[[str], bytes] | None = None  # the rule of the text's first token, if it is another
        self.strip = 0  # how many spaces the text loses at its start
        self._rule = self._read(_decoders(library))

    @property
    def local(self) -> bool:
        """Whether every token has bytes of its own, so that :meth:`of` may be called."""
        return self._rule is not None

    def of(self, token: int) -> bytes:
        """The bytes of one token; none for a hidden or unknown one."""
        known = self._known.get(token)
        if known is None:
            text = self._text(token)
            assert self._rule is not None
            known = self._known[token] = b"" if text is None else self._rule(text)
        return known

    def start(self, token: int, spaces: int) -> tuple[bytes, int]:
        """The bytes of a token at the text's start, where a decoder may drop spaces.

        Args:
            token: one that contributes something.
            spaces: how many may still be dropped.

        Returns:
            The bytes, and how many spaces of the next token may be dropped.
        """
        text = self._text(token)
        if self._first is not None and text is not None:
            return self._first(text), 0
        piece = self.of(token)
        dropped = min(spaces, len(piece) - len(piece.lstrip(b" ")))
        return piece[dropped:], spaces - dropped if dropped == len(piece) else 0

    def visible(self, token: int) -> bool:
        """Whether a token is there and has a text."""
        return self._text(token) is not None

    def tail(self, tokens: Sequence[int]) -> Sequence[int]:
        """The last tokens of a text, as many as what follows can depend on."""
        enough = _LONGEST_CHARACTER + self.strip if self.local else 2 * _WINDOW
        held = 0
        for start in range(len(tokens) - 1, -1, -1):
            held += len(self.of(tokens[start])) if self.local else self.visible(tokens[start])
            if held >= enough:
                return tokens[start:]
        return tokens

    def window(self, tokens: Sequence[int]) -> str:
        """The library's own decoding of a few visible tokens."""
        text: str = self._guard(lambda: self._library.decode(tokens, skip_special_tokens=False))
        return text

    def _text(self, token: int) -> str | None:
        return None if token in self._hidden else self._library.id_to_token(token)

    def _read(self, decoders: list[dict[str, Any]]) -> Callable[[str], bytes] | None:
        kinds = [d["type"] for d in decoders]
        if kinds == ["ByteLevel"]:
            return _byte_level
        if kinds == ["Metaspace"]:
            mark = str(decoders[0]["replacement"])
            if decoders[0].get("prepend_scheme", "always") != "never":
                self._first = lambda token: token.replace(mark, "").encode()
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
            self.strip = int(last["start"])

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

    The texts that :meth:`push` and :meth:`finish` give, joined, are exactly what the tokens add to the text before
    them: ``Tokenizer.decode`` of all, less that of what came before. A decoder that drops the first space of a text
    therefore leaves that of an answer, which goes on with its prompt. A character whose bytes have not all come is held
    back, even one that the text before has begun; U+FFFD appears only for bytes that can no longer become a character.
    The cost of a token does not grow with the text.

    Args:
        pieces: of the tokenizer.
        after: the tokens of the text before; none at the start of one.
    """

    def __init__(self, pieces: Pieces, after: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._held: list[int] = []
        before = pieces.tail(after)
        self._started = len(before) < len(after)  # what is left out has a text
        self._spaces = pieces.strip
        for token in before:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        if not self._pieces.local:
            return self._push_windowed(token)
        piece = self._pieces.of(token)
        if piece and not self._started:
            piece, self._spaces = self._pieces.start(token, self._spaces)
            self._started = self._spaces == 0
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """The rest: U+FFFD where a character stayed incomplete."""
        text = self._emit() if self._held else ""
        return text + self._utf8.decode(b"", final=True)

    def _push_windowed(self, token: int) -> str:
        if not self._pieces.visible(token):
            return ""
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
