"""The canonical ops: each a differentiable PyTorch function that captures as one node."""

from edgellm.ops.attention import ATTENTION, attention
from edgellm.ops.expert import EXPERT
from edgellm.ops.gated_delta import GATED_DELTA, gated_delta
from edgellm.ops.linear import EMBEDDING, LINEAR
from edgellm.ops.linear_attention import LINEAR_ATTENTION, linear_attention
from edgellm.ops.norm import ADD_RMS_NORM, RMS_NORM
from edgellm.ops.positions import TAKE_POSITIONS, take_positions
from edgellm.ops.recurrence import GRU, LSTM, RNN, RecurrentWeights, elman, gru, lstm
from edgellm.ops.running import running_max
from edgellm.ops.schema import REQUIRED, Op
from edgellm.ops.selective_scan import SELECTIVE_SCAN, selective_scan
from edgellm.ops.source_attention import SOURCE_ATTENTION, source_attention, source_mask
from edgellm.ops.token_by_token import token_by_token
from edgellm.ops.window import WINDOW_ATTENTION, window_attention

__all__ = [
    "ADD_RMS_NORM",
    "ATTENTION",
    "EMBEDDING",
    "EXPERT",
    "GATED_DELTA",
    "GRU",
    "LINEAR",
    "LINEAR_ATTENTION",
    "LSTM",
    "REQUIRED",
    "RMS_NORM",
    "RNN",
    "SELECTIVE_SCAN",
    "SOURCE_ATTENTION",
    "TAKE_POSITIONS",
    "WINDOW_ATTENTION",
    "Op",
    "RecurrentWeights",
    "attention",
    "elman",
    "gated_delta",
    "gru",
    "linear_attention",
    "lstm",
    "running_max",
    "selective_scan",
    "source_attention",
    "source_mask",
    "take_positions",
    "token_by_token",
    "window_attention",
]
