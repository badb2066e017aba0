"""The parts that models are built from."""

from edgellm.models.layers.attention import SelfAttention
from edgellm.models.layers.convolution import CausalConv
from edgellm.models.layers.experts import Experts
from edgellm.models.layers.gated_delta import GatedDeltaMixer
from edgellm.models.layers.mlp import MLP, GatedMLP, PackedMLP
from edgellm.models.layers.recurrent import RecurrentMixer
from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.layers.selective import SelectiveMixer
from edgellm.models.layers.source_attention import SourceAttention, mask_spec
from edgellm.models.layers.source_stack import DecoderLayer, EncoderLayer, SourceStack
from edgellm.models.layers.stack import Block, Stack
from edgellm.models.layers.state_space import StateSpaceMixer

__all__ = [
    "MLP",
    "Block",
    "CausalConv",
    "DecoderLayer",
    "EncoderLayer",
    "Experts",
    "GatedDeltaMixer",
    "GatedMLP",
    "PackedMLP",
    "RecurrentMixer",
    "RotaryTable",
    "SelectiveMixer",
    "SelfAttention",
    "SourceAttention",
    "SourceStack",
    "Stack",
    "StateSpaceMixer",
    "mask_spec",
]
