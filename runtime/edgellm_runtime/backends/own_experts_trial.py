"""Whether edgellm's own mixture of experts gives the sums that it should, on this very processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.own_product_trial import ProductForm, gated, product_form, product_trials
from edgellm_runtime.backends.trial_session import trial_session
from edgellm_runtime.graphs.own_attention import DOMAIN
from edgellm_runtime.graphs.own_experts import EXPERTS
from edgellm_runtime.graphs.writer import Node, graph_bytes

__all__ = ["ExpertsForm", "experts_error", "experts_form"]

Array = NDArray[Any]
_ROWS = (1, 4, 17)
_EXPERTS, _FIRST = 3, 1  # of five, of which the others are not the node's


@dataclass(frozen=True)
class ExpertsForm:
    """One kind of mixture.

    Args:
        up: an expert's first product.
        down: its last.
        op: the operator.
    """

    up: ProductForm
    down: ProductForm
    op: str = EXPERTS

    def __str__(self) -> str:
        return f"{self.op} of {self.up} and {self.down}"


def experts_form(node: Node) -> ExpertsForm:
    """The kind of a node."""
    return ExpertsForm(product_form(node, ""), product_form(node, "_down"))


def experts_error(form: ExpertsForm) -> float:
    """How far sums are from NumPy's, as a part of the length of what experts add, at the worst number of rows.

    Args:
        form: the kind of mixture.

    Raises:
        BackendError: the library is missing.
        Unusable: the kernels cannot run here.
    """
    draw = np.random.default_rng(7)
    experts = [list(product_trials((form.up, form.down), draw)) for _ in range(_EXPERTS)]
    up, down = experts[0]
    tensors = {
        f"{name}{i}{suffix}": value
        for i, trials in enumerate(experts)
        for trial, suffix in zip(trials, ("", "_down"), strict=True)
        for name, value in trial.tensors.items()
    }
    sizes = {**up.sizes, **{f"{name}_down": size for name, size in down.sizes.items()}}
    inputs: dict[str, list[str | int]] = {
        "total": ["rows", down.sizes["N"]], "x": ["rows", up.width], "shares": ["rows", _EXPERTS + 2 * _FIRST]
    }  # fmt: skip
    node = Node(EXPERTS, [*inputs, *tensors], ["y"], {**sizes, "first": _FIRST, "experts": _EXPERTS}, domain=DOMAIN)
    graph = graph_bytes(
        [node], dict.fromkeys(inputs, "float32"), {"y": "float32"}, tensors=tensors, shapes=inputs
    )  # fmt: skip
    session = trial_session(graph)
    errors = []
    for rows in _ROWS:
        given = {name: draw.standard_normal((rows, int(sizes[1]))).astype(np.float32) for name, sizes in inputs.items()}
        given["shares"] *= draw.integers(0, 2, given["shares"].shape)
        given["shares"][0, _FIRST] = 1  # so that something is added
        expected = given["total"].astype(np.float64)
        for i, (first, last) in enumerate(experts):
            share = given["shares"][:, _FIRST + i, None]
            expected += share * last.of(gated(first.of(given["x"])))
        (found,) = session.run(None, given)
        added = expected - given["total"]  # far less than the sum where weights have few bits
        errors.append(float(np.linalg.norm(found - expected) / np.linalg.norm(added)))
    return max(errors) if np.isfinite(errors).all() else np.inf
