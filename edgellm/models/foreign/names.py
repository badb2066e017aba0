"""What foreign files call a model's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Names", "Stacks", "alike"]

_NUMBER = re.compile(r"\.(\d+)\.")


def alike(ours: str, theirs: str, *parts: str) -> dict[str, str]:
    """Parts that are called the same within a module of ours and one of the file's."""
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in parts}


@dataclass(frozen=True)
class Names:
    """From our parameter names to those of a file; ``names("layers.3.mlp.up_proj.weight")``.

    Args:
        parts: our name of each module, without its layer, and the file's. A ``*`` in both stands for a number within
            the layer, such as that of an expert.
        layers: what the file puts before a layer's number.
        ours: what we put there.
    """

    parts: Mapping[str, str]
    layers: str
    ours: str = "layers"

    def __call__(self, name: str) -> str:
        """The file's name of one of our parameters."""
        part, dot, suffix = name.rpartition(".")
        prefix = ""
        if part.startswith(f"{self.ours}."):
            _, index, part = part.removeprefix(self.ours).split(".", 2)
            prefix = f"{self.layers}.{index}."
        if name in self.parts:  # a parameter that belongs to no module of its own
            return self.parts[name]
        if f"{part}.{suffix}" in self.parts:
            return prefix + self.parts[f"{part}.{suffix}"]
        if part not in self.parts and (number := _NUMBER.search(part)):
            starred = self.parts[_NUMBER.sub(".*.", part, count=1)]
            return f"{prefix}{starred.replace('*', number[1])}{dot}{suffix}"
        return f"{prefix}{self.parts[part]}{dot}{suffix}"


@dataclass(frozen=True)
class Stacks:
    """The names of a model with several stacks of layers, such as an encoder's and a decoder's.

    Args:
        stacks: one for each; what belongs to no stack is in the first one's parts.
    """

    stacks: Sequence[Names]

    def __call__(self, name: str) -> str:
        """The file's name of one of our parameters."""
        return next((names for names in self.stacks if name.startswith(f"{names.ours}.")), self.stacks[0])(name)
