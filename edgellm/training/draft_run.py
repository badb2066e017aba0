"""Training a drafter: first the model's own words are gathered, then the head learns to foretell them.

Both are resumed where they were left. What is drawn follows from the seed and from how far a run is, so that a run that
is resumed, and any other of the same options that ends by its steps, comes to the same head.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgellm.checkpoints import Checkpoint, load_checkpoint
from edgellm.draft_head import DraftHead, DraftHeadConfig, save_draft_head
from edgellm.errors import TrainingError
from edgellm.models.protocol import LanguageModel, answers_sources, logit_width
from edgellm.training.draft_loss import AHEAD, Listing, acceptance, draft_loss
from edgellm.training.draft_rows import DraftRows, ModelReader, Reader, joined_rows, own_words
from edgellm.training.evaluation import autocast
from edgellm.training.interrupt import Interrupt
from edgellm.training.progress import StepReport

__all__ = ["DraftOptions", "DraftResult", "train_drafter"]

_RECORD, _ROWS, _LAST, _BEST, _HEAD = "drafter-run.json", "rows", "last.pt", "best.pt", "drafter"
_HELD_OUT, _HELD_OUT_SHARE = "held-out.npz", 0.05  # of the text, its end
_WARMUP, _CLIP, _MOMENTA = 0.03, 1.0, (0.9, 0.98)
_SAVE_EVERY = 250
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """What a drafter is trained with.

    Args:
        minutes: end after so much time, a part of which is for gathering; 0: no limit.
        rows: continuations to gather at most.
        prompt: tokens of text before each.
        count: tokens of each.
        batch_rows: gathered at once.
        sampled: share of them whose tokens are drawn.
        steps: updates at most.
        batch_size: continuations in one update.
        lr: the highest learning rate.
        listed: tokens that can be proposed, at most.
        width: of what the head bends between reading and foretelling.
        token_width: of what it reads of a token.
        keys: of its memory.
        values: of its memory.
        gathering: share of the minutes that gathering may take.
        read_with: what reads the words; for the record.
        seed: of all that is drawn.
    """

    minutes: float = 0.0
    rows: int = 6144
    prompt: int = 64
    count: int = 128
    batch_rows: int = 48
    sampled: float = 0.0
    steps: int = 3000
    batch_size: int = 32
    lr: float = 2e-3
    listed: int = 4096
    width: int = 768
    token_width: int = 128
    keys: int = 64
    values: int = 128
    gathering: float = 0.5
    read_with: str = "PyTorch"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "rows", "prompt", "count", "batch_rows", "steps", "batch_size", "listed", "width", "token_width", "keys",
            "values",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.prompt + self.count <= AHEAD + 1:
            raise TrainingError(f"rows of {self.prompt + self.count} tokens are too short to draft in; ask for more")


@dataclass(frozen=True)
class DraftResult:
    """How a run ended.

    Args:
        drafter: the folder of the head.
        steps: updates done.
        tokens: gathered.
        loss: of the last update.
        acceptance: of the places in the model's words after held-out text, the share where the first, the first two,
            ... drafted tokens are right.
        seconds: spent in this process.
        interrupted: whether it was asked to end, and can be resumed.
    """

    drafter: Path
    steps: int
    tokens: int
    loss: float
    acceptance: tuple[float, ...]
    seconds: float
    interrupted: bool


def train_drafter(
    checkpoint: Path, texts: list[Path], out: Path, options: DraftOptions, *, resume: bool = False,
    say: Say = lambda text: None, on_progress: Callable[[StepReport], None] = lambda report: None,
    reader: Reader | None = None,
) -> DraftResult:  # fmt: skip
    """Train a drafter for a checkpoint's model.

    Args:
        checkpoint: whose model it drafts for.
        texts: plain UTF-8 text of the kind that the model will go on with; its end is held out.
        out: the run's folder.
        options: how.
        resume: go on with the run that is there.
        say: told what is being done.
        on_progress: told after each update.
        reader: reads with the model in the form in which it will be drafted for, such as an int4 bundle of it; None
            for PyTorch.

    Raises:
        TrainingError: a run is there already, or none to resume; too little text; a model that answers sources.
        CheckpointError: a checkpoint that cannot be read.
    """
    started = time.monotonic()
    loaded = load_checkpoint(checkpoint)
    model = _checked(loaded)
    options = _within(options, model.config.max_context)
    _record(checkpoint, options, out, resume=resume)
    tokens = _tokens(loaded, texts)
    run = _Run(model, reader or ModelReader(model), tokens, out, options, say, on_progress, _Clock(out, options))
    with Interrupt() as interrupt:
        gathered = run.gather(interrupt)
        if gathered is None:
            return DraftResult(out / _HEAD, 0, 0, math.nan, (), time.monotonic() - started, True)
        steps, loss = run.learn(gathered, interrupt)
        found = tuple(acceptance(run.head, run.held_out, options.prompt))
        save_draft_head(run.head, out / _HEAD, {"steps": steps, "acceptance": found, "source": loaded.source})
    return DraftResult(
        out / _HEAD, steps, gathered.tokens.size, loss, found, time.monotonic() - started, interrupt.requested
    )


class _Clock:
    """The seconds that a run has worked, those before it was left among them."""

    def __init__(self, out: Path, options: DraftOptions) -> None:
        self._file, self._limit, self._from = out / "seconds.json", 60 * options.minutes, time.monotonic()
        self._before = json.loads(self._file.read_text()) if self._file.exists() else 0.0

    @property
    def seconds(self) -> float:
        return float(self._before + time.monotonic() - self._from)

    def save(self) -> None:
        self._file.write_text(json.dumps(self.seconds, allow_nan=False))

    def share(self) -> float:
        """Of the time there is, what has gone by; 0 where there is no limit."""
        return self.seconds / self._limit if self._limit else 0.0


class _Run:
    def __init__(
        self, model: LanguageModel, reader: Reader, tokens: NDArray[np.int64], out: Path, options: DraftOptions,
        say: Say, on_progress: Callable[[StepReport], None], clock: _Clock,
    ) -> None:  # fmt: skip
        self._model, self._reader, self._out, self._options = model, reader, out, options
        self._say, self._told, self._clock = say, on_progress, clock
        self._precision, self._best = _precision(), 0.0
        cut = int(len(tokens) * (1 - _HELD_OUT_SHARE))
        self._text, self._rest = tokens[:cut], tokens[cut:]
        if min(len(self._text), len(self._rest)) <= options.prompt:
            raise TrainingError(f"{len(tokens)} tokens of text are too few to draft from; give more text")
        self.held_out: DraftRows
        self.head: DraftHead

    def gather(self, interrupt: Interrupt) -> DraftRows | None:
        """The model's own words, read again as far as they are there; None when it was asked to end."""
        o, folder = self._options, self._out / _ROWS
        folder.mkdir(parents=True, exist_ok=True)
        if not (self._out / _HELD_OUT).exists():
            self._words(self._rest, 2**31, 0).save(self._out / _HELD_OUT)
        self.held_out = DraftRows.load(self._out / _HELD_OUT)
        found: list[DraftRows] = []
        wanted, learning = -(-o.rows // o.batch_rows), (self._out / _LAST).exists()
        for number in range(wanted):
            file = folder / f"{number:05}.npz"
            if not file.exists():
                if learning or (found and self._clock.share() > o.gathering):
                    break
                self._words(self._text, number, round(o.sampled * o.batch_rows)).save(file)
                self._clock.save()
                done = (number + 1) * o.batch_rows * (o.prompt + o.count)
                self._say(f"gathered {done:,} tokens of the model's own words, {self._clock.seconds:.0f} s")
            found.append(DraftRows.load(file))
            if interrupt.requested:
                return None
        return joined_rows(found)

    def _words(self, text: NDArray[np.int64], number: int, sampled: int) -> DraftRows:
        o = self._options
        drawn = np.random.default_rng([o.seed, number]).integers(0, len(text) - o.prompt, o.batch_rows)
        prompts = np.stack([text[at : at + o.prompt] for at in drawn])
        return own_words(self._reader, prompts, o.count, sampled=sampled, seed=o.seed + number)

    def learn(self, rows: DraftRows, interrupt: Interrupt) -> tuple[int, float]:
        """Updates, from where they were left; how many there are, and the last one's loss. The best head is kept."""
        o, loss = self._options, math.nan
        self.head = self._fresh(rows)
        learned = [p for p in self.head.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=o.lr, betas=_MOMENTA, weight_decay=0.01)
        step, base = self._restore(optimizer), self._clock.share()
        listing, places = Listing(self.head.ids, self._counts(rows)), rows.tokens.shape[1] - AHEAD
        while step < o.steps and self._clock.share() < 1 and not interrupt.requested:
            started = time.monotonic()
            share = max(step / o.steps, (self._clock.share() - base) / (1 - base) if o.minutes else 0.0)
            for group in optimizer.param_groups:
                group["lr"] = o.lr * min(1.0, (step + 1) / (_WARMUP * o.steps)) * (0.02 + 0.98 * _cosine(share))
            rng = np.random.default_rng([o.seed, 1, step])
            with autocast(self._precision, torch.device("cpu")):
                found = draft_loss(self.head, listing, rows, rng.integers(0, len(rows.tokens), o.batch_size), rng)
            optimizer.zero_grad()
            found.backward()  # type: ignore[no-untyped-call]
            norm = float(torch.nn.utils.clip_grad_norm_(learned, _CLIP))
            optimizer.step()
            step, loss = step + 1, float(found.detach())
            speed = o.batch_size * places / (time.monotonic() - started)
            self._told(StepReport(step, o.steps, loss, optimizer.param_groups[0]["lr"], norm, speed))
            if step % _SAVE_EVERY == 0:
                self._save(optimizer, step)
        self._save(optimizer, step)
        self.head.load_state_dict(torch.load(self._out / _BEST, weights_only=True))
        return step, loss

    def _save(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Note where the run is, and its head if no earlier one has more held-out drafted tokens right."""
        found = acceptance(self.head, self.held_out, self._options.prompt)
        if sum(found) >= self._best:
            self._best = sum(found)
            _written(self.head.state_dict(), self._out / _BEST)
        state = {"head": self.head.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": self._best}
        _written(state, self._out / _LAST)
        self._clock.save()
        right = ", ".join(f"{share:.1%}" for share in found)
        self._say(f"step {step}: of held-out places {right} have so many drafted tokens right")

    def _restore(self, optimizer: torch.optim.Optimizer) -> int:
        if not (self._out / _LAST).exists():
            return 0
        state = torch.load(self._out / _LAST, weights_only=True)
        self.head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        self._best = float(state["best"])
        return int(state["step"])

    def _counts(self, rows: DraftRows) -> NDArray[np.float64]:
        """How frequent each token is: most by what the model says."""
        vocab = self._model.config.vocab_size
        counts = np.bincount(rows.best.reshape(-1), minlength=vocab) * 4.0
        counts += np.bincount(rows.tokens.reshape(-1), minlength=vocab)
        found: NDArray[np.float64] = counts + 1e-2 * np.bincount(self._text, minlength=vocab)
        return found

    def _fresh(self, rows: DraftRows) -> DraftHead:
        """A head that begins with what the model knows, as far as that is where it is usually found."""
        o, vocab, features = self._options, self._model.config.vocab_size, rows.hidden.shape[-1]
        listed = np.sort(np.argsort(-self._counts(rows), kind="stable")[: min(o.listed, vocab)])
        torch.manual_seed(o.seed)
        head = DraftHead(DraftHeadConfig(features, vocab, len(listed), o.width, o.token_width, o.keys, o.values))
        head.ids.copy_(torch.from_numpy(listed))
        seen = torch.from_numpy(rows.hidden[:: max(1, len(rows.hidden) // 256)].reshape(-1, features)).float()
        shift, scale = seen.mean(dim=0), seen.std(dim=0).clamp_min(1e-3)
        tables = [p.detach() for _, p in self._model.named_parameters() if tuple(p.shape) == (vocab, features)]
        if tables:  # the first is read, the last is projected with; a tied one is both
            head.start_from(tables[0].float(), tables[-1].float(), shift, scale)
        else:
            head.shift.copy_(shift)
            head.scale.copy_(scale)
        return head


def _precision() -> str:
    """What products are computed in: bfloat16 where the processor has it, which takes less than half the time."""
    can: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version
    return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"


def _written(state: dict[str, Any], file: Path) -> None:
    pending = file.with_suffix(".tmp")
    torch.save(state, pending)
    pending.replace(file)


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _within(options: DraftOptions, context: int) -> DraftOptions:
    """Rows that a model's context holds."""
    length = options.prompt + options.count
    if length <= context:
        return options
    prompt = options.prompt * context // length
    return dataclasses.replace(options, prompt=max(prompt, 1), count=context - max(prompt, 1))


def _record(checkpoint: Path, options: DraftOptions, out: Path, *, resume: bool) -> None:
    """Note what a run is made of, or compare it with the one that is resumed."""
    file, said = out / _RECORD, {"checkpoint": str(checkpoint.resolve()), **dataclasses.asdict(options)}
    free = ("minutes", "steps")  # may be more when a run goes on
    if resume:
        if not file.exists():
            raise TrainingError(f"{out} holds no drafter's run to resume; leave --resume out")
        before = json.loads(file.read_text(encoding="utf-8"))
        if changed := [name for name in said if name not in free and said[name] != before.get(name)]:
            raise TrainingError(
                f"{changed[0]} is {said[changed[0]]!r}, and the run began with {before.get(changed[0])!r}; leave it out"
            )
    elif out.exists() and any(out.iterdir()):
        raise TrainingError(f"{out} is not empty; resume its run with --resume, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(said, indent=1, allow_nan=False), encoding="utf-8")


def _checked(loaded: Checkpoint) -> Any:
    model: Any = loaded.model
    if answers_sources(model) or logit_width(model.config) != model.config.vocab_size:
        raise TrainingError("a drafter is for models that go on with texts; this one answers sources, or labels")
    return model.eval().requires_grad_(False)


def _tokens(loaded: Checkpoint, texts: list[Path]) -> NDArray[np.int64]:
    """All tokens of the texts."""
    from tokenizers import Tokenizer

    if loaded.tokenizer_json is None:
        raise TrainingError("the checkpoint has no tokenizer to read text with; begin with another")
    tokenizer, found = Tokenizer.from_str(loaded.tokenizer_json), list[int]()
    for text in texts:
        try:
            found += tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"{text}: cannot be read ({error}); name a file of UTF-8 text") from error
    return np.array(found, dtype=np.int64)
