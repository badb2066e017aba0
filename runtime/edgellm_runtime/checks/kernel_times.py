"""Times of kernels beside the least that they could take, and sums of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from edgellm_runtime.checks.traffic import Traffic

__all__ = ["Spent", "grouped", "mean_of"]


@dataclass(frozen=True)
class Spent:
    """What one kernel took in one phase, or several kernels together; of decoding, in the mean of its steps.

    Args:
        name: the kernel's, or of what they have in common.
        op: the operator; of several, what they have in common or nothing.
        layer: its path in the model; likewise.
        count: how often kernels ran.
        ms: all of that together.
        traffic: the least that they must do, as far as that is known.
        unknown_ms: the time of those whose bytes are not known.
        least_ms: what they would take at the roof; None where that is not known of one of them.
    """

    name: str
    op: str
    layer: str
    count: float
    ms: float
    traffic: Traffic
    unknown_ms: float
    least_ms: float | None

    @property
    def gb_per_s(self) -> float | None:
        """Bytes moved in that time; None where some are not known."""
        return self.traffic.bytes / self.ms / 1e6 if self.ms and not self.unknown_ms else None

    @property
    def roof_share(self) -> float | None:
        """How near the roof they are, 1 being at it."""
        return self.least_ms / self.ms if self.ms and self.least_ms is not None else None


def grouped(kernels: Iterable[Spent], key: Callable[[Spent], str]) -> list[Spent]:
    """Kernels together that have something in common, from the longest to the shortest.

    Args:
        kernels: of a phase.
        key: what they have in common, which becomes the name.
    """
    found: dict[str, list[Spent]] = defaultdict(list)
    for kernel in kernels:
        found[key(kernel)].append(kernel)
    return sorted((replace(_sum(each), name=name) for name, each in found.items()), key=lambda s: s.ms, reverse=True)


def _sum(parts: Sequence[Spent]) -> Spent:
    least = [part.least_ms for part in parts]
    traffic = parts[0].traffic
    for part in parts[1:]:
        traffic += part.traffic
    return Spent(
        parts[0].name, _common(part.op for part in parts), _common(part.layer for part in parts),
        sum(part.count for part in parts), sum(part.ms for part in parts), traffic,
        sum(part.unknown_ms for part in parts),
        None if any(one is None for one in least) else sum(one for one in least if one is not None),
    )  # fmt: skip


def _common(words: Iterable[str]) -> str:
    found = set(words)
    return found.pop() if len(found) == 1 else ""


def mean_of(parts: Sequence[Spent], steps: int) -> Spent:
    """What a kernel takes in one step.

    Args:
        parts: each time that it ran.
        steps: in which that was.
    """
    whole = _sum(parts)
    return replace(
        whole, count=whole.count / steps, ms=whole.ms / steps, traffic=whole.traffic.part(steps),
        unknown_ms=whole.unknown_ms / steps, least_ms=None if whole.least_ms is None else whole.least_ms / steps,
    )  # fmt: skip
