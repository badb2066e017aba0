"""Whether edgellm's own kernels compute what they should, on this very processor: each operator against NumPy.

What is tried is what a bundle's graph has of them: the bits and blocks of its products, and what is done before and
between these. A trial is a node with few random weights, computed by NumPy in float64 from the very numbers that its
codes stand for, with inputs rounded as ``kernels/src/product.h`` says. Where another order of sums comes before that
rounding, a code may be another, which is all that a result may be off by.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.caches import CacheFile
from edgellm_runtime.backends.kernel_test import processor
from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_attention_trial import AttentionForm, attention_error, attention_form
from edgellm_runtime.backends.own_experts_trial import ExpertsForm, experts_error, experts_form
from edgellm_runtime.backends.own_gather_trial import GatherForm, gather_error, gather_form
from edgellm_runtime.backends.own_kernels import OwnKernels, Unusable, find, tell
from edgellm_runtime.backends.own_product_trial import (
    ProductForm,
    ProductTrial,
    gated,
    product_form,
    product_trials,
)
from edgellm_runtime.backends.trial_session import trial_session
from edgellm_runtime.errors import BackendError, first_line
from edgellm_runtime.freed_pages import trim
from edgellm_runtime.graphs.onnx_file import ReadGraph
from edgellm_runtime.graphs.own_attention import ATTENTIONS, DOMAIN
from edgellm_runtime.graphs.own_experts import EXPERTS
from edgellm_runtime.graphs.own_gather import GATHER
from edgellm_runtime.graphs.writer import Node, Shape, graph_bytes
from edgellm_runtime.kernel_choice import chosen_kernels

__all__ = ["OWN_BOUND", "OwnForm", "ProductForm", "form_of", "own_error", "usable_kernels"]

Array = NDArray[Any]
FEW_ROWS = (1, 4, 17)
OWN_BOUND = 0.01  # of a result's length; without the rounding of inputs it would be 0.006 a product
_EPSILON = 1e-5


@dataclass(frozen=True, order=True)
class OwnForm:
    """One kind of node.

    Args:
        op: the operator.
        products: one, or two with a gate between them.
    """

    op: str
    products: tuple[ProductForm, ...]

    def __str__(self) -> str:
        return f"{self.op} of {' and '.join(map(str, self.products))}"


AnyForm: TypeAlias = OwnForm | AttentionForm | GatherForm | ExpertsForm


def form_of(node: Node) -> AnyForm:
    """The kind of a node of one of edgellm's own operators."""
    if node.op == GATHER:
        return gather_form(node)
    if node.op == EXPERTS:
        return experts_form(node)
    if node.op in ATTENTIONS.values():
        return attention_form(node)
    suffixes = ("", "_down") if "N_down" in node.attributes else ("",)
    return OwnForm(node.op, tuple(product_form(node, suffix) for suffix in suffixes))


def own_error(form: AnyForm, rows: Iterable[int] = FEW_ROWS) -> float:
    """How far an operator is from NumPy, as a part of its result's length, at the worst number of rows.

    Args:
        form: the kind of node.
        rows: numbers of input rows to try.

    Raises:
        BackendError: the library is missing.
        Unusable: the kernels cannot run here.
    """
    if isinstance(form, AttentionForm):
        return attention_error(form)
    if isinstance(form, GatherForm):
        return gather_error(form)
    if isinstance(form, ExpertsForm):
        return experts_error(form)
    draw = np.random.default_rng(7)
    trials = list(product_trials(form.products, draw))
    gamma = draw.uniform(0.5, 1.5, trials[0].width).astype(np.float32) if "Norm" in form.op else None
    session = trial_session(_graph(form, trials, gamma))
    return max(_off(session, trials, gamma, count, draw) for count in rows)


def _graph(form: OwnForm, trials: Sequence[ProductTrial], gamma: Array | None) -> bytes:
    inputs, outputs, tensors, sizes = ["x"], ["y"], dict[str, Array](), dict[str, Any]()
    if gamma is not None:
        inputs += ["skip", "gamma"]
        outputs.append("sum")
        tensors["gamma"] = gamma
        sizes["epsilon"] = _EPSILON
    for trial, suffix in zip(trials, ("", "_down"), strict=False):
        inputs += [f"{name}{suffix}" if name in trial.tensors else "" for name in ("codes", "scales", "zeros")]
        tensors |= {f"{name}{suffix}": value for name, value in trial.tensors.items()}
        sizes |= {f"{name}{suffix}": value for name, value in trial.sizes.items()}
    while not inputs[-1]:
        inputs.pop()
    rows: dict[str, Shape] = {name: ["rows", trials[0].width] for name in inputs[: 1 if gamma is None else 2]}
    node = Node(form.op, inputs, outputs, sizes, domain=DOMAIN)
    floats = dict.fromkeys(rows, "float32")
    return graph_bytes([node], floats, dict.fromkeys(outputs, "float32"), tensors=tensors, shapes=rows)


def _off(
    session: Any, trials: Sequence[ProductTrial], gamma: Array | None, rows: int, draw: np.random.Generator
) -> float:
    x = draw.standard_normal((rows, trials[0].width)).astype(np.float32)
    given, expected = {"x": x}, [x.astype(np.float64)]
    if gamma is not None:
        given["skip"] = draw.standard_normal(x.shape).astype(np.float32)
        total = expected[0] + given["skip"]
        expected = [total / np.sqrt((total**2).mean(-1, keepdims=True) + _EPSILON) * gamma, total]
    expected[0] = trials[0].of(expected[0])
    if len(trials) > 1:
        expected[0] = trials[1].of(gated(expected[0]))
    found = session.run(None, given)
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
    return float(max(errors)) if np.isfinite(errors).all() else np.inf


def usable_kernels(
    graph: Path, asked: str | None = None, read: ReadGraph | None = None
) -> tuple[OwnKernels, bytes] | None:
    """Edgellm's own kernels and the graph that runs on them, if they are asked for.

    Where they cannot run or are wrong, that is told, and it is None.

    Args:
        graph: a ``model.onnx`` that was checked.
        asked: as :func:`~edgellm_runtime.kernel_choice.chosen_kernels` takes it.
        read: what is in the file, where it has been read already.

    Raises:
        OptionError: neither ``onnxruntime`` nor ``own``.
    """
    if chosen_kernels(asked) != "own":
        return None
    try:
        kernels = find(library())
        swapped, nodes = kernels.swapped(graph.read_bytes() if read is None else read)
        if not nodes:
            raise Unusable(f"{graph.parent} has no product that edgellm-kernels computes")
        forms = sorted({form_of(node) for node in nodes}, key=repr)
        cache = CacheFile("kernel-test", kernels.digest, library().__version__, processor(), *map(repr, forms))
        if cache.read() is None:
            for form in forms:
                if (error := _known_error(form)) > OWN_BOUND:
                    raise Unusable(f"edgellm-kernels computes {form} wrong on this processor, by {error:.0%}")
            cache.write(b"right")
            trim()  # what the trials took, before weights come
    except Unusable as reason:
        tell(str(reason))
        return None
    return kernels, swapped


@functools.cache
def _known_error(form: AnyForm) -> float:
    try:
        return own_error(form)
    except (BackendError, Unusable):
        raise
    except Exception as error:  # the library's own kinds, of a node that an older build does not take
        raise Unusable(
            f"edgellm-kernels does not take {form} ({first_line(error)}); install those of this release"
        ) from error
