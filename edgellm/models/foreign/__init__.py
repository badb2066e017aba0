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
    Fields,
    Key,
    Values,
    Variant,
    choice,
    flag,
    neutral,
    positive,
    read_keys,
    refuse,
    same_as,
    whole,
)
from edgellm.models.foreign.marian import Marian
from edgellm.models.foreign.names import Names, Stacks
from edgellm.models.foreign.rope import rotary
from edgellm.models.foreign.tensor_file import TensorFile
from edgellm.models.foreign.usual import GGUF_PARTS, HUGGING_FACE_PARTS, hidden_act
from edgellm.models.foreign.windows import full_attention, no_window, windows

__all__ = [
    "GGUF",
    "GGUF_PARTS",
    "HUGGING_FACE_PARTS",
    "MAX_CONTEXT",
    "MAX_LAYERS",
    "METADATA",
    "Fields",
    "HuggingFace",
    "Key",
    "Marian",
    "Names",
    "Stacks",
    "TensorFile",
    "Values",
    "Variant",
    "choice",
    "flag",
    "full_attention",
    "has",
    "hidden_act",
    "lacks",
    "neutral",
    "no_window",
    "positive",
    "read_keys",
    "refuse",
    "rotary",
    "rows_of",
    "same_as",
    "whole",
    "windows",
]
