"""The calibration text of an export: read once, for all that is chosen or learned with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.checkpoints import Checkpoint
    from edgellm_exporters.quantize.tuning.tune import Tuning

_WINDOW, _TOKENS = 512, 8192
_MOST_CHARACTERS = 400_000  # at either end of a text: far more than its tokens need
__all__ = ["Calibration", "calibration_of", "tuning_of"]


@dataclass(frozen=True)
class Calibration:
    """A text as tokens.

    Args:
        tokens: all of it or, of a long text, its beginning and its end.
        windows: to calibrate with.
        held_out: to judge on, where that was asked for.
    """

    tokens: list[int]
    windows: list[list[int]]
    held_out: list[list[int]]


def calibration_of(file: Path, loaded: Checkpoint, *, divided: bool) -> Calibration:
    """Read a calibration text.

    Args:
        file: of UTF-8 text.
        loaded: whose tokenizer reads it.
        divided: whether to hold windows back to judge on.

    Raises:
        QuantizeError: it is not UTF-8, too short, or the checkpoint has no tokenizer.
    """
    from tokenizers import Tokenizer

    from edgellm_exporters.auto.budget import divide
    from edgellm_exporters.errors import QuantizeError
    from edgellm_runtime.checks.evaluate import windows_of

    if loaded.tokenizer_json is None:
        raise QuantizeError(f"{file}: the checkpoint has no tokenizer to read it with; leave --calibrate out")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QuantizeError(f"{file}: not UTF-8 at byte {error.start}; convert it first") from error
    if len(text) > 2 * _MOST_CHARACTERS:  # the middle of a long text is not looked at
        text = text[:_MOST_CHARACTERS] + text[-_MOST_CHARACTERS:]
    tokens = Tokenizer.from_str(loaded.tokenizer_json).encode(text, add_special_tokens=False).ids
    if len(tokens) < 2:
        raise QuantizeError(f"{file}: {len(tokens)} tokens are too few to calibrate with; give a longer text")
    model: Any = loaded.model
    length = min(_WINDOW, model.config.max_context)
    windows, held_out = divide(tokens, length, _TOKENS) if divided else (windows_of(tokens, length, _TOKENS), [])
    return Calibration(tokens, windows, held_out)


def tuning_of(minutes: float, read: Calibration, output: Path) -> Tuning:
    """How to tune for so long; layers that are finished are kept beside the output until it is there.

    Args:
        minutes: that it may take.
        read: the text; what it holds back is not learned from.
        output: of the export.

    Raises:
        QuantizeError: no time, or too little text.
    """
    from edgellm_exporters.quantize.tuning.tune import MOST_TUNING_TOKENS, Tuning

    output = output.absolute()
    free = len(read.tokens) - sum(map(len, read.held_out))
    tokens = read.tokens[: min(free, MOST_TUNING_TOKENS)]
    return Tuning(minutes=minutes, tokens=tokens, directory=output.with_name(f"{output.name}.tuning"))
