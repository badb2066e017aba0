"""A product with random weights of codes, and what NumPy says that it gives, for trials of edgellm's own operators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.kernel_test import packed_codes
from edgellm_runtime.graphs.narrow_scales import random_scales, scale_bits_of, widened
from edgellm_runtime.graphs.own_operators import UNIT
from edgellm_runtime.graphs.three_bits import condensed
from edgellm_runtime.graphs.writer import Node

__all__ = ["ProductForm", "ProductTrial", "gated", "product_form", "product_trials"]

Array = NDArray[Any]
_OUTPUTS, _BLOCKS = 33, 3  # no multiple of any kernel's width; of those that feed a gate, a multiple of 64
_LONG_ROW = 144


@dataclass(frozen=True, order=True)
class ProductForm:
    """One kind of product.

    Args:
        bits: of a weight.
        block: weights that share a scale; 0: a row's.
        zeros: whether blocks have zero points.
        sums: how many inputs share a sum that is read beside them; 0: no sums.
        scale_bits: of a block's scale as it is stored, 16 or 8.
    """

    bits: int
    block: int
    zeros: bool = False
    sums: int = 0
    scale_bits: int = 16

    def __str__(self) -> str:
        blocks = f"blocks of {self.block}" if self.block else "rows"
        return f"{self.bits} bits in {'asymmetric' if self.zeros else 'symmetric'} {blocks}"


def product_form(node: Node, suffix: str) -> ProductForm:
    """The kind of a node's product whose attributes' names end so."""

    def size(name: str) -> int:
        value = node.attributes[f"{name}{suffix}"]
        assert isinstance(value, int)
        return value

    return ProductForm(
        size("bits"),
        size("block_size"),
        zeros=bool(size("zeros")),
        sums=size("sums"),
        scale_bits=scale_bits_of(node.attributes, suffix),
    )


class ProductTrial:
    """Random weights of a product.

    Args:
        form: its kind.
        outputs: of it.
        width: inputs, without sums; rounded up to what the form can have.
        draw: where numbers come from.
    """

    def __init__(self, form: ProductForm, outputs: int, width: int, draw: np.random.Generator) -> None:
        step = form.sums or (1 if form.block else 16)
        self.form, self.width = form, -(-width // step) * step
        columns = self.width + (self.width // form.sums if form.sums else 0)
        block = form.block or columns
        blocks = -(-columns // block)
        codes = draw.integers(0, 1 << form.bits, (outputs, blocks * block)).astype(np.uint8)
        scales = draw.uniform(0.01, 0.02, (outputs, blocks)).astype(np.float16).astype(np.float32)
        if form.scale_bits == 8:
            narrow = random_scales(outputs, blocks, draw)
            scales = widened(narrow)
        stored = 4 if form.bits == 3 else form.bits  # of a code in bytes; those of 3 bits are put together after that
        middle = np.full((outputs, blocks), 1 << stored - 1, np.uint8)
        points = draw.integers(0, 1 << form.bits, (outputs, blocks)).astype(np.uint8) if form.zeros else middle
        whole = codes.astype(np.int64) - np.repeat(points, block, 1)
        self.weight = (whole * np.repeat(scales, block, 1).astype(np.float64))[:, :columns]
        packed = packed_codes(codes, stored).reshape(outputs, blocks, -1)
        if form.bits == 3:
            packed = condensed(packed)
        self.tensors = {"codes": packed, "scales": scales.astype(np.float16)}  # as bundles have them
        if form.scale_bits == 8:
            self.tensors["scales"] = narrow
        if not form.block:
            self.tensors = {"codes": np.ascontiguousarray(whole.T).astype(np.int8), "scales": scales[:, 0].copy()}
        if form.zeros:
            self.tensors["zeros"] = packed_codes(points, stored)
        self.sizes = {
            "N": outputs, "K": columns, "bits": form.bits, "block_size": form.block, "sums": form.sums,
            "zeros": int(form.zeros),
        }  # fmt: skip

    def of(self, x: Array) -> Array:
        """The product of rows, rounded to 8 bits in float32, in float64."""
        x = x.astype(np.float32)
        if self.form.sums:
            x = np.concatenate([x, x.reshape(len(x), -1, self.form.sums).sum(-1)], -1)
        columns = x.shape[1]
        block = self.form.block or columns
        parts = np.pad(x, ((0, 0), (0, -columns % block))).reshape(len(x), -1, block)
        top = np.abs(parts).max(-1, keepdims=True)
        parts = np.rint(parts * (np.float32(127) / top)).astype(np.float64) * (top / np.float32(127))
        product: Array = parts.reshape(len(x), -1)[:, :columns] @ self.weight.T
        return product


def product_trials(products: Sequence[ProductForm], draw: np.random.Generator) -> Iterator[ProductTrial]:
    """One product; or two, the first of which gives a gate and what it multiplies, from which the second makes more.

    Args:
        products: one or two.
        draw: where numbers come from.
    """
    first, *after = products
    width = _BLOCKS * first.block if first.block else _LONG_ROW
    if not after:
        yield ProductTrial(first, _OUTPUTS, width, draw)
        return
    (second,) = after
    middle = ProductTrial(second, _OUTPUTS, math.lcm(2 * UNIT, second.sums or 1), draw)
    yield ProductTrial(first, 2 * middle.width, width, draw)
    yield middle


def gated(x: Array) -> Array:
    """The first half of rows, through SiLU, times the second."""
    gate, up = np.split(x, 2, -1)
    made: Array = gate / (1 + np.exp(-gate)) * up
    return made
