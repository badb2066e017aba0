"""Whether edgellm's own attention computes what it should, on this very processor: against NumPy in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgellm_runtime.backends.trial_session import trial_session
from edgellm_runtime.graphs.own_attention import ATTENTIONS, DOMAIN
from edgellm_runtime.graphs.writer import Attribute, Node, Shape, graph_bytes

__all__ = ["AttentionForm", "attention_error", "attention_form"]

Array = NDArray[Any]
_SLOTS, _WINDOW, _TURNED, _EPSILON = 600, 40, 16, 1e-5
# Tokens that each row holds, and new ones: a prompt of rows of two lengths, a token, a piece over more than a chunk,
# and one that is long enough for keys to be turned for it (kFewQueries).
_STEPS = (([0, 0], [7, 5]), ([300, 12], [1, 1]), ([511], [5]), ([250], [64]))


@dataclass(frozen=True)
class AttentionForm:
    """One kind of attention.

    Args:
        op: the operator.
        size: of a head; some have code of their own.
        together: heads that share one head of the cache.
        window: whether a token sees only so many before it.
        turned: whether queries and keys are turned by their positions.
        normed: whether their heads are normed before that.
    """

    op: str
    size: int
    together: int
    window: bool
    turned: bool
    normed: bool = False

    def __str__(self) -> str:
        return f"{self.op} of {self.together} heads of {self.size} to one of the cache"


def attention_form(node: Node) -> AttentionForm:
    """The kind of a node."""
    heads, cached, size = (node.attributes[name] for name in ("num_heads", "kv_num_heads", "head_size"))
    assert isinstance(heads, int) and isinstance(cached, int) and isinstance(size, int)
    window, turned, normed = (bool(node.attributes[name]) for name in ("window", "do_rotary", "norms"))
    return AttentionForm(node.op, size, heads // cached, window, turned, normed)


def attention_error(form: AttentionForm) -> float:
    """How far an operator is from NumPy, as a part of its result's length, at the worst step.

    Args:
        form: the kind of node.

    Raises:
        BackendError: the library is missing.
        Unusable: the kernels cannot run here.
    """
    trial = _Trial(form)
    return max(trial.error(np.array(past), np.array(new)) for past, new in _STEPS)


class _Trial:
    """A node over two heads of a cache."""

    def __init__(self, form: AttentionForm) -> None:
        self.form, self.draw = form, np.random.default_rng(7)
        self.cache = next(dtype for dtype, op in ATTENTIONS.items() if op == form.op)
        self.narrow = self.cache == "int8"
        self.heads, self.scale = 2 * form.together, 1 / math.sqrt(form.size)
        self.scales = self.draw.uniform(0.01, 0.02, (2, 2, form.size)).astype(np.float32)  # of keys and of values
        self.norms = self.draw.uniform(0.5, 1.5, (2, form.size)).astype(np.float32)  # of queries and of keys
        angles = self.draw.uniform(0, 6, (_SLOTS, _TURNED // 2))
        self.tables = [np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)]
        self.session = trial_session(self._graph(), threads=2)

    def _graph(self) -> bytes:
        cache = self.cache
        dtypes = {"x": "float32", "k": cache, "v": cache, "last": "int32", "longest": "int32"}
        tensors: dict[str, Array] = dict(zip(("cos", "sin"), self.tables, strict=True)) if self.form.turned else {}
        inputs = [*dtypes, *(tensors or ["", ""]), *(["qn", "kn"] if self.form.normed else ["", ""])]
        tensors |= dict(zip(("qn", "kn"), self.norms, strict=True)) if self.form.normed else {}
        if self.narrow:
            tensors |= {"ks": self.scales[0], "vs": self.scales[1]}
            inputs += ["ks", "vs"]
        while not inputs[-1]:
            inputs.pop()
        sizes: dict[str, Attribute] = {
            "num_heads": self.heads, "kv_num_heads": 2, "scale": self.scale, "do_rotary": int(self.form.turned),
            "window": _WINDOW * self.form.window, "norms": int(self.form.normed), "epsilon": _EPSILON,
        }  # fmt: skip
        shapes: dict[str, Shape] = {"longest": []}
        outputs = {"y": "float32", "next_k": cache, "next_v": cache}
        node = Node(self.form.op, inputs, list(outputs), sizes, domain=DOMAIN)
        return graph_bytes([node], dtypes, outputs, tensors=tensors, shapes=shapes)

    def error(self, past: Array, new: Array) -> float:
        """Of one step, for rows that hold ``past`` tokens and read ``new`` ones."""
        shape = (len(past), 2, _SLOTS, self.form.size)
        caches = [self.draw.standard_normal(shape).astype(self.cache) for _ in range(2)]
        if self.narrow:
            caches = [self.draw.integers(-128, 128, shape).astype(np.int8) for _ in range(2)]
        x = self.draw.standard_normal((len(past), new.max(), (self.heads + 4) * self.form.size)).astype(np.float32)
        last = (past + new - 1).astype(np.int32)
        given = {"x": x, "k": caches[0], "v": caches[1], "last": last, "longest": np.array(last.max() + 1, np.int32)}
        y, *present = self.session.run(None, given)
        errors = []
        for row in range(len(past)):
            expected, keys, values = self._row(x[row, : new[row]], [cache[row] for cache in caches], int(past[row]))
            found = [y[row, : new[row]], *(cache[row, :, : last[row] + 1] for cache in present)]
            for a, b in zip(found, (expected, keys, values), strict=True):
                errors.append(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b))
        return float(max(errors)) if np.isfinite(errors).all() else np.inf

    def _row(self, x: Array, caches: list[Array], past: int) -> tuple[Array, Array, Array]:
        """The result of one row's tokens (time, features), and its keys and values (heads, slots, size)."""
        parts = x.reshape(len(x), -1, self.form.size).transpose(1, 0, 2)
        queries, keys, values = np.split(parts, [self.heads, self.heads + 2])
        places = past + np.arange(len(x))
        queries, keys = (
            self._turned(self._normed(heads, norm), places)
            for heads, norm in zip((queries, keys), self.norms, strict=True)
        )
        held = []
        for cache, fresh, scale in zip(caches, (keys, values), self.scales, strict=True):
            if self.narrow:
                fresh = np.clip(np.rint(fresh / scale[:, None]), -128, 127)
            fresh = fresh.astype(self.cache)
            held.append(np.concatenate([cache[:, :past], fresh], 1).astype(np.float64))
        wide = [h * scale[:, None] if self.narrow else h for h, scale in zip(held, self.scales, strict=True)]
        k, v = (np.repeat(each, self.form.together, 0) for each in wide)
        scores = self.scale * queries.astype(np.float64) @ k.transpose(0, 2, 1)
        apart = places[:, None] - np.arange(scores.shape[-1])
        unseen = (apart < 0) | (self.form.window & (apart >= _WINDOW))
        weights = np.exp(np.where(unseen, -np.inf, scores - scores.max(-1, keepdims=True)))
        result = (weights / weights.sum(-1, keepdims=True)) @ v  # (heads, time, size)
        return result.transpose(1, 0, 2).reshape(len(x), -1), held[0], held[1]

    def _normed(self, x: Array, weight: Array) -> Array:
        """Heads (heads, time, size), each normed, if the form has that."""
        scale = 1 / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + _EPSILON)
        return x * scale * weight if self.form.normed else x

    def _turned(self, x: Array, places: Array) -> Array:
        """Features of heads (heads, time, size) turned by their positions."""
        if not self.form.turned:
            return x
        cos, sin = (table[places] for table in self.tables)
        a, b, rest = np.split(x, [_TURNED // 2, _TURNED], -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)
