"""What a family says of files of Marian, the translators' toolkit: https://marian-nmt.github.io."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgellm.errors import CheckpointError

__all__ = ["TRANSFORMER", "Marian", "in_layer"]

TRANSFORMER: Mapping[str, str] = {  # settings of the usual one: normed after each part, with one table of embeddings
    "type": "transformer", "tied-embeddings-all": "true", "transformer-ffn-depth": "2", "transformer-preprocess": "",
    "transformer-postprocess": "dan", "transformer-postprocess-top": "", "transformer-pool": "false",
    "transformer-train-position-embeddings": "false", "transformer-no-projection": "false",
    "layer-normalization": "false", "ulr": "false", "lemma-dim-emb": "0", "output-omit-bias": "false",
    "right-left": "false",
}  # fmt: skip
_PARTS = {"attention": "self", "cross": "context", "recurrence": "rnn", "mlp": "ffn"}
_NORMED = {"attention": "self_Wo", "cross": "context_Wo", "recurrence": "rnn_ffn", "mlp": "ffn_ffn"}
_WITHIN = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "fc1": "1", "fc2": "2", "in_proj": "", "gate_proj": "f",
}  # fmt: skip


def in_layer(side: str, name: str) -> str:
    """What files call a parameter of a layer.

    Args:
        side: ``encoder`` or ``decoder``.
        name: ours within it, such as ``0.attention.q_proj.weight`` or ``0.mlp_norm.bias``.
    """
    layer, part, *within, kind = name.split(".")
    before = f"{side}_l{int(layer) + 1}"
    if not within:
        return f"{before}_{_NORMED[part.removesuffix('_norm')]}_ln_{'scale' if kind == 'weight' else 'bias'}"
    return f"{before}_{_PARTS[part]}_{'W' if kind == 'weight' else 'b'}{_WITHIN[within[0]]}"


@dataclass(frozen=True)
class Marian:
    """How a family reads Marian's files.

    Args:
        fields: settings that are whole numbers, and the field of our configuration that each is, or several.
        needed: settings that must have the value that the family computes, as they are written.
        name: our parameter name to the file's.
        words: settings that are words, and what fields of our configuration each word means.
        fixed: fields of our configuration that Marian's models of the family have alike.
        starts_apart: whether answers begin with a token of no embedding behind the vocabulary, which is never chosen.
    """

    fields: Mapping[str, str | tuple[str, ...]]
    needed: Mapping[str, str]
    name: Callable[[str], str]
    words: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    starts_apart: bool = False

    def read(self, settings: Mapping[str, str]) -> dict[str, Any]:
        """The fields of our configuration.

        Args:
            settings: of the model's file.

        Raises:
            CheckpointError: a setting that the family does not compute, or that is no whole number.
        """
        wrong = [
            f"{key} is {settings.get(key, 'not there')!r}"
            for key, v in self.needed.items()
            if settings.get(key, v) != v
        ]
        if wrong:
            raise CheckpointError(f"{', '.join(wrong)}, which edgellm computes no model with")
        for key in self.fields:
            if not settings.get(key, "").isdecimal():
                raise CheckpointError(f"{key} is {settings.get(key, 'not there')!r}, and no whole number")
        found = dict(self.fixed)
        for key, names in self.fields.items():
            found |= dict.fromkeys((names,) if isinstance(names, str) else names, int(settings[key]))
        for key, meanings in self.words.items():
            if (word := settings.get(key, "")) not in meanings:
                raise CheckpointError(f"{key} is {word!r}, and edgellm knows {', '.join(meanings)}")
            found |= meanings[word]
        return found
