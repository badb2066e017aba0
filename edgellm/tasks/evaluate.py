"""A model at its task: its answers one by one as a device gives them, with their time, and what they are worth.

The same code judges a bundle and a PyTorch checkpoint: both are sessions of the runtime.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgellm.tasks.metrics import bits_per_byte, primary, score
from edgellm_runtime.checks.evaluate import evaluate, windows_of
from edgellm_runtime.checks.memory import peak_rss_mb
from edgellm_runtime.errors import ContextError, OptionError

__all__ = ["Prediction", "TaskReport", "evaluate_baselines", "evaluate_task"]

Example = Mapping[str, Any]
Progress = Callable[[float], None]

_TIMED = 20  # documents whose continuation is timed
_PROMPT, _NEW = 32, 32  # tokens read and tokens chosen for that
_NOTHING = "\N{REPLACEMENT CHARACTER}"  # no empty text: to some questions that is the right answer
_SMALLEST_HALF = 10  # predictions in each half below which their scores say nothing


@dataclass(frozen=True)
class Prediction:
    """An answer, or the reason for which there is none.

    Args:
        value: a text, or a label for each word; of a refused example a text like no
            answer, or ``O`` for each word.
        confidence: the model's own, or None.
        seconds: from the example to its answer.
        refused: the error's text, or empty.
    """

    value: Any
    confidence: float | None
    seconds: float
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What :func:`evaluate_task` found.

    Args:
        task: its name.
        examples: how many were asked.
        primary: the score that the task is judged by.
        scores: by name; see :mod:`edgellm.tasks.metrics`.
        latency_ms: median and 95th percentile of one example at batch 1; of generation: of reading 32 tokens and
            choosing 32.
        peak_rss_mb: the most memory that this process had held before it began to score.
        refused: examples that the model could not take, such as a prompt that is too long; they count as wrong.
        confidence: its mean, and the primary score of the surer and of the less sure half; empty where there are few.
        predictions: in the examples' order; none for generation.
    """

    task: str
    examples: int
    primary: str
    scores: Mapping[str, float]
    latency_ms: Mapping[str, float]
    peak_rss_mb: float | None
    refused: int = 0
    confidence: Mapping[str, float] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the predictions."""
        return {
            "task": self.task, "examples": self.examples, "primary": self.primary, "scores": dict(self.scores),
            "latency_ms": dict(self.latency_ms), "peak_rss_mb": self.peak_rss_mb, "refused": self.refused,
            "confidence": dict(self.confidence),
        }  # fmt: skip


def evaluate_task(
    runner: Any, task: str, examples: Sequence[Example], *, beams: int | None = None, window: int = 512,
    progress: Progress = lambda _: None,
) -> TaskReport:  # fmt: skip
    """Ask a model each example alone and score its answers.

    Args:
        runner: a :class:`edgellm_runtime.tasks.TaskRunner` whose task this is; generation needs only its session and
            tokenizer.
        task: its name.
        examples: lines of test data.
        beams: hypotheses that are followed at once; None: as many as the task usually takes.
        window: of generation: tokens read from an empty state at a time.
        progress: told the share that is done.

    Raises:
        OptionError: no examples, or not one of them that the model can take.
    """
    if not examples:
        raise OptionError("no examples to evaluate on; give at least one")
    if task == "generation":
        return _generation(runner, examples, window, progress)
    predictions = _predict(_asker(runner, task, beams), task, examples, progress)
    refused = [p.refused for p in predictions if p.refused]
    if len(refused) == len(predictions):
        raise OptionError(f"none of {len(refused)} examples can be answered; the first: {refused[0]}")
    memory = peak_rss_mb()
    values, how = [p.value for p in predictions], _scoring(runner.spec)
    scores = score(task, values, examples, **how)
    main = primary(task, scores)
    return TaskReport(
        task=task, examples=len(examples), primary=main, scores=scores, refused=len(refused), peak_rss_mb=memory,
        latency_ms=_latency([p.seconds for p in predictions if not p.refused]), predictions=predictions,
        confidence=_confidence(predictions, lambda rows: score(
            task, [values[i] for i in rows], [examples[i] for i in rows], **how)[main]),
    )  # fmt: skip


def evaluate_baselines(
    runner: Any, task: str, train: Sequence[Example], examples: Sequence[Example], *, window: int = 512
) -> dict[str, dict[str, float]]:
    """The scores of the task's baselines on the same examples, or for text on the same tokens.

    Args:
        runner: as for :func:`evaluate_task`; its task says what answers are allowed, its tokenizer what tokens are.
        task: its name.
        train: what the baselines learn from.
        examples: what they are tested on.
        window: as for :func:`evaluate_task`.
    """
    if task == "generation":
        return _ngrams(runner, train, examples, window)
    from edgellm.tasks.baselines import predict_baselines

    how = _scoring(runner.spec)
    found = predict_baselines(
        task, train, examples, no_answer=how["no_answer"], closed=bool(how["choices"]), length=how["length"]
    )
    return {name: score(task, values, examples, **how) for name, values in found.items()}


def _scoring(spec: Any) -> dict[str, Any]:
    length = spec.length if spec.name == "summarization" else None
    return {"choices": spec.choices, "no_answer": spec.no_answer, "length": length}


def _asker(runner: Any, task: str, beams: int | None) -> Callable[[Example], tuple[Any, float | None]]:
    """A function from an example to its answer and the confidence in it."""
    options = {} if beams is None else {"beams": beams}

    def ask(example: Example) -> tuple[Any, float | None]:
        if task == "srl":
            roles = runner.label_roles(example["words"], example["predicate"])
            return list(roles.labels), roles.confidence
        if task == "translation":
            answer = runner.translate(example["source"], **options)
        elif task == "qa":
            answer = runner.answer(example["question"], example["context"], **options)
        else:
            answer = runner.summarize(example["text"], **options)
        return answer.text, answer.confidence

    return ask


def _predict(
    ask: Callable[[Example], tuple[Any, float | None]], task: str, examples: Sequence[Example], progress: Progress
) -> list[Prediction]:
    predictions: list[Prediction] = []
    for i, example in enumerate([examples[0], *examples]):  # the first twice: once to warm up
        start = time.perf_counter()
        try:
            value, confidence = ask(example)
            found = Prediction(value, confidence, time.perf_counter() - start)
        except (ContextError, OptionError) as error:
            nothing = ["O"] * len(example["words"]) if task == "srl" else _NOTHING
            found = Prediction(nothing, None, time.perf_counter() - start, refused=str(error))
        if i:
            predictions.append(found)
            progress(i / len(examples))
    return predictions


def _latency(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": 1000 * statistics.median(seconds), "p95": 1000 * float(np.quantile(seconds, 0.95))}


def _confidence(predictions: Sequence[Prediction], judge: Callable[[Sequence[int]], float]) -> dict[str, float]:
    sure = [(p.confidence, i) for i, p in enumerate(predictions) if p.confidence is not None]
    half = len(sure) // 2
    if half < _SMALLEST_HALF:
        return {}
    rows = [i for _, i in sorted(sure, reverse=True)]
    mean = statistics.fmean(c for c, _ in sure)
    return {"mean": mean, "surer_half": judge(rows[:half]), "other_half": judge(rows[-half:])}


def _stream(tokenizer: Any, examples: Sequence[Example]) -> tuple[list[int], int]:
    """The tokens of texts, each closed by the end-of-text token as in training, and the texts' bytes."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [token for e in examples for token in [*tokenizer.encode(e["text"]), *end]]
    return tokens, sum(len(e["text"].encode()) for e in examples)


