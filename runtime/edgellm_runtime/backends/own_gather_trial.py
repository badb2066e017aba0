"""Whether edgellm's own look-up in a table of codes gives the rows that it should, on this very processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.kernel_test import packed_codes
from edgellm_runtime.backends.trial_session import trial_session
from edgellm_runtime.graphs.narrow_scales import random_scales, scale_bits_of, widened
from edgellm_runtime.graphs.own_attention import DOMAIN
from edgellm_runtime.graphs.own_gather import GATHER
from edgellm_runtime.graphs.three_bits import condensed
from edgellm_runtime.graphs.writer import Node, graph_bytes

__all__ = ["GatherForm", "gather_error", "gather_form"]

Array = NDArray[Any]
_ROWS, _BLOCKS = 20, 3


@dataclass(frozen=True)
class GatherForm:
    """One kind of table.

    Args:
        bits: of a number.
        block: numbers that share a scale.
        zeros: whether blocks have zero points.
        op: the operator.
        scale_bits: of a block's scale as it is stored, 16 or 8.
    """

    bits: int
    block: int
    zeros: bool
    op: str = GATHER
    scale_bits: int = 16

    def __str__(self) -> str:
        return f"{self.op} of {self.bits} bits in {'asymmetric' if self.zeros else 'symmetric'} blocks of {self.block}"


def gather_form(node: Node) -> GatherForm:
    """The kind of a node."""
    bits, block, zeros = (node.attributes[name] for name in ("bits", "block_size", "zeros"))
    assert isinstance(bits, int) and isinstance(block, int)
    return GatherForm(bits, block, bool(zeros), scale_bits=scale_bits_of(node.attributes))


def gather_error(form: GatherForm) -> float:
    """How far rows are from NumPy's, as a part of their length.

    Args:
        form: the kind of table.

    Raises:
        BackendError: the library is missing.
        Unusable: the kernels cannot run here.
    """
    draw = np.random.default_rng(7)
    width = _BLOCKS * form.block
    codes = draw.integers(0, 1 << form.bits, (_ROWS, width)).astype(np.uint8)
    scales: Array = draw.uniform(0.01, 0.02, (_ROWS, _BLOCKS)).astype(np.float16)
    given = scales
    if form.scale_bits == 8:
        given = random_scales(_ROWS, _BLOCKS, draw)
        scales = widened(given)
    stored = 4 if form.bits == 3 else form.bits  # of a code in bytes; those of 3 bits are put together after that
    points, packed = np.full((_ROWS, _BLOCKS), 1 << stored - 1, np.uint8), packed_codes(codes, stored)
    tensors = {"codes": condensed(packed) if form.bits == 3 else packed, "scales": given}
    if form.zeros:
        points = draw.integers(0, 1 << form.bits, (_ROWS, _BLOCKS)).astype(np.uint8)
        tensors["zeros"] = packed_codes(points, stored)
    sizes = {"N": _ROWS, "K": width, "bits": form.bits, "block_size": form.block, "zeros": int(form.zeros)}
    node = Node(GATHER, ["x", *tensors], ["y"], sizes, domain=DOMAIN)
    graph = graph_bytes([node], {"x": "int64"}, {"y": "float32"}, tensors=tensors, shapes={"x": ["rows", "time"]})
    session = trial_session(graph)
    places = draw.integers(0, _ROWS, (3, 5))
    whole = codes.astype(np.float64) - np.repeat(points.astype(np.float64), form.block, 1)
    expected = (whole * np.repeat(scales.astype(np.float64), form.block, 1))[places]
    (found,) = session.run(None, {"x": places})
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else np.inf
