"""Which types the general road is open to: those that the installed transformers has a causal language model of."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from edgellm.models.registry import foreign_names

__all__ = ["causal_types", "nearest", "transformers_version"]


def causal_types() -> list[str]:
    """``model_type`` values that transformers has a causal language model of, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def transformers_version() -> str:
    """The version of the installed transformers."""
    import transformers

    version: str = transformers.__version__
    return version


def nearest(kind: str, others: Sequence[str] = ()) -> list[str]:
    """The names that an unknown type may have been meant to be, best first.

    Args:
        kind: the unknown type.
        others: types that may be meant besides those of edgellm's own files.
    """
    return difflib.get_close_matches(
        kind, sorted({*foreign_names("huggingface"), *foreign_names("gguf"), *others}), n=3
    )