def _generation(runner: Any, examples: Sequence[Example], window: int, progress: Progress) -> TaskReport:
    session = runner.session
    tokens, size = _stream(runner.tokenizer, examples)
    windows = windows_of(tokens, min(window, session.max_context))
    seconds = [
        _continue(session, runner.tokenizer.encode(e["text"])[:_PROMPT]) for e in [*examples[:1], *examples[:_TIMED]]
    ]
    found = evaluate(session, windows, progress)
    scores = {"bits_per_byte": bits_per_byte(found.nll, len(tokens), size), "perplexity": found.perplexity}
    return TaskReport(
        task="generation", examples=len(examples), primary="bits_per_byte", scores=scores,
        latency_ms=_latency(seconds[1:]), peak_rss_mb=peak_rss_mb(),
    )  # fmt: skip


def _continue(session: Any, prompt: Sequence[int]) -> float:
    """Seconds for reading a prompt and going on from it."""
    start = time.perf_counter()
    state = session.new_state(1, min(len(prompt) + _NEW, session.max_context))
    token = int(session.step(np.array([prompt or [0]]), state)[0, -1].argmax())
    for _ in range(min(_NEW, session.max_context - len(prompt)) - 1):
        token = int(session.step(np.array([[token]]), state)[0, -1].argmax())
    return time.perf_counter() - start


def _ngrams(
    runner: Any, train: Sequence[Example], examples: Sequence[Example], window: int
) -> dict[str, dict[str, float]]:
    from edgellm.tasks.ngrams import NGrams

    tokens, size = _stream(runner.tokenizer, examples)
    windows = windows_of(tokens, min(window, runner.session.max_context))
    model = NGrams(np.array(_stream(runner.tokenizer, train)[0]), runner.session.vocab_size)
    scores = {}
    for name, nats in (("unigrams", model.unigram_nats), ("trigrams", model.trigram_nats)):
        nll = float(np.concatenate([nats(np.array(row)) for row in windows]).mean())
        scores[name] = {"bits_per_byte": bits_per_byte(nll, len(tokens), size), "perplexity": float(np.exp(nll))}
    return scores
