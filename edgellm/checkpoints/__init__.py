"""Reading checkpoints (edgellm's own, Hugging Face folders, GGUF files) and writing edgellm's own.

Nothing here names an architecture: what a foreign configuration or tensor is called, its architecture translates.
"""

from edgellm.checkpoints.adapter import adapted
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.load import load_checkpoint, open_checkpoint
from edgellm.checkpoints.native import checkpoint_directory, save_checkpoint
from edgellm.checkpoints.switchable import switchable
from edgellm.checkpoints.weights import CheckpointWeights

__all__ = [
    "Checkpoint",
    "CheckpointWeights",
    "adapted",
    "checkpoint_directory",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
    "switchable",
]
