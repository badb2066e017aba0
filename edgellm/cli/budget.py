"""The options of automatic quantization: which of them belong together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgellm_exporters.auto.budget import Budget

__all__ = ["MEASURED", "TABLE", "budget_of", "with_rates"]

MEASURED, TABLE = "measured", "table"  # what --rates takes beside a file


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


def with_rates(budget: Budget | None, rates: str | None, target: str) -> Budget | None:
    """A budget that knows what formats take, where the search goes by the time of a token.

    Args:
        budget: None: no search.
        rates: :data:`MEASURED`, :data:`TABLE`, or a file; None: measured where the bundle is for this processor.
        target: of the bundle.

    Raises:
        click.UsageError: rates without a search that goes by them.
        QuantizeError: a file without any.
    """
    if budget is None or budget.prefer != "decode":
        if rates is not None:
            raise click.UsageError("--rates are for --quantize auto with --prefer decode; leave it out")
        return budget
    if rates == TABLE or (rates is None and target != "cpu"):
        return budget
    from edgellm_exporters.auto.formats import MEASURED as FORMATS
    from edgellm_exporters.auto.rates import measured_rates, read_rates

    found = measured_rates(FORMATS) if rates in (None, MEASURED) else read_rates(Path(str(rates)))
    return dataclasses.replace(budget, rates=found)
