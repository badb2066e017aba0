"""The training form and the step form of every model compute the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import CONTEXT, EVERY, VOCAB, make
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import ConfigError
from edgellm.models.hybrid import PRESETS, HybridConfig
from edgellm.models.protocol import Step, empty_state

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def stepped(model: torch.nn.Module, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits of every position, read in chunks."""
    state = empty_state(model, len(tokens), CONTEXT, dtype=next(model.parameters()).dtype)
    past, pieces = torch.zeros(len(tokens), dtype=torch.int32), []
    for start, end in itertools.pairwise([0, *cuts, tokens.shape[1]]):
        chunk = tokens[:, start:end]
        logits, state = model(chunk, state, Step.whole(chunk)._replace(past_lengths=past))
        past = past + chunk.shape[1]
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_step_by_step_equals_full_sequence(family: str, dtype: torch.dtype) -> None:
    model = make(family).to(dtype)
    tokens = torch.randint(0, VOCAB, (3, 20))
    full, carried = model(tokens)
    assert carried == {}
    for cuts in ([], list(range(1, 20)), [1, 7, 8, 15]):
        assert (stepped(model, tokens, cuts) - full).abs().max() < TOLERANCE[dtype] * full.abs().max()


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 17)), seed=st.integers(0, 1000), family=st.sampled_from(list(EVERY)))
@torch.no_grad()
def test_any_split_into_chunks_gives_the_same_logits(cuts: set[int], seed: int, family: str) -> None:
    model = make(family, seed).double()
    tokens = torch.randint(0, VOCAB, (2, 18), generator=torch.Generator().manual_seed(seed))
    assert (stepped(model, tokens, sorted(cuts)) - model(tokens)[0]).abs().max() < 1e-10 * 100


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_rows_of_a_ragged_batch_equal_each_row_alone(family: str) -> None:
    model = make(family).double()
    tokens = torch.randint(0, VOCAB, (3, 12))
    state = empty_state(model, 3, CONTEXT, dtype=torch.float64)
    past = torch.zeros(3, dtype=torch.int32)
    read: list[list[int]] = [[], [], []]
    for lengths in ([5, 2, 4], [1, 1, 1], [3, 6, 1]):
        chunk = torch.zeros(3, max(lengths), dtype=torch.int64)  # padded at the end with a real token, to show leaks
        for row, n in enumerate(lengths):
            chunk[row, :n] = tokens[row, len(read[row]) : len(read[row]) + n]
            read[row] += chunk[row, :n].tolist()
        valid = torch.tensor(lengths, dtype=torch.int32)
        logits, state = model(chunk, state, Step(past, valid, (valid.long() - 1)[:, None]))
        past = past + valid
        for row in range(3):
            alone, _ = model(torch.tensor([read[row]]))
            assert (logits[row, 0] - alone[0, -1]).abs().max() < 1e-10 * 100


@torch.no_grad()
def test_only_the_positions_asked_for_are_projected() -> None:
    model, tokens = make("mixed"), torch.randint(0, VOCAB, (2, 9))
    wanted = torch.tensor([[8, 0], [3, 3]])
    logits, _ = model(tokens, {}, Step.whole(tokens)._replace(logit_positions=wanted))
    full, _ = model(tokens)
    for row, position in itertools.product(range(2), range(2)):
        torch.testing.assert_close(logits[row, position], full[row, wanted[row, position]])


def test_the_reference_preset_is_the_stated_shape() -> None:
    config = PRESETS["reference"]
    assert (config.vocab_size, config.width, config.num_heads, config.recurrent_width) == (10000, 512, 8, 2048)
    assert len(config.pattern) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": ("lstm", "mamba")}, "mamba"),
        ({"pattern": ()}, "no block"),
        ({"width": 0}, "width is 0"),
        ({"num_heads": 7}, "num_heads 7"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HybridConfig(**({"vocab_size": 100} | change))  # type: ignore[arg-type]


def test_an_unknown_configuration_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth"):
        HybridConfig.from_json({"vocab_size": 100, "depth": 3})
