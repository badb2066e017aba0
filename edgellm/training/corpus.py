"""Reading text files as a stream of pieces, each in the training or the validation part.

Nothing here holds more than one piece, or one JSONL line, in memory. It knows no tokenizer.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from edgellm.errors import TrainingError

__all__ = ["Corpus", "Piece"]

PIECE_BYTES = 1 << 16
LINE_BYTES = 1 << 10  # how far a piece may run on to end at a line's end
JSONL = (".jsonl", ".ndjson")


class Piece(NamedTuple):
    """Some text of one document."""

    text: str
    ends_document: bool
    validation: bool


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text files and which part of them is held out.

    A ``.jsonl`` file holds one document a line, as ``{"text": ...}``; any other file is one document of UTF-8 text.

    Args:
        files: the text, in this order.
        validation_files: text to validate on; when empty, a part of ``files`` is held out.
        validation_fraction: how much to hold out: from a corpus with only JSONL files every n-th document, where n is
            1 / fraction rounded; otherwise the tail, counted in bytes over all files.

    Raises:
        TrainingError: no file, a file that is missing, or a fraction outside (0, 0.5].
    """

    files: Sequence[Path]
    validation_files: Sequence[Path] = ()
    validation_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not self.files:
            raise TrainingError("no text was given; name at least one .txt or .jsonl file")
        if not 0 < self.validation_fraction <= 0.5:
            raise TrainingError(f"validation_fraction is {self.validation_fraction}; it must be in (0, 0.5]")
        for path in (*self.files, *self.validation_files):
            if not path.is_file():
                what = "is a folder" if path.is_dir() else "does not exist"
                raise TrainingError(f"{path}: {what}; name a .txt or .jsonl file")

    @property
    def split(self) -> str:
        """How validation text is chosen, in words."""
        if self.validation_files:
            return "validation files"
        if all(_is_jsonl(path) for path in self.files):
            return f"every {round(1 / self.validation_fraction)}th document"
        return f"last {self.validation_fraction:.1%} of the bytes"

    def fingerprint(self) -> list[list[str | int]]:
        """Name, bytes and time of change of every file: equal as long as nothing was touched."""
        found = [(path, path.stat()) for path in (*self.files, *self.validation_files)]
        return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in found]

    def train(self) -> Iterator[str]:
        """The text of the training part."""
        return (piece.text for piece in self.pieces() if not piece.validation)

    def pieces(self) -> Iterator[Piece]:
        """All text, in order.

        Raises:
            TrainingError: a file that is not UTF-8, or a JSONL line without a text; names the place.
        """
        if self.validation_files:
            for validation, files in ((False, self.files), (True, self.validation_files)):
                for path in files:
                    documents = _jsonl(path) if _is_jsonl(path) else _plain(path, None)
                    yield from (piece._replace(validation=validation) for piece in documents)
        elif all(_is_jsonl(path) for path in self.files):
            every = round(1 / self.validation_fraction)
            documents = (piece for path in self.files for piece in _jsonl(path))
            for number, piece in enumerate(documents, start=1):
                yield piece._replace(validation=number % every == 0)
        else:
            yield from self._tail()

    def _tail(self) -> Iterator[Piece]:
        sizes = [path.stat().st_size for path in self.files]
        boundary, before = int(sum(sizes) * (1 - self.validation_fraction)), 0
        for path, size in zip(self.files, sizes, strict=True):
            if _is_jsonl(path):  # a document is not cut in two
                yield from (piece._replace(validation=before >= boundary) for piece in _jsonl(path))
            else:
                yield from _plain(path, boundary - before)
            before += size


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in JSONL


def _plain(path: Path, boundary: int | None) -> Iterator[Piece]:
    """A file's text in pieces that end at a line's end where lines are short; from byte ``boundary`` on, validation."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    held: Piece | None = None  # the last piece is known for what it is only at the file's end
    with path.open("rb") as file:
        while True:
            validation = boundary is not None and position >= boundary
            to_boundary = boundary - position if boundary is not None and not validation else PIECE_BYTES
            block = file.read(min(PIECE_BYTES, to_boundary))
            block += file.readline(LINE_BYTES) if block and not block.endswith(b"\n") else b""
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise TrainingError(
                    f"{path}: not UTF-8 near byte {position + error.start}; save the file as UTF-8"
                ) from None
            text = text.removeprefix("\ufeff") if position == 0 else text  # a byte order mark is not text
            position += len(block)
            if text:
                if held:
                    yield held
                held = Piece(text, False, validation)
            if not block:
                break
    if held:
        yield held._replace(ends_document=True)


def _jsonl(path: Path) -> Iterator[Piece]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip() and (text := _text_of(line, f"{path}:{number}")):
                yield Piece(text, True, False)


def _text_of(line: bytes, place: str) -> str:
    try:
        record = json.loads(line.decode())
        text = record["text"] if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except UnicodeError:
        raise TrainingError(f"{place}: not UTF-8 text; save the file as UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TrainingError(f'{place}: {_excerpt(line)} is not a text; write {{"text": "..."}}') from None
    return text


def _excerpt(line: bytes) -> str:
    shown = line.decode(errors="replace").strip()
    return repr(shown if len(shown) <= 40 else shown[:37] + "...")
