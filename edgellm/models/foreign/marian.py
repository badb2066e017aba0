"""What a family says of files of Marian, the translators' toolkit: https://marian-nmt.github.io."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edgellm.errors import CheckpointError

__all__ = ["Marian"]


@dataclass(frozen=True)
class Marian:
    """How a family reads Marian's files.

    Args:
        fields: settings that are whole numbers, and the fields of our configuration that they are.
        needed: settings that must have the value that the family computes, as they are written.
        name: our parameter name to the file's.
    """

    fields: Mapping[str, str]
    needed: Mapping[str, str]
    name: Callable[[str], str]

    def read(self, settings: Mapping[str, str]) -> dict[str, int]:
        """The fields of our configuration.

        Args:
            settings: of the model's file.

        Raises:
            CheckpointError: a setting that the family does not compute, or that is no whole number.
        """
        wrong = [
            f"{key} is {settings.get(key, 'not there')!r}"
            for key, v in self.needed.items()
            if settings.get(key, v) != v
        ]
        if wrong:
            raise CheckpointError(f"{', '.join(wrong)}, which edgellm computes no model with")
        for key in self.fields:
            if not settings.get(key, "").isdecimal():
                raise CheckpointError(f"{key} is {settings.get(key, 'not there')!r}, and no whole number")
        return {field: int(settings[key]) for key, field in self.fields.items()}
