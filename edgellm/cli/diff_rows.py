"""What both forms of ``edgellm diff`` read, and what they say where nothing can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgellm_runtime.bundle import Bundle

__all__ = ["UNKNOWN", "rows_to_read", "sources_to_read"]

UNKNOWN = 2  # the exit status where the two cannot be compared


def rows_to_read(bundle: Bundle, file: Path | None, tokens: int, window: int) -> list[list[int]]:
    """Token ids of a text in windows; without one, of the bundle's goldens."""
    if file is None:
        from edgellm_runtime.checks.goldens import read_goldens

        return [golden.tokens.tolist() for golden in read_goldens(bundle)]
    from edgellm_runtime import OptionError
    from edgellm_runtime.checks.evaluate import windows_of
    from edgellm_runtime.text.tokenizer import Tokenizer

    manifest = bundle.manifest
    if manifest.tokenizer is None:
        raise OptionError(f"{bundle.path}: has no tokenizer, so it cannot read a text; leave --text out")
    tokenizer = Tokenizer(
        bundle.file("tokenizer.json"), manifest.tokenizer, vocab_size=manifest.vocab_size or manifest.width
    )
    text = file.read_text(encoding="utf-8", errors="replace")[: 16 * tokens]
    return windows_of(tokenizer.encode(text), min(window, manifest.max_context), tokens)


def sources_to_read(bundle: Bundle, file: Path | None) -> list[list[int]] | None:
    """What the rows of :func:`rows_to_read` answer; None where the model goes on with texts.

    Raises:
        OptionError: a text, which has no source.
    """
    if bundle.manifest.encoder is None:
        return None
    from edgellm_runtime import OptionError
    from edgellm_runtime.checks.goldens import read_goldens

    if file is not None:
        raise OptionError(f"{bundle.path}: answers sources, and a text has none; leave --text out")
    return [[] if golden.source is None else golden.source.tolist() for golden in read_goldens(bundle)]
