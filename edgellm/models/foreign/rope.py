"""Rotary frequencies that foreign configurations scale, as one factor for each frequency and one for the table.

``linear``: Chen et al. 2023, arXiv:2306.15595; ``yarn``: Peng et al. 2023, arXiv:2309.00071; ``llama3``: Grattafiori et
al. 2024, arXiv:2407.21783; ``longrope``: Ding et al. 2024, arXiv:2402.13753. Of forms that change with the length of
the text, what holds for all texts of the context is read: ``dynamic`` turns as it was trained up to the context that
the file names, and ``longrope`` has its short factors up to the context of its first training, where ours then ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from edgellm.errors import CheckpointError
from edgellm.models.foreign.keys import METADATA, Fields, Key, Values, checked_positive, refuse

__all__ = ["rotary"]

_MOST_FEATURES = 1 << 14  # of a head: far more than any model has, and few enough to count their frequencies


class _Scaled(NamedTuple):
    """What a form of scaling comes to."""

    factors: tuple[float, ...] = ()  # (head_dim / 2,): each frequency is divided by its own; empty for ones
    amplitude: float = 1.0  # factor on cosines and sines
    context: int | None = None  # the most positions that this holds for; None: for all


class _Rope(NamedTuple):
    """What forms of scaling are computed from."""

    name: str  # of the key, for messages
    said: Mapping[str, Any]
    theta: float
    dim: int
    context: int  # max_position_embeddings

    def number(self, key: str, default: float | None = None) -> float:
        value = self.said.get(key)
        if value is None and default is not None:
            return default
        return checked_positive(f"{self.name}.{key}", value)

    @property
    def frequencies(self) -> list[float]:
        return [self.theta ** (-2 * i / self.dim) for i in range(self.dim // 2)]


def _plain(_rope: _Rope) -> _Scaled:
    return _Scaled()


def _linear(rope: _Rope) -> _Scaled:
    return _Scaled((rope.number("factor"),) * (rope.dim // 2))


def _llama3(rope: _Rope) -> _Scaled:
    factor, low, high = rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor")
    trained = rope.number("original_max_position_embeddings", rope.context)
    if high <= low:
        raise CheckpointError(f"{rope.name} has high_freq_factor {high}, not above its low_freq_factor {low}")

    def divisor(frequency: float) -> float:
        turns = trained * frequency / (2 * math.pi)  # within the context that the model was first trained on
        share = min(1.0, max(0.0, (turns - low) / (high - low)))  # of the frequency as it was
        return 1 / ((1 - share) / factor + share)

    return _Scaled(tuple(divisor(f) for f in rope.frequencies))


def _yarn(rope: _Rope) -> _Scaled:
    trained = rope.number("original_max_position_embeddings", rope.context)
    factor = rope.number("factor", rope.context / trained)

    def bound(turns: float) -> float:
        """The index of the frequency that turns so often within the context."""
        return rope.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = bound(rope.said.get("beta_fast") or 32), bound(rope.said.get("beta_slow") or 1)
    if rope.said.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low or 0.001

    def divisor(index: int) -> float:
        share = 1 - min(1.0, max(0.0, (index - low) / width))  # of the frequency as it was
        return 1 / ((1 - share) / factor + share)

    def growth(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    all_dims, one = rope.said.get("mscale_all_dim"), rope.said.get("mscale")
    usual = growth(one) / growth(all_dims) if one and all_dims else growth(1)
    return _Scaled(tuple(divisor(i) for i in range(rope.dim // 2)), rope.number("attention_factor", usual))


def _dynamic(rope: _Rope) -> _Scaled:
    rope.number("factor")  # of longer texts
    return _Scaled()


def _longrope(rope: _Rope) -> _Scaled:
    trained = rope.number("original_max_position_embeddings")
    factor = rope.number("factor", rope.context / trained)
    for key in ("short_factor", "long_factor"):
        numbers = rope.said.get(key)
        if not isinstance(numbers, Sequence) or len(numbers) != rope.dim // 2:
            raise CheckpointError(f"{rope.name}.{key} is {numbers!r}; it must be a list of {rope.dim // 2} numbers")
    short = tuple(checked_positive(f"{rope.name}.short_factor", number) for number in rope.said["short_factor"])
    usual = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return _Scaled(short, rope.number("attention_factor", usual), min(rope.context, int(trained)))


_FORMS: Mapping[str, Callable[[_Rope], _Scaled]] = {
    "default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "dynamic": _dynamic, "longrope": _longrope,
}  # fmt: skip
_TRAINED = ("llama3", "yarn", "longrope")  # read the context of the first training, which may stand beside
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_READ: Mapping[str, set[str]] = {  # what each form makes something of
    "default": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},  # or does not
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip


def rotary(
    *, theta: float = 10000.0, share: float | None = None, without_effect: Collection[str] = (),
    synonyms: Mapping[str, str] | None = None,
) -> dict[str, Key]:  # fmt: skip
    """The keys from which ``rope_theta``, ``rope_factors`` and ``rope_amplitude`` are read.

    The fields ``head_dim`` and ``max_context`` must have been read before. ``rope_scaling``, where it says anything,
    takes precedence over ``rope_parameters``, and what either says over the keys beside it; transformers has it so.

    Args:
        theta: where the file names no base.
        share: of each head's features that turn, where the file does not say; the field ``rotated`` is then read too,
            which is how many do. None for a family whose heads turn as a whole.
        without_effect: keys of the file's dictionary that change nothing.
        synonyms: other names of forms.
    """

    def take(_name: str, values: Values, fields: Fields) -> None:
        name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        said = values.get(name) or {}
        if not isinstance(said, Mapping) or any(isinstance(value, Mapping) for value in said.values()):
            raise refuse(name, said)
        kind = said.get("rope_type") or said.get("type") or "default"
        kind = (synonyms or {}).get(kind, kind)
        part = said.get("partial_rotary_factor", values.get("partial_rotary_factor"))
        if kind not in _FORMS or said.keys() - _COMMON - _READ[kind] - {*without_effect}:
            raise refuse(name, dict(said))
        turning = fields["head_dim"]
        if turning > _MOST_FEATURES:
            raise CheckpointError(f"head_dim is {turning}; it must be at most {_MOST_FEATURES}")
        if share is not None:
            part = checked_positive("partial_rotary_factor", share if part is None else part)
            turning = fields["rotated"] = int(turning * part)
            if turning % 2 or not 0 < turning <= fields["head_dim"]:
                raise refuse("partial_rotary_factor", part)
        elif part not in (None, 1):
            raise refuse("partial_rotary_factor", part)
        if (trained := values.get("original_max_position_embeddings")) is not None and kind in _TRAINED:
            said = {**said, "original_max_position_embeddings": trained}
        base = next((v for v in (said.get("rope_theta"), values.get("rope_theta")) if v is not None), theta)
        fields["rope_theta"] = checked_positive("rope_theta", base)
        rope = _Rope(name, said, fields["rope_theta"], turning, fields["max_context"])
        fields["rope_factors"], fields["rope_amplitude"], context = _FORMS[kind](rope)
        fields["max_context"] = context or fields["max_context"]

    return {
        "rope_parameters": take, "rope_scaling": METADATA, "rope_theta": METADATA, "partial_rotary_factor": METADATA,
        "original_max_position_embeddings": METADATA,
    }  # fmt: skip
