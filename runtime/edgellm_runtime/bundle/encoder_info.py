"""What a manifest says of an encoder: the graph that reads sources, and how an answer to one begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm_runtime.bundle.engine_info import ENCODE, EngineInfo
from edgellm_runtime.spec import SOURCE, Signature

__all__ = ["ENCODER", "EncoderInfo", "check_engines"]

ENCODER = "encoder.onnx"  # its usual name
_MOST_SOURCE, _MOST_START = 2**24, 16  # tokens


@dataclass(frozen=True)
class EncoderInfo:
    """The encoder of a bundle whose model answers sources.

    Args:
        file: the graph's name in the bundle.
        start: the tokens that every answer begins with, at least one; they are not part of it.
        max_source: the most tokens of a source.
    """

    file: str
    start: tuple[int, ...]
    max_source: int

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "start": list(self.start), "max_source": self.max_source}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, vocab_size: int, max_context: int) -> EncoderInfo:
        """Check and read what :meth:`to_json` gave.

        Args:
            data: of the manifest; nothing of it is believed yet.
            vocab_size: tokens are below it.
            max_context: an answer begins with fewer tokens.

        Raises:
            ValueError: a value that no encoder has.
        """
        file, start, most = data["file"], data["start"], data["max_source"]
        if not isinstance(file, str) or not file.endswith(".onnx"):
            raise ValueError(f"encoder {file!r} is not named as a graph")
        if type(most) is not int or not 1 <= most <= _MOST_SOURCE:
            raise ValueError(f"sources of at most {most!r} tokens; of 1 to {_MOST_SOURCE}")
        if not isinstance(start, list) or not 1 <= len(start) <= min(_MOST_START, max_context - 1):
            raise ValueError(f"answers begin with {start!r}, which are not 1 to {_MOST_START} tokens of a context")
        if wrong := [token for token in start if type(token) is not int or not 0 <= token < vocab_size]:
            raise ValueError(f"answers begin with token {wrong[0]!r}, outside the vocabulary of {vocab_size}")
        return cls(file, tuple(start), most)


def check_engines(encoder: EncoderInfo | None, engines: Sequence[EngineInfo], signature: Signature) -> None:
    """Hold what is said of engines to the sources that they are to take: a range from one token to the most.

    Args:
        encoder: of the bundle; None: there is none.
        engines: of the bundle.
        signature: of the model.

    Raises:
        ValueError: an engine of an encoder that is not there, or one that does not take every source.
    """
    if encoder is None:
        if any(engine.role == ENCODE for engine in engines):
            raise ValueError(f"an engine of role {ENCODE!r} without an encoder")
        return
    inputs = [(t.name, t.shape) for t in signature.encoder.inputs if SOURCE in t.shape]
    states = [(spec.past_name, spec.shape) for spec in signature.encoded]
    for engine in engines:
        for name, shape in inputs if engine.role == ENCODE else states:
            found, axis = engine.profile.get(name), shape.index(SOURCE)
            if found is None or len(found.min) != len(shape):
                raise ValueError(f"{engine.file!r} has no range of shapes for {name}")
            if found.min[axis] > 1 or found.max[axis] < encoder.max_source:
                raise ValueError(
                    f"{engine.file!r} takes sources of {found.min[axis]} to {found.max[axis]} tokens, and not of 1 to "
                    f"{encoder.max_source}"
                )
