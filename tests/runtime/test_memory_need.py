"""Predicted memory is what states take, byte for byte, and what files have; a limit is kept before loading."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from tiny_bundles import attention_bundle, memory_bundle, recurrent_bundle, window_bundle

from edgellm.cli.inspect import inspect
from edgellm_runtime import ContextError, OptionError, load
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.state.memory_need import memory_need

BUNDLES = [attention_bundle, recurrent_bundle, window_bundle, memory_bundle]


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize(("context", "rows"), [(1, 1), (64, 2), (65, 1), (96, 3)])
def test_the_state_takes_what_was_predicted(bundle, context, rows):
    model = load(bundle(), threads=1)
    need = model.memory(context, rows=rows)
    state = model.session.new_state(rows, max(context, 2))  # one token alone is given one slot
    assert need.state == state.nbytes == need.total - need.weights


def test_weights_are_the_files_that_are_no_text():
    folder = attention_bundle()
    expected = sum(f.stat().st_size for f in folder.iterdir() if f.suffix not in (".json", ".jinja"))
    assert memory_need(Bundle(folder).manifest, "cpu").weights == expected > 0


def test_a_model_above_the_limit_is_refused_with_the_figures():
    folder = attention_bundle()
    need = memory_need(Bundle(folder).manifest, "cpu")
    assert load(folder, threads=1, max_memory=need.total).memory() == need
    with pytest.raises(
        OptionError, match=rf"max_memory is {need.total - 1}, but .* takes {need.total:,} bytes: weights"
    ):
        load(folder, threads=1, max_memory=need.total - 1)
    with pytest.raises(OptionError, match="context is 97; it must be an integer from 1 to 96"):
        load(folder, threads=1).memory(97)


def test_a_context_is_shortened_to_what_fits_and_whoever_wants_more_is_told_why():
    folder = attention_bundle()
    room = memory_need(Bundle(folder).manifest, "cpu", 64)
    with pytest.raises(OptionError, match="a context of 64 tokens fits: shrink_context=True takes that"):
        load(folder, threads=1, max_memory=room.total)
    model = load(folder, threads=1, max_memory=room.total, shrink_context=True)
    assert (model.session.max_context, model.memory()) == (64, room)
    said = rf"context holds 64 \(shortened, since max_memory is {room.total:,} bytes; the model's own is 96\)"
    with pytest.raises(ContextError, match=said):
        model.generate([5] * 65)
    assert model.generate([5] * 60, max_new_tokens=9, ignore_eos=True).finish_reason == "length"
    with pytest.raises(OptionError, match="give it more"):
        load(folder, threads=1, max_memory=room.weights, shrink_context=True)
    whole = load(folder, threads=1, max_memory=10**9, shrink_context=True)
    assert whole.session.max_context == 96


def test_inspect_shows_it():
    result = CliRunner().invoke(inspect, [str(attention_bundle()), "--context", "10"], env={"COLUMNS": "400"})
    need = memory_need(Bundle(attention_bundle()).manifest, "cpu", 10)
    assert f"{need.total:,} bytes: weights {need.weights:,}" in result.output
