"""The parts that models are built from."""

from edgellm.models.layers.attention import SelfAttention
from edgellm.models.layers.convolution import CausalConv
from edgellm.models.layers.experts import Experts
from edgellm.models.layers.gated_delta import GatedDeltaMixer
from edgellm.models.layers.mlp import GatedMLP, PackedMLP
from edgellm.models.layers.recurrent import RecurrentMixer
from edgellm.models.layers.rotary import RotaryTable
from edgellm.models.layers.selective import SelectiveMixer
from edgellm.models.layers.stack import Block, Stack
from edgellm.models.layers.state_space import StateSpaceMixer

__all__ = [
    "Block",
    "CausalConv",
    "Experts",
    "GatedDeltaMixer",
    "GatedMLP",
    "PackedMLP",
    "RecurrentMixer",
    "RotaryTable",
    "SelectiveMixer",
    "SelfAttention",
    "Stack",
    "StateSpaceMixer",
]
