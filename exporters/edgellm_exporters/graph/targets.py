"""What a graph can be made for: each target's rules, passes, dtypes and needs. A new target is a new value here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from edgellm.ops import ATTENTION, Op
from edgellm.ops.schema import View
from edgellm_exporters.errors import ExportError
from edgellm_exporters.graph.capture import OPSET
from edgellm_exporters.lowering import cuda, ort, standard, tensorrt
from edgellm_exporters.lowering.context import Rule
from edgellm_exporters.passes.add_rms_norm import FuseAddRMSNorm
from edgellm_exporters.passes.compute_tables import ComputeTables
from edgellm_exporters.passes.merge_experts import MergeExperts
from edgellm_exporters.passes.merge_linears import MergeLinears
from edgellm_exporters.passes.merge_low_rank import MergeLowRank
from edgellm_exporters.passes.split_sequence import SplitSequence
from edgellm_exporters.quantize.methods import ENGINE_METHODS, METHODS, Method
from edgellm_exporters.quantize.plan import Scheme
from edgellm_runtime.spec import TensorSpec

__all__ = ["TARGETS", "Target", "find_target"]


@dataclass(frozen=True)
class Target:
    """One kind of device library.

    Args:
        name: what the command line calls it.
        summary: one line for help texts.
        rules: canonical op to its form here.
        passes: fusions of canonical ops that ``rules`` has forms for, in order.
        domains: operator sets its graphs use, with their versions.
        dtypes: precisions of activations and unquantized weights.
        caches: precisions that attention can keep keys and values in.
        narrow_caches: ops whose caches its kernels hold in fewer bits.
        narrow_scales: whether it stores scales of 8 bits; otherwise it has the same numbers in 16.
        ragged_chunks: whether several tokens over a filled cache may come for several rows at once.
        methods: the quantizations that it has forms for.
        requires: libraries that run its graphs, any one of them, with the least version.
        roles: whether it has a graph for prompts and one for single tokens, of fixed sizes, instead of one for all.
        device: where its graphs are meant to run.
        inputs: what its graphs may take besides the inputs that all have.
        wide: by dtype, ops that have kernels in float32 only, or sum what 16 bits would lose; of an op with a
            reduction, those with one alone: ``ScatterElements add``.
        check_kernel: refuses a format of weights that it would compute with, but far too slowly.
        after_lowering: passes over what the rules made.
        lacks_kernel: why it has no kernel for a canonical node and computes it in standard operators; else empty.
    """

    name: str
    summary: str
    rules: Mapping[str, Rule]
    passes: tuple[type[ir.passes.InPlacePass], ...]
    domains: Mapping[str, int]
    dtypes: tuple[str, ...]
    caches: tuple[str, ...]
    ragged_chunks: bool
    narrow_caches: tuple[Op, ...] = ()
    narrow_scales: bool = False
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)
    requires: Mapping[str, str] = field(default_factory=lambda: {"onnxruntime": "1.30"})
    roles: bool = False
    device: str = "cpu"
    inputs: tuple[TensorSpec, ...] = ()
    wide: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    check_kernel: Callable[[Scheme], None] = lambda scheme: None
    lacks_kernel: Callable[[View], str] = lambda view: ""
    after_lowering: tuple[type[ir.passes.InPlacePass], ...] = ()


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnx", summary="standard ONNX operators only; runs wherever opset 23 does", rules=standard.RULES,
            passes=(), domains={"": OPSET}, dtypes=("float32",), caches=("float32",), ragged_chunks=True,
        ),
        Target(
            name="cpu", summary="ONNX Runtime's fused kernels on CPU", rules=ort.RULES,
            passes=(MergeLinears, MergeExperts, FuseAddRMSNorm), domains={"": OPSET, ort.DOMAIN: 1},
            dtypes=("float32",), caches=("float32", "float16", "int8"), narrow_caches=(ATTENTION,),
            narrow_scales=True, ragged_chunks=False, check_kernel=ort.check_kernel, lacks_kernel=ort.lacks_kernel,
            after_lowering=(ComputeTables,),
        ),
        Target(
            name="tensorrt", summary="engines for NVIDIA GPUs, and the standard ONNX that they are built from",
            rules=tensorrt.RULES, passes=(SplitSequence, MergeLinears, MergeLowRank), domains={"": tensorrt.OPSET},
            dtypes=("float16", "bfloat16", "float32"), caches=("float32",), ragged_chunks=True, methods=ENGINE_METHODS,
            requires={"tensorrt": "11.0", "tensorrt_rtx": "1.7", "onnxruntime": "1.30"}, roles=True, device="tensorrt",
        ),
        Target(
            name="cuda", summary="ONNX Runtime's fused kernels on NVIDIA GPUs, in 16 bits", rules=cuda.RULES,
            passes=(MergeLinears, FuseAddRMSNorm), domains={"": OPSET, ort.DOMAIN: 1}, dtypes=("float16", "bfloat16"),
            caches=("float32",), ragged_chunks=False, methods={n: METHODS[n] for n in ("none", "int8", "int4")},
            device="cuda", lacks_kernel=ort.lacks_kernel, inputs=(cuda.TOTAL_LENGTH,),
            wide=dict.fromkeys(("float16", "bfloat16"), ("LinearAttention", "ScatterElements add")),
        ),
    )
}  # fmt: skip


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ExportError: there is none.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name]
