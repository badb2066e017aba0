"""What a library made of a graph: its network is read back and held against what the graph said.

Parsers drop what they do not know without an error, and a mask of another kind gives plausible words.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgellm_exporters.errors import EngineError
from edgellm_runtime.bundle import Manifest
from edgellm_runtime.bundle.engine_info import CHOOSE, ENCODE
from edgellm_runtime.graphs.token_choice import RESULTS
from edgellm_runtime.spec import SOURCE, Signature

__all__ = ["Facts", "check_parsed"]

_NAMES = {
    "HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32", "INT64": "int64", "INT32": "int32", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a network must be.

    Args:
        outputs: name to dtype, all of them.
        states: name of each input that carries state, or the sources themselves, to its dtype.
        caches: how many of the outputs are caches that are written in place.
        sources: name of each input that is as long as the longest source to the axis along which it is.
        seen: filled by :func:`check_parsed` with the number of layers of each kind.
    """

    outputs: Mapping[str, str]
    states: Mapping[str, str]
    caches: int
    sources: Mapping[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest, role: str) -> Facts:
        """Those of a bundle's graph."""
        return cls(RESULTS, {}, 0) if role == CHOOSE else cls.in_role(manifest.signature, role)

    @classmethod
    def in_role(cls, signature: Signature, role: str) -> Facts:
        """Those of a graph of a model: one that steps, or the encoder's."""
        if role == ENCODE:
            given = {t.name: t for t in signature.encoder.inputs}
            outputs = {t.name: t.dtype for t in signature.encoder.outputs}
            sources = {name: t.shape.index(SOURCE) for name, t in given.items() if SOURCE in t.shape}
            return cls(outputs, {name: t.dtype for name, t in given.items()}, 0, sources)
        outputs = {t.name: t.dtype for t in signature.outputs}
        outputs |= {s.present_name: s.dtype for s in signature.carried}
        return cls(
            outputs, {s.past_name: s.dtype for s in signature.state},
            sum(spec.update == "append" for spec in signature.state),
            {s.past_name: s.shape.index(SOURCE) for s in signature.encoded},
        )  # fmt: skip


def check_parsed(trt: Any, network: Any, facts: Facts, name: str) -> None:
    """Compare a parsed network with what its graph says, and let its attentions be written out where no kernel fits.

    Args:
        trt: the library.
        network: as parsed.
        facts: what it must be.
        name: the graph's, for messages.

    Raises:
        EngineError: what differs.
    """
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name: network.get_output(i) for i in range(network.num_outputs)}
    _same_types(outputs, facts.outputs, name)
    _same_types({n: t for n, t in inputs.items() if n in facts.states}, facts.states, name)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    read = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    if idle := sorted(inputs.keys() - read):
        raise EngineError(f"{name}: the parser dropped what reads {', '.join(idle)}; its engine would ignore it")
    facts.seen.update(collections.Counter(layer.type.name for layer in layers))
    for layer in layers:
        if layer.type.name == "ATTENTION_INPUT":
            _check_attention(trt, layer, name)
    if (found := facts.seen.get("KV_CACHE_UPDATE", 0)) != facts.caches:
        raise EngineError(f"{name}: {found} caches are written in place instead of {facts.caches}")


def _same_types(found: Mapping[str, Any], expected: Mapping[str, str], name: str) -> None:
    types = {key: _NAMES.get(tensor.dtype.name, tensor.dtype.name) for key, tensor in found.items()}
    if types != dict(expected):
        wrong = sorted(key for key in types.keys() | expected.keys() if types.get(key) != expected.get(key))
        said = ", ".join(f"{key} is {types.get(key, 'missing')}, not {expected.get(key, 'there')}" for key in wrong)
        raise EngineError(f"{name}: the parsed network differs from the graph: {said}")


def _check_attention(trt: Any, layer: Any, name: str) -> None:
    layer.__class__ = trt.IAttentionInputLayer  # the network gives layers as their base
    attention = layer.attention
    if attention.causal_kind.name != "NONE" or attention.mask is None:
        raise EngineError(
            f"{name}: an attention was parsed with causal mask {attention.causal_kind.name} and "
            f"{'no' if attention.mask is None else 'a'} mask of its own; it must have its own mask only"
        )
    attention.decomposable = True
