"""Text to token ids and back, from a bundle's ``tokenizer.json``. The file is untrusted.

Text from people is not a program: unless asked, the names of special tokens inside it (``<|im_end|>``) are encoded as
the characters they are, so that a prompt cannot close its own turn or open another role's.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_runtime.arguments import check_flag, check_integer, check_text, shown
from edgellm_runtime.errors import BundleError, OptionError, first_line
from edgellm_runtime.text.decoding import Pieces, StreamDecoder
from edgellm_runtime.text.patterns import patterns_in, slow_part

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

    from edgellm_runtime.bundle import TokenizerInfo

__all__ = ["Tokenizer", "check_info", "check_tokens"]

_MAX_GROWTH = 4096  # times that a text may grow when it is normalised, or a token when it is decoded
_CHOICES = 16  # of special tokens that are shown, whose pieces are kept


class Tokenizer:
    """A bundle's tokenizer.

    Args:
        path: the ``tokenizer.json``.
        info: the manifest's entry for it.
        vocab_size: how many ids the model knows.
        data: what the file holds, where it has been read already.

    Raises:
        BundleError: the file cannot be read as a tokenizer, or names tokens that the model does not have.
    """

    def __init__(self, path: Path, info: TokenizerInfo, *, vocab_size: int, data: bytes | None = None) -> None:
        self._path = path
        self._library = _read(path, data)
        self._vocab_size = vocab_size
        self._lock = threading.Lock()  # the library's special-token switch is a property of the object, not of a call
        self.bos_token_id = info.bos_token_id
        self.eos_token_id = info.eos_token_ids[0] if info.eos_token_ids else None  # the one that a template writes
        self.eos_token_ids = frozenset(info.eos_token_ids)
        self.special_tokens = dict(info.special_tokens)  # by the names that templates have for them
        self.add_bos = info.add_bos and info.bos_token_id is not None
        self.source_end = list(info.eos_token_ids[:1]) if info.add_eos else []  # what a plain source ends with
        check_info(path, info, vocab_size)
        added = self._library.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, t in added.items() if t.special)
        self._unknown = self._library.token_to_id(getattr(self._library.model, "unk_token", None) or "")
        self._pieces = self._guard(lambda: Pieces(self._library, self.special_ids, self._guard))
        self._chosen: dict[frozenset[int], Pieces] = {}

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; lone surrogates are refused.
            bos: begin with the bos token, if the model has one.
            special: read the names of special tokens in the text as those tokens. Never for text from outside.

        Raises:
            OptionError: no text, or one that holds half a surrogate pair, which no encoding can carry.
            BundleError: the tokenizer gives an id that the model does not have.
        """
        check_text("text", text)
        ids: list[int] = self._encode(text, special=check_flag("special", special)).ids
        if ids and max(ids) >= self._vocab_size:
            raise _foreign(self._path, max(ids), self._vocab_size)
        return [self.bos_token_id, *ids] if check_flag("bos", bos) and self.bos_token_id is not None else ids

    def to_json(self) -> str:
        """The text of a ``tokenizer.json`` that says the same, for libraries that read one."""
        text: str = self._library.to_str()
        return text

    def special_spans(self, text: str) -> list[tuple[int, int, int]]:
        """Where a text names special tokens: (start, end, id) in characters, in order."""
        found = self._encode(check_text("text", text), special=True)
        spans = [(a, b, i) for i, (a, b) in zip(found.ids, found.offsets, strict=True) if i in self.special_ids]
        # what no token has is not the name of the token that stands for it
        return [s for s in spans if s[2] != self._unknown or text[s[0] : s[1]].strip() == self.token_text(s[2])]

    def decode(self, tokens: Iterable[int], *, after: Iterable[int] = (), skip_special: bool = True) -> str:
        """The text of tokens.

        Args:
            tokens: ids.
            after: the tokens before them, when they go on with a text: theirs is then what they add to it.
            skip_special: whether special tokens have no text; else it is their names.

        Raises:
            OptionError: an id that the model does not have.
        """
        stream = self.stream(after=self.check(after), skip_special=skip_special)
        return "".join([stream.push(t) for t in self.check(tokens)]) + stream.finish()

    def stream(
        self, *, after: Sequence[int] = (), skip_special: bool = True, shown: Iterable[int] = ()
    ) -> StreamDecoder:
        """A decoder for tokens that come one by one.

        Args:
            after: the tokens of the text that they go on with.
            skip_special: as for :meth:`decode`.
            shown: special tokens that are not skipped.
        """
        pieces = self._pieces if check_flag("skip_special", skip_special) else self._all_pieces
        if skip_special and (names := self.special_ids.intersection(self.check(shown))):
            pieces = self._pieces_without(self.special_ids - names)
        return StreamDecoder(pieces, self.check(after))

    def _pieces_without(self, hidden: frozenset[int]) -> Pieces:
        """Pieces of a choice of special tokens; servers make the same few again and again."""
        if hidden not in self._chosen and len(self._chosen) < _CHOICES:
            self._chosen[hidden] = self._guard(lambda: Pieces(self._library, hidden, self._guard))
        found = self._chosen.get(hidden)
        return self._guard(lambda: Pieces(self._library, hidden, self._guard)) if found is None else found

    @cached_property
    def _all_pieces(self) -> Pieces:
        """With special tokens' names."""
        return self._guard(lambda: Pieces(self._library, frozenset(), self._guard))  # type: ignore[no-any-return]

    def check(self, tokens: Iterable[int]) -> list[int]:
        """The tokens as a list of ints, every one of them known to the model.

        Raises:
            OptionError: an id outside the vocabulary.
        """
        return check_tokens(tokens, self._vocab_size)

    def token_id(self, name: str) -> int | None:
        """The id of a special token, such as ``<|im_end|>``; None if there is none of that name."""
        if check_text("name", name) != name.encode(errors="ignore").decode():
            return None  # half a surrogate pair, which the library does not take
        found: int | None = self._library.token_to_id(name)
        return found if found in self.special_ids else None

    def token_text(self, token: int | None) -> str | None:
        """How the tokenizer's file writes a token, such as ``<|im_end|>``."""
        return None if token is None else self._library.id_to_token(*self.check([token]))

    def token_bytes(self, token: int) -> bytes:
        """What a token by itself adds to a text, as bytes: part of a character perhaps; of a special token its name."""
        (token,), pieces = self.check([token]), self._all_pieces
        if pieces.local:
            return pieces.of(token)
        return pieces.window([token]).encode() if pieces.visible(token) else b""

    def _encode(self, text: str, *, special: bool) -> Any:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise OptionError(f"the text holds half a surrogate pair at character {e.start}; decode it properly") from e

        def run() -> Any:
            with self._lock:
                self._library.encode_special_tokens = not special
                return self._library.encode(text, add_special_tokens=False)

        return self._guard(run)

    def _guard(self, run: Any) -> Any:
        try:
            return run()
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as e:  # the library's panics are no Exceptions
            raise BundleError(f"{self._path}: the tokenizer failed ({first_line(e)}); export the model again") from e


