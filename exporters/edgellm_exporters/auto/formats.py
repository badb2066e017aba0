"""The formats that a weight can have, and what each costs in bytes and in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgellm_exporters.auto.rates import Rates
from edgellm_exporters.quantize.plan import ROW, Scheme
from edgellm_exporters.quantize.planning import Uses

__all__ = ["COSTS", "MEASURED", "PROMPT", "FormatChoices", "candidates_of", "decode_ns", "prefill_ns"]

PROMPT = 128  # tokens that prefill costs are told for
_PRODUCTS = (
    Scheme(8, 32), Scheme(8, 64), Scheme(8, 128), Scheme(4, 32, symmetric=False), Scheme(4, 64, symmetric=False),
    Scheme(4, 128, symmetric=False), Scheme(4, 32, symmetric=False, shifted=True), Scheme(3, 32, symmetric=False),
    Scheme(3, 64, symmetric=False), Scheme(3, 128, symmetric=False),
)  # fmt: skip
_TUNED = tuple(Scheme(2, block, symmetric=False) for block in (32, 64, 128))  # for what is learned after rounding
_ENDS = (
    Scheme(8, 32), Scheme(8, 64), Scheme(4, 16, symmetric=False), Scheme(4, 32, symmetric=False),
    Scheme(4, 64, symmetric=False), Scheme(3, 32, symmetric=False), Scheme(3, 64, symmetric=False),
)  # fmt: skip
MEASURED = (*_PRODUCTS, *_TUNED)  # the formats whose rates a search may be told; shifted ones have those of the others
_RECURRENT = (Scheme(8, 32), Scheme(8, 64), Scheme(4, 32, symmetric=False))

# Nanoseconds measured on one kind of machine (AVX-512 with VNNI): they order formats, and promise no times elsewhere.
_FIXED, _EACH_BIT, _EACH_BLOCK = 0.0046, 0.0031, 0.38
_SHIFTED, _ROW_START = 1.1, 4000.0
_PREFILL = {(4, 32): 0.0039, (8, 32): 0.0034, (4, 64): 0.0034}  # a weight and token
_PREFILL_LARGE_BLOCKS, _PREFILL_ROW = 0.0030, 0.0012


@dataclass(frozen=True)
class FormatChoices:
    """One weight, and what it may become.

    Args:
        name: in the captured graph after the target's passes.
        shape: rows and columns.
        schemes: formats that its uses and its shape allow, at least one.
        role: ``product``; ``head``, a product for a prompt's last token alone; ``table``, of which a token reads one
            row; or ``loop``, a product that cannot take a prompt's tokens together.
    """

    name: str
    shape: tuple[int, int]
    schemes: tuple[Scheme, ...]
    role: str = "product"


def candidates_of(
    uses: Uses, *, integer_products: bool, tuned: bool = False, narrow_scales: bool = False
) -> list[FormatChoices]:  # fmt: skip
    """The formats of each matrix; those whose rows divide into no block are left out, and stay floats.

    Args:
        uses: of a graph of canonical ops, after the target's passes.
        integer_products: whether to offer one scale a row, which is for the fastest prompts.
        tuned: whether codes will be tuned, which products in 2 bits need to be of any use.
        narrow_scales: whether scales have 8 bits in the place of 16 where they can, which loses next to nothing.
    """
    found: list[FormatChoices] = []
    for name, shape in uses.shapes.items():
        schemes: tuple[Scheme, ...]
        if name in uses.ends:
            schemes, role = _ENDS, "head" if name in uses.multiplied else "table"
        elif name in uses.products:
            row = (Scheme(8, ROW),) if integer_products else ()
            schemes, role = (*_PRODUCTS, *row, *(_TUNED if tuned else ())), "product"
        else:
            schemes, role = _RECURRENT, "loop"
        if narrow_scales and role != "loop":
            schemes = tuple(scheme.narrow for scheme in schemes)
        fitting = tuple(s for s in schemes if s.block == ROW or shape[1] % s.block == 0)
        if fitting:
            found.append(FormatChoices(name, shape, fitting, role))
    return found


def decode_ns(weight: FormatChoices, scheme: Scheme, rates: Rates | None = None) -> float:
    """Time of a product with one token, nanoseconds: by a format's rate where it was measured, else modelled."""
    if weight.role == "table":
        return 0.0
    rows, columns = weight.shape
    if rates is not None and (rate := rates.of(scheme)) is not None:
        return rows * columns * rate * (_SHIFTED if scheme.shifted else 1.0)
    each = rows * columns * (_FIXED + _EACH_BIT * scheme.kernel_bits)
    if scheme.block == ROW:
        return each + _EACH_BLOCK * rows + _ROW_START
    return (each + _EACH_BLOCK * rows * (columns // scheme.block)) * (_SHIFTED if scheme.shifted else 1.0)


def prefill_ns(weight: FormatChoices, scheme: Scheme) -> float:
    """Time of the products with a prompt of :data:`PROMPT` tokens, modelled, nanoseconds."""
    if weight.role in ("head", "table"):
        return decode_ns(weight, scheme)
    if weight.role == "loop":
        return PROMPT * decode_ns(weight, scheme)
    each = _PREFILL.get((scheme.kernel_bits, scheme.block), _PREFILL_LARGE_BLOCKS)
    each = _PREFILL_ROW if scheme.block == ROW else each
    return PROMPT * weight.shape[0] * weight.shape[1] * each * (_SHIFTED if scheme.shifted else 1.0)


def _nbytes(weight: FormatChoices, scheme: Scheme) -> float:
    return float(scheme.nbytes(*weight.shape))


COSTS: dict[str, Callable[[FormatChoices, Scheme, Rates | None], float]] = {
    "decode": decode_ns,
    "prefill": lambda weight, scheme, rates: prefill_ns(weight, scheme),
    "size": lambda weight, scheme, rates: _nbytes(weight, scheme),
}
