"""The training loop, for any model that follows ``edgellm.models.protocol.LanguageModel``.

It knows no architecture: a name is only passed on to the checkpoint.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from edgellm.checkpoints import checkpoint_directory, save_checkpoint
from edgellm.errors import TrainingError
from edgellm.models import registry
from edgellm.models.protocol import LanguageModel, answers_sources
from edgellm.torch_threads import limit_torch_threads
from edgellm.training.adapter_files import Adapters, load_adapters
from edgellm.training.batches import Batches, WindowBatches
from edgellm.training.distributed import World, open_world
from edgellm.training.interrupt import Interrupt
from edgellm.training.lora import is_adapted, merged
from edgellm.training.metrics import MetricsLog, read_metrics
from edgellm.training.optimization import budget_spent, learning_rate
from edgellm.training.options import TrainOptions
from edgellm.training.plot import plot_losses
from edgellm.training.progress import StepReport
from edgellm.training.resume import TrainerState, load_trainer_state, load_weights
from edgellm.training.tokenizer import end_of_text_id
from edgellm.training.tokens import TokenData
from edgellm.training.update import Updater
from edgellm.training.validation import validation_loss
from edgellm_runtime.task_spec import TaskSpec

__all__ = ["TrainResult", "holds_run", "train"]

BEST, LAST, METRICS, PLOT = "best", "last", "metrics.jsonl", "loss.png"
RECENT = 20  # steps that the final training loss is the mean of
MAX_EXPONENT = 700.0  # exp of more overflows a float


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to.

    Args:
        checkpoint: the best checkpoint, or the last where none is kept as the best.
        steps: updates done.
        train_loss: nats a token, mean of the last 20 steps.
        val_loss: nats a token, of ``checkpoint``.
        unigram_entropy: nats a token of the validation data by token frequencies alone.
        tokens_per_s: tokens trained on in a second since the last resume, over all processes, without validation and
            saving.
        seconds: time spent on updates, over all resumes.
        parameters: how many the model has.
        metrics: ``metrics.jsonl``.
        plot: ``loss.png``.
        interrupted: whether a signal stopped it before its last step.
    """

    checkpoint: Path
    steps: int
    train_loss: float
    val_loss: float
    unigram_entropy: float
    tokens_per_s: float
    seconds: float
    parameters: int
    metrics: Path
    plot: Path
    interrupted: bool

    @property
    def val_perplexity(self) -> float:
        """The exponential of the validation loss."""
        return math.exp(min(self.val_loss, MAX_EXPONENT))


def holds_run(directory: Path) -> bool:
    """Whether a run was begun there."""
    return (directory / METRICS).exists() or checkpoint_directory(directory / LAST).exists()


def train(
    model: nn.Module, data: TokenData | Batches, options: TrainOptions, out_dir: Path, *, architecture: str,
    tokenizer: Tokenizer, task: TaskSpec | None = None, text: Mapping[str, Any] | None = None, resume: bool = False,
    on_progress: Callable[[StepReport], None] | None = None,
) -> TrainResult:  # fmt: skip
    """Train a model, in one process or in those that torchrun started.

    The run writes ``last`` and ``best`` (checkpoints), ``metrics.jsonl`` and ``loss.png`` into ``out_dir``. Ctrl-C or
    SIGTERM ends it after the step at hand, with a checkpoint. The same seed gives the same curve; on the CPU in
    float32, with the same number of threads, also bit for bit, however often the run was stopped and resumed. For that
    it seeds PyTorch's global generator before every step.

    Args:
        model: a ``LanguageModel`` with float32 weights; it is moved to the device and trained in place.
        data: token ids, read in windows; or another source of batches.
        options: how to train.
        out_dir: made if needed.
        architecture: what the checkpoints call the model.
        tokenizer: saved with the checkpoints.
        task: what the checkpoints say that the model was trained to do.
        text: further keywords of :func:`edgellm.checkpoints.save_checkpoint` about text; None: those that fit a
            tokenizer of :func:`edgellm.training.train_tokenizer`.
        resume: go on from ``out_dir/last``; where a run was killed before its first checkpoint, from the start.
        on_progress: told of every step, in the first process.

    Raises:
        TrainingError: data or options that do not fit, a run that is already there, or a loss that is not finite.
        CheckpointError: a checkpoint that cannot be resumed.
    """
    limit_torch_threads(options.threads)
    with open_world(options.device) as world:
        source = WindowBatches(data) if isinstance(data, TokenData) else data
        world.first(lambda: _check(model, source, options, out_dir, resume))
        if options.precision == "float16" and world.device.type != "cuda":
            raise TrainingError(f"precision float16 needs a CUDA GPU, not {world.device}; use bfloat16 or float32")
        about: dict[str, Any] = {"tokenizer_json": tokenizer.to_str(), "task": task}
        about |= {"eos_token_ids": (end_of_text_id(tokenizer),)} if text is None else text
        run = _Run(model, source, options, out_dir, world, {"architecture": architecture, **about})
        if resume and (last := checkpoint_directory(out_dir / LAST)).is_dir():
            run.restore(last)
        return run.loop(on_progress)


