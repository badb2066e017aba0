"""The parts that models are built from."""

from edgellm.models.layers.attention import SelfAttention
from edgellm.models.layers.convolution import CausalConv
from edgellm.models.layers.mlp import GatedMLP
from edgellm.models.layers.recurrent import RecurrentMixer
from edgellm.models.layers.rotary import RotaryTable

__all__ = ["CausalConv", "GatedMLP", "RecurrentMixer", "RotaryTable", "SelfAttention"]
