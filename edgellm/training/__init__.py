"""Training: text to tokens, the loop, and the checkpoints it leaves. Imports torch."""

from edgellm.training.batches import Batch, Batches
from edgellm.training.corpus import Corpus
from edgellm.training.evaluation import unigram_entropy
from edgellm.training.options import TrainOptions
from edgellm.training.progress import Reporter, StepReport
from edgellm.training.range_test import LearningRates, find_learning_rate
from edgellm.training.run import train_from_text
from edgellm.training.run_config import RunConfig
from edgellm.training.settings import parse_settings
from edgellm.training.tokenizer import END_OF_TEXT, train_tokenizer
from edgellm.training.tokens import TokenData, prepare_tokens
from edgellm.training.trainer import TrainResult, train

__all__ = [
    "END_OF_TEXT",
    "Batch",
    "Batches",
    "Corpus",
    "LearningRates",
    "Reporter",
    "RunConfig",
    "StepReport",
    "TokenData",
    "TrainOptions",
    "TrainResult",
    "find_learning_rate",
    "parse_settings",
    "prepare_tokens",
    "train",
    "train_from_text",
    "train_tokenizer",
    "unigram_entropy",
]
