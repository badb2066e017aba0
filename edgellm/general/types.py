"""Which types the general road is open to: those that the installed transformers has a causal language model of."""

from __future__ import annotations

import difflib
import importlib.resources
import json
from collections.abc import Mapping, Sequence

from edgellm.models.registry import foreign_names

__all__ = ["causal_types", "nearest", "refused", "transformers_version"]


def causal_types() -> list[str]:
    """``model_type`` values that transformers has a causal language model of, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def transformers_version() -> str:
    """The version of the installed transformers."""
    import transformers

    version: str = transformers.__version__
    return version


def refused() -> tuple[str, Mapping[str, str]]:
    """Types that were tried at tiny size and that the general road refused: transformers' version then, and why each.

    ``make families`` writes the file.
    """
    file = importlib.resources.files("edgellm.general") / "refused.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["transformers"], found["types"]


def nearest(kind: str, others: Sequence[str] = ()) -> list[str]:
    """The names that an unknown type may have been meant to be, best first.

    Args:
        kind: the unknown type.
        others: types that may be meant besides those of edgellm's own files.
    """
    return difflib.get_close_matches(
        kind, sorted({*foreign_names("huggingface"), *foreign_names("gguf"), *others}), n=3
    )
