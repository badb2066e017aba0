"""The parts that models are built from."""

from edgellm.models.layers.attention import SelfAttention
from edgellm.models.layers.mlp import GatedMLP
from edgellm.models.layers.recurrent import RecurrentMixer
from edgellm.models.layers.rotary import RotaryTable

__all__ = ["GatedMLP", "RecurrentMixer", "RotaryTable", "SelfAttention"]
