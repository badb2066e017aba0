"""Models that answer sources against transformers: equal logits from ragged sources, whole and in steps."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from source_models import CONTEXT, FOREIGN, VOCAB, bart_model, foreign, own_model, ragged, t5_model
from torch import Tensor, nn

from edgellm.checkpoints import load_checkpoint
from edgellm.errors import CheckpointError
from edgellm.models.layers.both_ways import MIXERS
from edgellm.models.protocol import Step, answers_sources, empty_state, read_rows
from edgellm.models.t5 import buckets


@pytest.mark.parametrize("name", FOREIGN)
@torch.inference_mode()
def test_logits_equal_transformers_for_ragged_sources(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs = foreign(name, tmp_path)
    source, lengths = ragged()
    there = torch.arange(source.shape[1]) < lengths[:, None]
    tokens = torch.randint(4, VOCAB, (3, 31), generator=torch.Generator().manual_seed(2))  # longer than the distances
    expected = theirs(input_ids=source, attention_mask=there.long(), decoder_input_ids=tokens).logits
    model = load_checkpoint(tmp_path).model
    found = model(tokens, model.encode(source, lengths))[0]
    assert (found - expected).abs().max() < 5e-6 * float(expected.abs().max())
    assert float(expected.std()) > 0.05  # so that something is compared


def test_what_these_files_cannot_compute_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    foreign("bart", tmp_path)
    file = tmp_path / "config.json"
    said = file.read_text()
    for change, words in (
        ('"is_encoder_decoder": false', "is_encoder_decoder is False"),
        ('"activation_function": "tanh"', "activation_function is 'tanh'"),
        ('"decoder_start_token_id": null', "decoder_start_token_id is None"),
        ('"normalize_before": true', "normalize_before is True"),
    ):
        file.write_text(said.rstrip().removesuffix("}") + f", {change}}}")  # the last of two counts
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "make",
    [t5_model, bart_model, *(partial(own_model, kind) for kind in MIXERS), partial(own_model, "gru", copies=True)],
)
@pytest.mark.parametrize("cuts", [[*range(1, 20)], [3, 4, 11]])
@torch.inference_mode()
def test_steps_equal_the_whole_and_padding_of_sources_changes_nothing(make: type[nn.Module], cuts: list[int]) -> None:
    model = make().double()  # in which nothing but another computation makes a difference
    source, lengths = ragged(longest=22)
    tokens = torch.randint(4, VOCAB, (3, 20), generator=torch.Generator().manual_seed(2))
    whole = model(tokens, model.encode(source, lengths))[0]
    state = {
        **empty_state(model, 3, CONTEXT),
        **model.encode(source.masked_fill(_padding(source, lengths), 7), lengths),
    }
    past, pieces = torch.zeros(3, dtype=torch.int32), []
    for start, stop in itertools.pairwise([0, *cuts, 20]):
        logits, present = model(
            tokens[:, start:stop], state, Step.whole(tokens[:, start:stop])._replace(past_lengths=past)
        )
        assert present.keys() == empty_state(model, 3, CONTEXT).keys()  # and none that the encoder makes
        state = state | present
        pieces.append(logits)
        past = past + (stop - start)
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-12 * float(whole.abs().max())
    for row in range(3):
        alone = model.encode(source[row : row + 1, : lengths[row]], lengths[row : row + 1])
        assert (model(tokens[row : row + 1], alone)[0] - whole[row]).abs().max() < 1e-12 * float(whole.abs().max())


def _padding(source: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(source.shape[1]) >= lengths[:, None]


@torch.inference_mode()
def test_an_answer_depends_on_every_token_of_its_source_and_of_no_other_row() -> None:
    model, tokens = t5_model(), torch.tensor([[3, 0, 9, 4], [3, 0, 9, 4]])
    source, lengths = torch.randint(4, VOCAB, (2, 12)), torch.tensor([12, 7], dtype=torch.int32)
    before = model(tokens, model.encode(source, lengths))[0]
    for row, at in itertools.product(range(2), range(12)):
        other = source.clone()
        other[row, at] = 4 + (other[row, at] - 3) % (VOCAB - 4)
        changed = (model(tokens, model.encode(other, lengths))[0] - before).abs().amax((1, 2)) > 1e-5
        assert changed.tolist() == [row == i and at < lengths[i] for i in range(2)]


@torch.inference_mode()
def test_words_that_are_copied_are_those_of_the_source_and_probabilities_sum_to_one() -> None:
    model: Any = own_model("attention", copies=True).double()
    torch.nn.init.constant_(model.pointer.gate.bias, 40.0)  # always
    torch.nn.init.zeros_(model.pointer.gate.weight)
    source, lengths = ragged(longest=20)
    found = model(torch.tensor([[3, 4], [3, 9], [5, 4]]), model.encode(source, lengths))[0].exp()
    assert (found.sum(-1) - 1).abs().max() < 1e-5
    for row, length in enumerate(lengths.tolist()):
        there = set(source[row, :length].tolist())
        assert {i for i in range(VOCAB) if float(found[row].amax(0)[i]) > 1e-6} <= there
    torch.nn.init.constant_(model.pointer.gate.bias, -40.0)  # never
    plain = own_model("attention").double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pointer")})
    tokens = torch.tensor([[3, 4, 6]]).expand(3, 3)
    expected, ours = (m(tokens, m.encode(source, lengths))[0].log_softmax(-1) for m in (plain, model))
    assert (expected.exp() - ours.exp()).abs().max() < 1e-6


def test_only_models_with_an_encoder_read_sources_and_whole_rows_are_their_own() -> None:
    model, rows = t5_model(), torch.tensor([[5, 6, 7]])
    assert answers_sources(model)
    own = model(rows, model.encode(rows, torch.tensor([3], dtype=torch.int32)))[0]
    assert torch.equal(read_rows(model, rows)[0], own)


def test_buckets_are_exact_near_and_shared_far_on_either_side() -> None:
    back = buckets(torch.arange(0, -200, -1), count=32, most=128, both_ways=False)
    assert back[:16].tolist() == list(range(16)) and back.max() == 31
    assert (back.diff() >= 0).all() and (back[128:] == 31).all()
    both = buckets(torch.tensor([-3, 0, 3, -500, 500]), count=32, most=128, both_ways=True)
    assert both.tolist() == [3, 0, 19, 15, 31]