def _check(model: nn.Module, data: Batches, options: TrainOptions, out_dir: Path, resume: bool) -> None:
    if not isinstance(model, LanguageModel):
        name = type(model).__name__
        raise TrainingError(f"{name} has no config or no state_specs(); see edgellm.models.protocol.LanguageModel")
    config = model.config
    if isinstance(data, WindowBatches) and answers_sources(model):
        raise TrainingError(
            f"{type(model).__name__} answers sources, and a text has none; train it with --task, such as translation"
        )
    if isinstance(data, WindowBatches) and options.context > config.max_context:
        raise TrainingError(f"context {options.context} is over the model's max_context {config.max_context}; lower it")
    if data.vocab_size > config.vocab_size:
        raise TrainingError(
            f"the data has {data.vocab_size} tokens and the model's vocab_size is {config.vocab_size}; raise vocab_size"
        )
    data.check(options)
    if not resume and holds_run(out_dir):
        raise TrainingError(f"{out_dir} already holds a run; resume it, or choose another folder")


class _Run:
    """The moving parts of one run."""

    def __init__(
        self, model: nn.Module, data: Batches, options: TrainOptions, out: Path, world: World, about: Mapping[str, Any]
    ) -> None:
        self.data, self.options, self.out, self.world = data, options, out, world
        self.about = about  # what checkpoints say besides the weights
        self.model = model.to(world.device).train()
        self.updater = Updater(self.model, options, world)
        self.unigram = data.baseline
        self.step, self.seconds, self.stale = 0, 0.0, 0
        self.tokens, self.measured = 0, 0.0  # trained on by this process, and the time it took
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.val_loss = self.best_loss = math.inf

    def restore(self, last: Path) -> None:
        """Go back to what a checkpoint holds."""
        state = load_trainer_state(last, self.world.device)
        state.check(self.options, self.data.fingerprint, last)
        if is_adapted(self.model):
            load_adapters(self.model, last, self._foreign)
        else:
            load_weights(self.model, last / "model.safetensors")
        self.updater.optimizer.load_state_dict(dict(state.optimizer))
        self.updater.scaler.load_state_dict(dict(state.scaler))
        self.step, self.seconds, self.stale = state.step, state.seconds, state.stale
        self.recent.extend(state.recent)
        self.val_loss, self.best_loss = state.val_loss, state.best_loss

    def loop(self, on_progress: Callable[[StepReport], None] | None) -> TrainResult:
        """Go on to the last step, or until a signal."""
        log = None
        if self.world.is_first:
            self.out.mkdir(parents=True, exist_ok=True)
            log = MetricsLog(self.out / METRICS, self.step)
        stop = False
        try:
            with Interrupt() as interrupt:
                while not (self._is_over() or stop):
                    report, stop = self._advance(interrupt.requested)
                    if log is not None:
                        self._log(log, report)
                    if on_progress is not None and self.world.is_first:
                        on_progress(report)
                    self._keep(report.val_loss, stop)
        finally:
            if log is not None:
                log.close()
        if self.world.is_first:
            plot_losses(read_metrics(self.out / METRICS), self.unigram, self.out / PLOT)
        return self._result(stop)

    def _is_over(self) -> bool:
        """Whether the steps, the budget of time or the patience are used up."""
        options = self.options
        impatient = bool(options.patience) and self.stale >= options.patience
        return self.step >= options.steps or budget_spent(options, self.seconds) >= 1 or impatient

    def _advance(self, stop: bool) -> tuple[StepReport, bool]:
        """One update and, when it is due, validation; also whether some process was asked to stop."""
        options, begin = self.options, time.perf_counter()
        lr = learning_rate(self.step, options, self.seconds)
        batches = self.data.train(options, self.step, self.world)
        loss, stop = self.updater.backward(batches, self.step, stop=stop)
        norm = self.updater.apply(lr) if math.isfinite(loss) else None
        if norm is None and not (math.isfinite(loss) and options.precision == "float16"):
            self._fail("gradient" if math.isfinite(loss) else "loss", self.step + 1)
        spent = time.perf_counter() - begin
        spent = self._agreed(spent)
        self.step, self.seconds = self.step + 1, self.seconds + spent
        self.recent.append(loss)
        due = self.step % options.eval_every == 0 or self._is_over() or stop
        val_loss = validation_loss(self.model, self.data, options, self.world) if due else None
        if val_loss is not None and not math.isfinite(val_loss):
            self._fail("validation loss", self.step)
        tokens = sum(batch.tokens for batch in batches)
        self.tokens, self.measured = self.tokens + tokens, self.measured + spent
        rate = tokens * self.world.size / spent
        return StepReport(self.step, self._expected_steps(), loss, lr, norm, rate, val_loss), stop

    def _agreed(self, spent: float) -> float:
        """The processes' mean time where it decides, so that all end a budget after the same step."""
        if self.world.size == 1 or not self.options.minutes:
            return spent
        return float(self.world.sum(torch.tensor([spent]))) / self.world.size

    def _expected_steps(self) -> int:
        """How many there will be: of a budget of time, by the speed so far."""
        spent = budget_spent(self.options, self.seconds)
        return max(self.step, min(self.options.steps, round(self.step / spent))) if spent else self.options.steps

    def _fail(self, what: str, step: int) -> None:
        kept = checkpoint_directory(self.out / LAST)
        good = f"the last good checkpoint is {kept}" if kept.is_dir() else "no checkpoint was saved yet"
        raise TrainingError(f"the {what} is not finite at step {step}; {good}; lower the learning rate")

    def _log(self, log: MetricsLog, report: StepReport) -> None:
        beside = None if report.val_loss is None else self.unigram
        log.write(
            step=report.step, loss=report.loss, lr=report.lr, grad_norm=report.grad_norm,
            tokens_per_s=round(report.tokens_per_s, 1), val_loss=report.val_loss, unigram_entropy=beside,
        )  # fmt: skip

    def _keep(self, val_loss: float | None, stop: bool) -> None:
        """Save the checkpoints that are due."""
        if val_loss is not None:
            self.val_loss = val_loss
            self.stale += 1
            if val_loss < self.best_loss:
                self.best_loss, self.stale = val_loss, 0
                if self.options.keep_best:
                    self._save(BEST)
        if stop or self.step % self.options.save_every == 0 or self._is_over():
            self._save(LAST)

    def _save(self, name: str) -> None:
        if not self.world.is_first:
            return
        state = TrainerState(
            step=self.step, options=self.options.to_json(), data=self.data.fingerprint,
            optimizer=self.updater.optimizer.state_dict(), scaler=self.updater.scaler.state_dict(),
            recent=list(self.recent), val_loss=self.val_loss, best_loss=self.best_loss, seconds=self.seconds,
            stale=self.stale,
        )  # fmt: skip
        adapters = Adapters.of(self.model, self._foreign)

        def extra(directory: Path) -> None:
            if name == LAST:
                state.save(directory)
            if adapters is not None:
                adapters.save(directory)

        with merged(self.model) as whole:
            save_checkpoint(self.out / name, whole, **self.about, extra=extra)

    @property
    def _foreign(self) -> Callable[[str], str] | None:
        """What others call the weights of the architecture, if it is one of ours that others have too."""
        name = self.about["architecture"]
        reader = registry.find(name).huggingface if name in registry.ENTRIES else None
        return None if reader is None else reader.names

    def _result(self, interrupted: bool) -> TrainResult:
        best = self.options.keep_best and math.isfinite(self.best_loss)
        return TrainResult(
            checkpoint=self.out / (BEST if best else LAST),
            steps=self.step,
            train_loss=sum(self.recent) / max(1, len(self.recent)),
            val_loss=self.best_loss if best else self.val_loss,
            unigram_entropy=self.unigram,
            tokens_per_s=self.tokens * self.world.size / max(self.measured, 1e-9),
            seconds=self.seconds,
            parameters=sum(p.numel() for p in self.model.parameters()),
            metrics=self.out / METRICS,
            plot=self.out / PLOT,
            interrupted=interrupted and not self._is_over(),
        )
