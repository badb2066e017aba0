"""The options of automatic quantization: which of them belong together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgellm_exporters.auto.budget import Budget

__all__ = ["budget_of"]


def budget_of(
    quantize: str, calibrate: Path | None, max_kl: float | None, max_size_mb: float | None, prefer: str | None
) -> Budget | None:
    """The budget that the options of ``edgellm export`` describe, None where ``--quantize`` is not auto.

    Raises:
        click.UsageError: an option without the one that it belongs to.
        QuantizeError: an impossible budget.
    """
    given = {"--max-kl": max_kl, "--max-size-mb": max_size_mb, "--prefer": prefer}
    if quantize != "auto":
        if alone := [option for option, value in given.items() if value is not None]:
            verb = "is a limit" if len(alone) == 1 else "are limits"
            raise click.UsageError(
                f"{' and '.join(alone)} {verb} for automatic formats; add --quantize auto and --calibrate FILE, "
                f"or leave it out of --quantize {quantize}"
            )
        return None
    if calibrate is None:
        raise click.UsageError(
            "--quantize auto chooses and verifies on real text; add --calibrate FILE, UTF-8 text like the model's "
            "work, some 30 kB or more"
        )
    from edgellm_exporters.auto.budget import Budget

    limit = Budget.max_kl if max_kl is None else max_kl
    # who names a size has said what may be spent; what it buys is quality
    wanted = prefer or ("quality" if max_size_mb is not None else Budget.prefer)
    return Budget(max_kl=limit, max_size_mb=max_size_mb, prefer=wanted)
