"""Which scripts a text is written in, by the names that Unicode gives its letters."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from edgellm_runtime.errors import OptionError

__all__ = ["check_scripts", "scripts_of"]


def scripts_of(texts: Iterable[str]) -> Counter[str]:
    """How many letters of each script, such as LATIN, CYRILLIC or CJK, there are."""
    return Counter(unicodedata.name(c, "UNKNOWN").split(" ", 1)[0] for text in texts for c in text if c.isalpha())


def check_scripts(text: str, field: str, expected: Sequence[str]) -> None:
    """Refuse a text most of whose letters are in other scripts; one without letters passes.

    Args:
        text: from outside.
        field: what it is, for the message.
        expected: names of scripts; none: any.

    Raises:
        OptionError: names the script that was found.
    """
    found = scripts_of([text]) if expected else Counter[str]()
    if found and sum(found[script] for script in expected) * 2 < found.total():
        most = found.most_common(1)[0][0]
        raise OptionError(
            f"the {field} is mostly in {most} script, and the model was trained on {', '.join(expected)}; give such a "
            "text, or check_script=False to try all the same"
        )
