"""The quantizations that ``--quantize`` names. A new method is a new value here and a file beside this one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.plan import ROW, Scheme

__all__ = ["ENGINE_METHODS", "METHODS", "Method", "find_method", "fitted"]


@dataclass(frozen=True)
class Method:
    """One way to quantize a whole model.

    Args:
        summary: for help texts.
        layers: the format of weights between the embedding and the logits, or None for floats. Weights whose rows do
            not divide into its blocks get the largest smaller block that does, unless ``exact``.
        ends: that of the embedding and of the projection to the vocabulary.
        bounds: what a bundle must hold to, against the float model; see :mod:`edgellm_runtime.checks.verify`.
        smooth: whether to smooth the layers' inputs first.
        keep: whether each weight gets the smallest format that holds the checkpoint's own values, instead.
        narrow_scales: whether formats that are found so have scales of 8 bits where they can.
        exact: whether the blocks are just those that are named.
        integer_products: whether products with weights that have one scale a row round what they read, row by row.
        fixed_inputs: whether such products read codes of the weights' kind, with one scale for each tensor that was
            chosen at export.
    """

    summary: str
    layers: Scheme | None
    ends: Scheme | None
    bounds: Mapping[str, float] = field(default_factory=dict)
    smooth: bool = False
    keep: bool = False
    narrow_scales: bool = False
    exact: bool = False
    integer_products: bool = True
    fixed_inputs: bool = False


_EIGHT = {"kl": 0.02, "top1": 0.9, "state": 0.15, "split": 0.1, "batch": 0.1, "hidden": 0.15}
_MIXED = {**_EIGHT, "top1": 0.8}  # `keep` has 86% of the 44 tokens of SmolLM2 that are verified, at a KL of 0.003
_FOUR = {
    "kl": 0.6,
    "top1": 0.5,
    "split": 0.15,
    "batch": 0.15,
    "hidden": 0.7,
}  # no bound on state: a key of SmolLM2 was 88% off

# Float graphs differ from PyTorch by rounding alone; the bounds of the others hold with a margin for the models in
# docs/benchmarks.md and fail for a wrong graph.
METHODS: Mapping[str, Method] = {
    "none": Method(
        "float weights", None, None,
        {"logits": 1e-4, "kl": 1e-6, "top1": 1.0, "state": 1e-4, "split": 1e-4, "batch": 1e-4, "greedy": 1.0,
         "hidden": 1e-4},
    ),
    "int8": Method("8-bit weights in blocks", Scheme(8), Scheme(8), _EIGHT, smooth=True),
    "w8a8": Method(
        "8-bit weights with one scale a row, for the fastest prompts", Scheme(8, ROW), Scheme(8, 64),
        {"kl": 0.05, "top1": 0.85, "state": 0.3, "split": 0.1, "batch": 0.1, "hidden": 0.3}, smooth=True,
    ),
    "int4": Method(
        "4-bit weights, the embedding and the projection to the vocabulary in 8",
        Scheme(4, 64, symmetric=False), Scheme(8, 64), _FOUR, smooth=True,
    ),
    "keep": Method(
        "each weight in the smallest format that holds it as the checkpoint does: what was rounded already is not "
        "rounded again", None, None, _MIXED, keep=True,
    ),
}  # fmt: skip

_ROW = Scheme(8, ROW)
# What engines take: scales of weights for whole rows or, of 4 bits, for blocks; scales of inputs known beforehand.
ENGINE_METHODS: Mapping[str, Method] = {
    "none": METHODS["none"],
    "int8": Method("8-bit weights with one scale a row", _ROW, _ROW, _EIGHT, integer_products=False),
    "w8a8": Method(
        "8-bit weights and inputs of products, the latter with one scale each", _ROW, _ROW,
        {"kl": 0.1, "top1": 0.75, "split": 0.2, "batch": 0.2, "hidden": 0.5}, smooth=True,
        integer_products=False, fixed_inputs=True,
    ),
    "int4": Method(
        "4-bit weights in blocks of 64, the embedding and the projection to the vocabulary in 8",
        Scheme(4, 64, positive=True), _ROW, {**_FOUR, "kl": 0.8}, smooth=True, integer_products=False,
    ),
    "fp8": Method(
        "8-bit floats (E4M3) for weights and inputs of products, the latter with one scale each",
        Scheme(8, ROW, floating=True), _ROW, {"kl": 0.1, "top1": 0.75, "split": 0.2, "batch": 0.2, "hidden": 0.5},
        integer_products=False, fixed_inputs=True,
    ),
}  # fmt: skip
_SCALES = "scales8"
_FORMAT = re.compile(rf"(\d+):(\d+|row)(?::(asymmetric|shifted))?(?::({_SCALES}))?")


def find_method(name: str, methods: Mapping[str, Method] = METHODS) -> Method:
    """The method of that name, or one format for all weights, written BITS:BLOCK, as in ``4:32:asymmetric``.

    Args:
        name: as ``--quantize`` has it.
        methods: those of the target; one that has methods of its own takes no other format.

    Raises:
        QuantizeError: there is none, or the format is impossible.
    """
    if name in methods:
        return methods[name]
    if methods is not METHODS:
        raise QuantizeError(f"this target has no quantization {name!r}; it has {', '.join(methods)}")
    if name == f"keep:{_SCALES}":
        return replace(METHODS["keep"], summary="as keep, in formats whose scales have 8 bits", narrow_scales=True)
    written = _FORMAT.fullmatch(name)
    if written is None:
        raise QuantizeError(
            f"unknown quantization {name!r}; there are {', '.join(METHODS)}, and BITS:BLOCK such as 4:32, "
            "4:32:asymmetric, 3:64:asymmetric, 4:32:shifted or 8:row; after it, or after keep, "
            f":{_SCALES} makes scales of 16 bits 8"
        )
    bits, block, kind, narrow = written.groups()
    row, scales = block == "row", 8 if narrow else 16
    scheme = Scheme(int(bits), ROW if row else int(block), kind is None, kind == "shifted", scale_bits=scales)
    # rows of the vocabulary are looked up too, which fewer formats can be
    looked_up = scheme.bits >= 3 and not scheme.shifted and scheme.block != ROW
    ends = scheme if looked_up else Scheme(8, 32, scale_bits=scheme.scale_bits)
    bounds = _MIXED if bits == "8" else _FOUR if bits == "4" else {"split": 0.3, "batch": 0.3}
    return Method(f"{scheme} weights", scheme, ends, bounds, smooth=True, exact=True)


def fitted(scheme: Scheme, columns: int, *, exact: bool = False) -> Scheme | None:
    """The scheme with the largest block, up to its own, that divides rows of so many columns; None if none does.

    Args:
        scheme: what is wanted.
        columns: of the weight.
        exact: whether no other block will do.
    """
    if scheme.block == ROW:
        return scheme
    for block in (scheme.block,) if exact else (256, 128, 64, 32, 16):
        if block <= scheme.block and columns % block == 0:
            return replace(scheme, block=block)
    return None
