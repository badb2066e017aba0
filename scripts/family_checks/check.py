"""Trying one row: build it, export it, and hold the bundle to what transformers says."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm.cli.checkpoints import read_checkpoint
from edgellm.errors import ModelError
from edgellm_exporters.errors import ExportError
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import load
from family_checks.rows import ENCODED, ROWS

__all__ = ["TARGETS", "Outcome", "build", "try_row"]

TARGETS = ("onnx", "cpu")
CLOSE = 1e-3  # largest difference of two logits
LENGTHS = (24, 60)  # of texts; windows are shorter
SOURCES = (17, 9)  # tokens of what an encoder reads
GREEDY = 16
CUTS = (1, 7, 24, 25, 26, 43, 60)  # where a text is cut into chunks


@dataclass(frozen=True)
class Outcome:
    """What came of a row on one target.

    Args:
        word: ``works``, ``refused``, ``WRONG`` or ``TRACEBACK``.
        more: the largest difference and the largest logit, the sentence, or what is wrong.
    """

    word: str
    more: str


def build(name: str) -> Any:
    """A row's model in eval mode, its weights scrambled so that nothing is neutral."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = name.split("(")[0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ROWS[name])
    auto = AutoModelForSeq2SeqLM if name in ENCODED else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if not parameter.requires_grad:  # a table of positions, which is no part of a checkpoint
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            # what a recurrence decays by, and short convolutions, must stay near where they start
            if parameter.dim() < 2 or any(part in own for part in ("A_log", "conv1d", "decay", "time_")):
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.15 * noise)
    if getattr(config, "tie_word_embeddings", False):
        model.tie_weights()
    return model


def try_row(name: str, folder: Path, targets: Sequence[str] = TARGETS) -> tuple[str, Mapping[str, Outcome]]:
    """Build a row, export it for each target, compare.

    Args:
        name: of the row.
        folder: an empty one, for the checkpoint and the bundles.
        targets: to export for.

    Returns:
        The road that it took, and what came of it on each target.
    """
    model = build(name)
    model.save_pretrained(folder / "checkpoint")
    try:
        found = read_checkpoint(folder / "checkpoint")
    except ModelError as error:
        return "none", dict.fromkeys(targets, Outcome("refused", _sentence(error, folder)))
    except Exception as error:
        return "none", dict.fromkeys(targets, Outcome("TRACEBACK", _last(error)))
    road = "general" if "through transformers" in found.source else "native"
    outcomes = {}
    for target in targets:
        reference: Any = found.model
        try:
            export(reference, folder / target, weights=found.weights, options=ExportOptions(target=target))
            outcomes[target] = _compared(model, folder / target, name in ENCODED)
        except (ModelError, ExportError) as error:
            outcomes[target] = Outcome("refused", _sentence(error, folder))
        except Exception as error:
            outcomes[target] = Outcome("TRACEBACK", _last(error))
    return road, outcomes


def _sentence(error: Exception, folder: Path) -> str:
    said = " ".join(str(error).split())
    for path in (folder / "checkpoint/config.json", folder / "checkpoint"):
        said = said.removeprefix(f"{path}: ")
    return said.replace(str(folder), "FOLDER")


def _last(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(where.filename).name}:{where.lineno})"


def _tokens(length: int, vocab: int, seed: int) -> Tensor:
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _compared(theirs: Any, path: Path, encoded: bool = False) -> Outcome:
    bundle = load(path)
    vocab = bundle.session.vocab_size
    texts = [_tokens(length, vocab, seed) for seed, length in enumerate(LENGTHS)]
    sources = [_tokens(length, vocab, 7) for length in SOURCES] if encoded else None
    wanted = [_logits(theirs, text, None if sources is None else sources[i])[0] for i, text in enumerate(texts)]
    apart = {"whole": 0.0, "steps": 0.0, "chunks": 0.0, "rows": 0.0}
    for what, index, got in _readings(bundle, texts, sources):
        width = min(got.shape[-1], wanted[index].shape[-1])
        difference = (got[:, :width] - wanted[index][: len(got), :width]).abs().max()
        apart[what] = max(apart[what], float(difference))
    scale = max(float(logits.abs().max()) for logits in wanted)
    wrong = [f"{what} {value:.1e} of {scale:.2f} apart" for what, value in apart.items() if not value < CLOSE]
    prompt = texts[1] if sources is None else sources[1]
    said = bundle.generate(prompt[0].tolist(), max_new_tokens=GREEDY, ignore_eos=True).tokens
    if _greedy(theirs, texts[1], None if sources is None else sources[1]) != list(said):
        wrong.append(f"{GREEDY} greedy tokens differ")
    if wrong:
        return Outcome("WRONG", ", ".join(wrong))
    return Outcome("works", f"{max(apart.values()):.1e} of {scale:.2f}")


def _logits(theirs: Any, text: Tensor, source: Tensor | None) -> Tensor:
    if source is None:
        logits: Tensor = theirs(input_ids=text, use_cache=False).logits
    else:
        logits = theirs(input_ids=source, decoder_input_ids=text, use_cache=False).logits
    return logits


def _readings(
    bundle: Any, texts: Sequence[Tensor], sources: Sequence[Tensor] | None
) -> Iterator[tuple[str, int, Tensor]]:
    """A text read whole, token by token, in chunks, and beside two others of other lengths: logits of its tokens."""
    session = bundle.session

    def state_of(*rows: int) -> Any:
        if sources is None:
            return session.new_state(batch=len(rows))
        return session.new_state(sources=[sources[row][0].tolist() for row in rows])

    def read(pieces: Sequence[tuple[int, int]], index: int) -> Tensor:
        state, text = state_of(index), texts[index]
        found = [session.step(text[:, a:b].numpy(), state, logits="all")[0].copy() for a, b in pieces]
        return torch.from_numpy(np.concatenate(found))

    for index, text in enumerate(texts):
        yield "whole", index, read([(0, text.shape[1])], index)
    yield "steps", 0, read([(i, i + 1) for i in range(LENGTHS[0])], 0)
    yield "chunks", 1, read(list(zip((0, *CUTS), CUTS, strict=False)), 1)
    rows, lengths = [texts[1], texts[0], texts[1]], np.array([LENGTHS[1], LENGTHS[0], 5])
    batch = np.zeros((3, LENGTHS[1]), dtype=np.int64)
    for row, (text, length) in enumerate(zip(rows, lengths, strict=True)):
        batch[row, :length] = text[0, :length].numpy()
    logits = session.step(batch, state_of(1, 0, 1), lengths=lengths, logits="all")
    for row, index in enumerate((1, 0, 1)):
        yield "rows", index, torch.from_numpy(logits[row, : lengths[row]].copy())


def _greedy(theirs: Any, text: Tensor, source: Tensor | None) -> list[int]:
    """Transformers' most likely tokens, each from the whole text before it: no cache that could be at fault."""
    start = text if source is None else torch.tensor([[theirs.config.decoder_start_token_id]])
    said = start
    for _ in range(GREEDY):
        said = torch.cat([said, _logits(theirs, said, source)[:, -1:].argmax(-1)], dim=1)
    found: list[int] = said[0, start.shape[1] :].tolist()
    return found
