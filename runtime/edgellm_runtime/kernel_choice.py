"""Whose kernels compute what edgellm has kernels of its own for: ONNX Runtime's, unless one says otherwise."""

from __future__ import annotations

import os

from edgellm_runtime.arguments import check_choice

__all__ = ["CHOICES", "VARIABLE", "chosen_kernels"]

VARIABLE = "EDGELLM_KERNELS"
CHOICES = ("onnxruntime", "own")


def chosen_kernels(asked: str | None = None) -> str:
    """Whose kernels to run.

    Args:
        asked: ``onnxruntime`` or ``own``; None for that of the variable ``EDGELLM_KERNELS``, else ``onnxruntime``.

    Raises:
        OptionError: something else.
    """
    if asked is not None:
        return check_choice("kernels", asked, CHOICES)
    return check_choice(VARIABLE, os.environ.get(VARIABLE, "").strip() or CHOICES[0], CHOICES)
