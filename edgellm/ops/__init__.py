"""The canonical ops: each a differentiable PyTorch function that captures as one node."""

from edgellm.ops.attention import attention
from edgellm.ops.positions import take_positions
from edgellm.ops.recurrence import RecurrentWeights, elman, gru, lstm
from edgellm.ops.window import window_attention

__all__ = ["RecurrentWeights", "attention", "elman", "gru", "lstm", "take_positions", "window_attention"]