def check_info(path: Path, info: TokenizerInfo, vocab_size: int) -> None:
    """See that the model has the tokens that a manifest names.

    Args:
        path: the ``tokenizer.json``, for the message.
        info: the manifest's entry for it.
        vocab_size: how many ids the model knows.

    Raises:
        BundleError: an id outside the vocabulary.
    """
    for token in (*([] if info.bos_token_id is None else [info.bos_token_id]), *info.eos_token_ids):
        if not 0 <= token < vocab_size:
            raise _foreign(path, token, vocab_size)


def _foreign(path: Path, token: int, vocab_size: int) -> BundleError:
    return BundleError(
        f"{path}: token id {token} is outside the model's vocabulary of {vocab_size}; "
        "export the model with its own tokenizer"
    )


def check_tokens(tokens: Iterable[int], vocab_size: int) -> list[int]:
    """The tokens as a list of ints below ``vocab_size``.

    Raises:
        OptionError: an id outside the vocabulary, or no integer.
    """
    try:
        if isinstance(tokens, (str, bytes, bytearray, memoryview, Mapping, Set)):  # their members only look like ids
            raise TypeError
        ids: list[Any] = list(tokens)
    except TypeError:
        raise OptionError(f"the tokens are {shown(tokens)}; they must be a list of token ids") from None
    for at, token in enumerate(ids):
        if type(token) is int and 0 <= token < vocab_size:
            continue
        try:
            ids[at] = check_integer("token", token, 0, vocab_size - 1)
        except OptionError:
            raise OptionError(
                f"token id {shown(token)} is outside the model's vocabulary; use 0 to {vocab_size - 1}"
            ) from None
    return ids


def _growth(part: Any) -> int:
    """How many times as long the replacements of a normalizer or a decoder, one after another, make a text at most."""
    if isinstance(part, dict):
        inner = [part.get(key) for key in ("normalizers", "decoders")]
        content = part.get("content") if part.get("type") == "Replace" else None
        return math.prod(map(_growth, inner)) * (max(1, len(content)) if isinstance(content, str) else 1)
    return math.prod(map(_growth, part)) if isinstance(part, list) else 1


def _read(path: Path, data: bytes | None) -> Library:
    from tokenizers import Tokenizer as Library

    try:
        library = Library.from_file(str(path)) if data is None else Library.from_buffer(data)
        # a file may ask for these too, and would silently shorten or lengthen every prompt
        library.no_truncation()
        library.no_padding()
        for part in (library.normalizer, library.decoder):
            if part is not None and (times := _growth(json.loads(part.__getstate__()))) > _MAX_GROWTH:
                raise ValueError(f"it makes texts {times} times as long")
        for part in (library.normalizer, library.pre_tokenizer, library.decoder):
            for pattern in () if part is None else patterns_in(json.loads(part.__getstate__())):
                if why := slow_part(pattern):
                    raise ValueError(f"a regular expression that a text may keep busy for hours: {why}")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:  # the library's panics are no Exceptions
        raise BundleError(f"{path}: not a tokenizer ({first_line(e)}); export the model again") from e
    return library
