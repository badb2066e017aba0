"""What can be chosen about a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellm.errors import TrainingError

__all__ = ["TrainOptions"]

PRECISIONS = ("float32", "bfloat16", "float16")
CLASS_WEIGHTS = ("none", "balanced")
FREE_TO_CHANGE = {
    "steps", "minutes", "patience", "device", "eval_every", "eval_batches", "save_every", "keep_best", "threads",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train; every value is checked.

    Args:
        steps: updates in all.
        batch_size: windows in one forward pass of one process.
        context: tokens in a window.
        lr: the highest learning rate.
        lr_from: when not 0, the warm-up begins there and rises by equal factors, as a range test does.
        min_lr_fraction: what the cosine ends at, as a part of ``lr``.
        warmup: updates over which the rate rises to ``lr``.
        weight_decay: decoupled decay of matrices; norms, biases and embeddings are left alone.
        betas: decay of AdamW's two averages.
        clip: the largest norm of the gradient; 0 for no limit.
        accumulation: forward passes per update; the same curve as a batch so many times as large.
        precision: float32, or bfloat16 or float16 through autocast with float32 weights; float16 needs a GPU.
        device: ``auto`` takes a CUDA GPU if there is one; otherwise as ``torch.device`` spells it.
        seed: of the order of the data and of dropout.
        eval_every: updates between two validations.
        eval_batches: how many updates' worth of windows validation takes, at most.
        save_every: updates between two checkpoints.
        keep_best: also keep the checkpoint with the lowest validation loss.
        threads: CPU threads of this process; None for those that :func:`limit_torch_threads` says.
        minutes: a budget of time spent on updates; the schedule then follows the clock where that is ahead of the
            steps, and the run ends with the budget, so it cannot be repeated exactly. 0: none.
        patience: validations in a row without a lower loss after which the run ends; 0: it never does for that.
        label_smoothing: the part of a target's probability that is spread over all others.
        batch_tokens: of tasks: the most tokens, padding included, in one forward pass of one process.
        prompt_loss: of tasks: how much predicting a prompt's token counts beside one of its answer.
        class_weights: of tasks with few answers or labels: ``balanced`` weighs each by the inverse square root of how
            common it is (mean 1), so that rare ones are learned too.

    Raises:
        TrainingError: a value that training cannot use.
    """

    steps: int
    batch_size: int = 16
    context: int = 128
    lr: float = 3e-3
    lr_from: float = 0.0
    min_lr_fraction: float = 0.1
    warmup: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulation: int = 1
    precision: str = "float32"
    device: str = "auto"
    seed: int = 0
    eval_every: int = 50
    eval_batches: int = 8
    save_every: int = 200
    keep_best: bool = True
    threads: int | None = None
    minutes: float = 0.0
    patience: int = 0
    label_smoothing: float = 0.0
    batch_tokens: int = 4096
    prompt_loss: float = 0.0
    class_weights: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in (
            "steps",
            "batch_size",
            "context",
            "accumulation",
            "eval_every",
            "eval_batches",
            "save_every",
            "batch_tokens",
        ):
            self._check_int(name, 1)
        self._check_int("warmup", 0)
        self._check_int("patience", 0)
        self._check_int("seed", 0)
        if self.threads is not None:
            self._check_int("threads", 1)
        for name in (
            "lr",
            "min_lr_fraction",
            "weight_decay",
            "clip",
            "minutes",
            "lr_from",
            "label_smoothing",
            "prompt_loss",
        ):
            self._check_number(name)
        if self.lr == 0 or self.min_lr_fraction > 1:
            raise TrainingError(
                f"lr is {self.lr} and min_lr_fraction {self.min_lr_fraction}; use above 0 and at most 1"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"betas is {self.betas}; it must be two numbers in [0, 1)")
        if self.label_smoothing >= 1 or self.prompt_loss > 1:
            raise TrainingError(
                f"label_smoothing is {self.label_smoothing} and prompt_loss {self.prompt_loss}; use below 1 and up to 1"
            )
        if self.class_weights not in CLASS_WEIGHTS:
            raise TrainingError(f"class_weights is {self.class_weights!r}; it must be {' or '.join(CLASS_WEIGHTS)}")
        if self.precision not in PRECISIONS:
            raise TrainingError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not least <= value < 2**63:
            raise TrainingError(f"{name} is {value!r}; it must be a whole number of at least {least}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise TrainingError(f"{name} is {value!r}; it must be a number of at least 0")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainOptions:
        """From what :meth:`to_json` gave.

        Raises:
            TrainingError: an unknown name or an impossible value.
        """
        unknown = data.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise TrainingError(f"unknown training options {sorted(unknown)}; was the run made by a later edgellm?")
        return cls(**data)

    def check_resumes(self, before: TrainOptions) -> None:
        """Make sure that a run that began with ``before`` goes on as it would have.

        Raises:
            TrainingError: an option that shapes the loss curve has changed; ``steps`` may, and stretches the schedule.
        """
        for f in dataclasses.fields(self):
            old, new = getattr(before, f.name), getattr(self, f.name)
            if f.name not in FREE_TO_CHANGE and old != new:
                raise TrainingError(f"the run began with {f.name} {old}, not {new}; resume it with what it began with")
