"""Free sizes by their names: formulas of them, examples for them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
import sympy

__all__ = ["dims_of", "evaluated", "example_sizes", "renamed"]

_NAME = re.compile(r"[A-Za-z_]\w*")
_SIZES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # equal ones would hide a dimension that was mixed up


def dims_of(shape: ir.Shape) -> list[int | str]:
    """Numbers, and names or formulas of free sizes."""
    return [dim if isinstance(dim, int) else str(dim) for dim in shape]


def renamed(shape: ir.Shape, known: Mapping[str, str]) -> ir.Shape | None:
    """A shape with its free sizes by other names; None where one of them has none."""
    dims = dims_of(shape)
    if any(name not in known for dim in dims if isinstance(dim, str) for name in _NAME.findall(dim)):
        return None
    return ir.Shape([dim if isinstance(dim, int) else _by_other_names(dim, known) for dim in dims])


def _by_other_names(formula: str, known: Mapping[str, str]) -> str:
    if formula in known:
        return known[formula]

    def name(found: re.Match[str]) -> str:
        other = known[found[0]]
        return other if _NAME.fullmatch(other) else f"({other})"

    return _NAME.sub(name, formula)


def example_sizes(dims: Collection[int | str]) -> dict[str, int]:
    """A size for each name of a free one, each another and none of those that are fixed."""
    names = {name for dim in dims if isinstance(dim, str) for name in _NAME.findall(dim)}
    free = itertools.chain((size for size in _SIZES if size not in dims), itertools.count(41, 2))
    return dict(zip(sorted(names), free, strict=False))


def evaluated(shape: Sequence[int | str], sizes: Mapping[str, int]) -> list[int]:
    """A shape in numbers, from those of its free sizes."""
    symbols = {name: sympy.Symbol(name) for name in sizes}
    return [
        dim if isinstance(dim, int) else int(sympy.sympify(dim, locals=symbols).subs(sizes)) for dim in shape
    ]  # fmt: skip
