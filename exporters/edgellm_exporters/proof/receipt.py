"""The receipt that an export writes: the bundle and the float model over one text, while both are at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm.models.protocol import LanguageModel, answers_sources, logit_width
from edgellm_exporters.errors import ExportError
from edgellm_exporters.proof.parity import ParityReport, compare
from edgellm_exporters.proof.text import TOKENIZER
from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.checks.receipt import Asked, make_receipt, read_windows
from edgellm_runtime.errors import OptionError
from edgellm_runtime.session import Session
from edgellm_runtime.text.tokenizer import Tokenizer

__all__ = ["ReceiptText", "check_receipt", "figures", "measured_receipt"]


@dataclass(frozen=True, kw_only=True)
class ReceiptText:
    """What a bundle is measured on.

    Args:
        file: UTF-8 text.
        asked: how much of it.
        calibrated: whether the bundle was calibrated with these very tokens.
    """

    file: Path
    asked: Asked
    calibrated: bool = False


def check_receipt(model: Any, has_tokenizer: bool, dtype: str) -> None:
    """Refuse what cannot be measured, before any work.

    Args:
        model: to be exported.
        has_tokenizer: whether it has one.
        dtype: of the bundle.

    Raises:
        ExportError: the model reads no text, or the bundle does not run here.
    """
    if not has_tokenizer:
        raise ExportError("a receipt is measured on a text, and the model has no tokenizer; leave it out")
    if answers_sources(model) or logit_width(model.config) != model.config.vocab_size:
        raise ExportError("a receipt says how a text is predicted, and the model predicts none; leave it out")
    if dtype == "bfloat16":
        raise ExportError(
            "a receipt is measured on what runs, and bfloat16 does not run here; leave it out, and let 'edgellm eval "
            "--write-receipt' measure it on the device"
        )


def measured_receipt(
    model: LanguageModel, open_session: Callable[[], Session], directory: Path, info: TokenizerInfo | None,
    text: ReceiptText | None, progress: Callable[[str, float], None],
) -> dict[str, Any]:  # fmt: skip
    """What the manifest says; nothing where no text is given.

    Args:
        model: the reference, able to run.
        open_session: of the bundle.
        directory: where the bundle's tokenizer is.
        info: of it.
        text: to read.
        progress: told the share that is done.

    Raises:
        ExportError: the text cannot be read.
    """
    if text is None or info is None:
        return {}
    session = open_session()
    tokenizer = Tokenizer(directory / TOKENIZER, info, vocab_size=model.config.vocab_size)
    try:
        windows = read_windows(text.file, tokenizer.encode, text.asked, session.max_context)
    except OptionError as error:
        raise ExportError(f"no receipt: {error}") from error
    report = compare(model, session, windows, progress=lambda share: progress("measuring the receipt", share))
    receipt = make_receipt(text.file, text.asked, figures(report), device="cpu")
    return {**receipt, "text": {**receipt["text"], "calibrated": True}} if text.calibrated else receipt


def figures(report: ParityReport) -> dict[str, Any]:
    """A report's, by the names that ``edgellm eval --json`` has for them."""
    found = dataclasses.asdict(report)
    named = {
        "perplexity": "perplexity", "tokens": "tokens", "reference_perplexity": "reference_perplexity",
        "kl_mean": "kl", "kl_p99": "kl_p99", "top1_agreement": "top1",
    }  # fmt: skip
    low, high = report.kl_interval
    return {**{name: found[own] for name, own in named.items()}, "kl_low": low, "kl_high": high}
