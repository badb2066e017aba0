"""What families say of other people's checkpoints: names, keys and layouts, as tables that every family shares.

A family declares a :class:`HuggingFace`, a :class:`GGUF`, a :class:`Marian`, a :class:`TensorFile` or several of
them in its :class:`~edgellm.models.registry.Architecture`.
Nothing here names an architecture, reads a file or needs PyTorch.
"""

from edgellm.models.foreign.gguf import GGUF, has, lacks, rows_of
from edgellm.models.foreign.huggingface import HuggingFace
from edgellm.models.foreign.keys import (
    MAX_CONTEXT,
    MAX_LAYERS,
    METADATA,
    REQUIRED,
    Fields,
    Key,
    Values,
    Variant,
    checked_flag,
    checked_kinds,
    checked_positive,
    checked_whole,
    choice,
    flag,
    inverse,
    neutral,
    positive,
    read_keys,
    refuse,
    same_as,
    whole,
)
from edgellm.models.foreign.marian import Marian
from edgellm.models.foreign.names import Names, Stacks, alike
from edgellm.models.foreign.rope import rotary
from edgellm.models.foreign.tensor_file import TensorFile
from edgellm.models.foreign.usual import (
    ATTENTION_PARTS,
    FEED_FORWARD_PARTS,
    GGUF_KEYS,
    GGUF_PARTS,
    GGUF_TENSORS,
    HUGGING_FACE_PARTS,
    MLP_PARTS,
    as_many_heads,
    hidden_act,
    usual_keys,
    width_by_heads,
)
from edgellm.models.foreign.windows import full_attention, no_window, windows

__all__ = [
    "ATTENTION_PARTS",
    "FEED_FORWARD_PARTS",
    "GGUF",
    "GGUF_KEYS",
    "GGUF_PARTS",
    "GGUF_TENSORS",
    "HUGGING_FACE_PARTS",
    "MAX_CONTEXT",
    "MAX_LAYERS",
    "METADATA",
    "MLP_PARTS",
    "REQUIRED",
    "Fields",
    "HuggingFace",
    "Key",
    "Marian",
    "Names",
    "Stacks",
    "TensorFile",
    "Values",
    "Variant",
    "alike",
    "as_many_heads",
    "checked_flag",
    "checked_kinds",
    "checked_positive",
    "checked_whole",
    "choice",
    "flag",
    "full_attention",
    "has",
    "hidden_act",
    "inverse",
    "lacks",
    "neutral",
    "no_window",
    "positive",
    "read_keys",
    "refuse",
    "rotary",
    "rows_of",
    "same_as",
    "usual_keys",
    "whole",
    "width_by_heads",
    "windows",
]
