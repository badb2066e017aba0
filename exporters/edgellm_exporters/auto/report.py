"""What automatic quantization chose and why, as a page to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm_exporters.auto.budget import Budget
from edgellm_exporters.auto.formats import PROMPT, FormatChoices, decode_ns, prefill_ns
from edgellm_exporters.auto.rates import Rates
from edgellm_exporters.auto.search import Choice
from edgellm_exporters.proof.parity import ParityReport
from edgellm_exporters.quantize.plan import Scheme

__all__ = ["Attempt", "Evidence", "decode_ms", "prefill_ms", "write_table"]

_TIMES = (
    "Times are modelled from products alone, on an AVX-512 machine with VNNI: they order formats, and promise nothing "
    "elsewhere."
)
_MEASURED = (
    "Times are of products alone. Those of a token go by what formats took on the machine of the export, kernels of "
    "{}, nanoseconds a weight: {} (bits:block). Those of a prompt are modelled."
)


@dataclass(frozen=True)
class Attempt:
    """One assignment that was built and measured.

    Args:
        choice: the formats, with the uncorrected prediction.
        predicted: KL, corrected by what earlier builds measured.
        report: measured on held-out text.
        nbytes: of the bundle, goldens and report left out.
        holds: whether the budget is kept.
        directory: where its graph is until one is chosen.
    """

    choice: Choice
    predicted: float
    report: ParityReport
    nbytes: int
    holds: bool
    directory: Path


@dataclass(frozen=True)
class Evidence:
    """All that a report tells.

    Args:
        budget: what was asked.
        candidates: weights and their formats.
        predictions: KL of each format of each weight, uncorrected.
        attempts: in order.
        chosen: the one in the bundle.
        rest: bytes of the bundle beside the quantized weights.
    """

    budget: Budget
    candidates: Sequence[FormatChoices]
    predictions: Mapping[str, Mapping[Scheme, float]]
    attempts: Sequence[Attempt]
    chosen: Attempt
    rest: int

    @property
    def ratio(self) -> float:
        """Measured KL over predicted KL of the chosen assignment."""
        return self.chosen.report.kl / max(self.chosen.choice.kl, 1e-12)


def decode_ms(candidates: Sequence[FormatChoices], schemes: Mapping[str, Scheme], rates: Rates | None = None) -> float:
    """Time of all products with one token, milliseconds: by measured rates where there are any, else modelled."""
    return sum(decode_ns(c, schemes[c.name], rates) for c in candidates) / 1e6


def prefill_ms(candidates: Sequence[FormatChoices], schemes: Mapping[str, Scheme]) -> float:
    """Modelled time of all products with a prompt, milliseconds."""
    return sum(prefill_ns(c, schemes[c.name]) for c in candidates) / 1e6


def write_table(evidence: Evidence) -> str:
    """The page, Markdown."""
    budget, report = evidence.budget, evidence.chosen.report
    size = "any size" if budget.max_size_mb is None else f"at most {budget.max_size_mb:g} MB"
    lines = [
        "# How this bundle was quantized",
        "",
        f"Asked for: KL divergence from the float model of at most {budget.max_kl:g} nats a token, {size}, best for "
        f"{budget.prefer}.",
        "",
        f"Measured on {report.tokens} tokens that nothing was chosen with: KL {report.kl:.4g} (99th percentile "
        f"{report.kl_p99:.3g}), same most likely token {report.top1:.1%}, perplexity {report.perplexity:.2f} against "
        f"{report.reference_perplexity:.2f} in float. The picture `quantization.png` shows what else there was to "
        "choose. Text of another kind than the one that was given may be twice as far from the float model, or half.",
        "",
        "## Builds",
        "",
        f"| build | predicted KL | measured KL | size, MB | decode, ms a token | prefill of {PROMPT}, ms | budget |",
        "|---:|---:|---:|---:|---:|---:|---|",
        *_builds(evidence),
        "",
        _TIMES
        if budget.rates is None
        else _MEASURED.format(
            budget.rates.kernels, ", ".join(f"{name} {rate:g}" for name, rate in budget.rates.decode.items())
        ),
        "",
        "## Weights",
        "",
        "Predicted KL adds up over weights; the share is each weight's part of the sum.",
        "",
        "| weight | rows x columns | format | bits a weight | predicted KL, share | bytes |",
        "|---|---:|---|---:|---:|---:|",
        *_weights(evidence),
        "",
    ]
    return "\n".join(lines)


def _builds(evidence: Evidence) -> Iterator[str]:
    rates = evidence.budget.rates
    for number, attempt in enumerate(evidence.attempts):
        verdict = "chosen" if attempt is evidence.chosen else "kept, but dearer" if attempt.holds else "missed"
        schemes = attempt.choice.schemes
        yield (
            f"| {number + 1} | {attempt.predicted:.4g} | {attempt.report.kl:.4g} | {attempt.nbytes / 1e6:.1f} "
            f"| {decode_ms(evidence.candidates, schemes, rates):.2f} | {prefill_ms(evidence.candidates, schemes):.0f} "
            f"| {verdict} |"
        )


def _weights(evidence: Evidence) -> Iterator[str]:
    schemes = evidence.chosen.choice.schemes
    total = sum(evidence.predictions[c.name][schemes[c.name]] for c in evidence.candidates) or 1.0
    for candidate in evidence.candidates:
        scheme, (rows, columns) = schemes[candidate.name], candidate.shape
        nbytes = scheme.nbytes(rows, columns)
        share = evidence.predictions[candidate.name][scheme] / total
        yield (
            f"| {candidate.name} | {rows} x {columns} | {scheme} | {8 * nbytes / (rows * columns):.2f} "
            f"| {share:.2%} | {nbytes:,} |"
        )
