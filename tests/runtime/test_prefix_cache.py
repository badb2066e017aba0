"""A prefix cache changes no token, reads no beginning twice, and stays within its bytes, for every kind of state."""

from __future__ import annotations

import functools
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generation_fakes import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_model import MemoryConfig, MemoryModel
from tiny_bundles import text_assets, torch

from edgellm.models.hybrid import Hybrid, HybridConfig
from edgellm.models.lfm2 import LFM2Config, lfm2
from edgellm.models.mamba2 import Mamba2Config, mamba2
from edgellm_exporters.export import ExportOptions, export
from edgellm_runtime import Model, OptionError, PrefixCache, StateError, load
from edgellm_runtime.generation.trail import BLOCK

CONTEXT, VOCAB = 400, byte_level().get_vocab_size()
PATTERNS = {
    "attention": ("attention",), "local": ("local", "attention"), "lstm": ("lstm",), "gru": ("gru",),
    "mixed": ("lstm", "attention", "gru"),
}  # fmt: skip
KINDS = [*PATTERNS, "convolution", "state space"]


def made(kind: str) -> Any:
    if kind in PATTERNS:
        return Hybrid(HybridConfig(
            vocab_size=VOCAB, width=32, pattern=PATTERNS[kind], num_heads=2, num_kv_heads=1, recurrent_width=32,
            max_context=CONTEXT, window=12,
        ))  # fmt: skip
    if kind == "memory":
        return MemoryModel(MemoryConfig(VOCAB, CONTEXT, width=32, heads=2))
    if kind == "convolution":
        return lfm2(LFM2Config(
            vocab_size=VOCAB, width=32, pattern=("conv", "attention"), num_heads=2, num_kv_heads=1, head_dim=16,
            mlp_width=32, max_context=CONTEXT, conv_bias=False,
        ))  # fmt: skip
    return mamba2(Mamba2Config(
        vocab_size=VOCAB, width=32, num_layers=1, num_heads=2, head_dim=16, state_size=8, num_groups=1, bias=False,
        tie_embeddings=True, max_context=CONTEXT,
    ))  # fmt: skip


@functools.cache
def folder_of(kind: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder = Path(tempfile.mkdtemp(), "bundle")
    return export(made(kind).eval(), folder, options=ExportOptions(target="onnx"), text=text_assets()).bundle.path


@functools.cache
def plain(kind: str) -> Model:
    return load(folder_of(kind), threads=1)


def cached(kind: str, **options: Any) -> Model:
    model = Model(plain(kind).session, plain(kind).tokenizer, plain(kind).bundle)
    model.prefix_cache = PrefixCache(**options)
    return model


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=length)


class Reads:
    """How many tokens a session's backend reads."""

    def __init__(self, model: Model) -> None:
        self._backend, self._run, self.tokens = model.session._backend, model.session._backend.run, 0

    def __enter__(self) -> Reads:
        self._backend.run = self._noted
        return self

    def __exit__(self, *_: object) -> None:
        del self._backend.run

    def _noted(self, tokens: Any, *rest: Any) -> Any:
        self.tokens += tokens.size
        return self._run(tokens, *rest)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_answers_are_those_without_a_cache(kind: str, data: st.DataObject) -> None:
    model, bytes_left = cached(kind, max_bytes=data.draw(st.sampled_from([1 << 16, 1 << 24]))), 0
    stems = [text(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 150))) for _ in range(2)]
    for i in range(5):
        prompt = [*data.draw(st.sampled_from(stems)), *text(100 + i % 3, data.draw(st.integers(0, 70)))]
        answer = model.generate(prompt, max_new_tokens=data.draw(st.integers(1, 40)))
        expected = plain(kind).generate(prompt, max_new_tokens=len(answer.tokens))
        assert answer.tokens == expected.tokens[: len(answer.tokens)]
        bytes_left = max(bytes_left, model.prefix_cache.counts.nbytes)
    assert bytes_left <= model.prefix_cache.max_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_prompts_share_is_read_once(kind: str) -> None:
    model, shared = cached(kind), text(1, 300)
    first = model.generate([*shared, *text(2, 60)], max_new_tokens=1)
    assert first.cached_tokens == 0
    with Reads(model) as reads:
        second = model.generate([*shared, *text(3, 60)], max_new_tokens=1)
    attention = kind == "attention"
    assert second.cached_tokens == (300 // BLOCK * BLOCK if attention else 256)  # a snapshot each 256 tokens
    assert reads.tokens == 360 - second.cached_tokens
    third = model.generate([*shared, *text(4, 60)], max_new_tokens=1)
    assert third.cached_tokens == 288, "where the second parted from the first, a snapshot was taken"
    with Reads(model) as reads:
        again = model.generate([*shared, *text(4, 60)], max_new_tokens=1)
    assert again.tokens == third.tokens and reads.tokens <= BLOCK
    counts = model.prefix_cache.counts
    assert (counts.hits, counts.misses) == (3, 1) and counts.reused_tokens == sum(
        a.cached_tokens for a in (second, third, again)
    )


@pytest.mark.parametrize("kind", ["attention", "mixed", "gru"])
def test_a_chat_that_is_sent_again_whole_reads_only_what_is_new(kind: str) -> None:
    model = cached(kind)
    messages = [{"role": "user", "content": "the user said hello to the world " * 9}]
    before = 0
    for turn in range(3):
        prompt = model.chat_template.encode(messages)
        with Reads(model) as reads:
            answer = model.generate(prompt, max_new_tokens=40, ignore_eos=True)
        if turn:
            assert reads.tokens - 39 <= len(prompt) - before + 2 * BLOCK
        before = len(prompt)
        messages += [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "and the world"}]
        assert answer.tokens == plain(kind).generate(prompt, max_new_tokens=40, ignore_eos=True).tokens


def test_an_answer_is_kept_with_its_prompt() -> None:
    for kind in ("attention", "lstm"):
        model, prompt = cached(kind), text(1, 50)
        answer = model.generate(prompt, max_new_tokens=100, ignore_eos=True)
        more = model.generate([*prompt, *answer.tokens, 7], max_new_tokens=2)
        assert more.cached_tokens == 128
        assert more.tokens == plain(kind).generate([*prompt, *answer.tokens, 7], max_new_tokens=2).tokens


def test_every_way_of_reading_uses_the_cache() -> None:
    model, prompt = cached("mixed"), text(1, 200)
    model.read(prompt)
    assert model.read(prompt).read_tokens == 199
    assert model.generate(prompt, max_new_tokens=1).cached_tokens == 192
    assert model.generate(prompt, n=2, temperature=1, seed=1, max_new_tokens=1)[1].cached_tokens == 192
    assert model.generate([], state=model.read(prompt), max_new_tokens=1).cached_tokens == 0
    answer = model.generate(prompt, state=model.new_state(), max_new_tokens=3)
    assert answer.cached_tokens == 192 and answer.state is not None
    answer.state.rewind(150)
    expected = plain("mixed").generate([*prompt[:150], 9], max_new_tokens=5).tokens
    assert model.generate([9], state=answer.state, max_new_tokens=5).tokens == expected
    with model.stream(prompt, max_new_tokens=2) as stream:
        next(stream)
    assert stream.generation.cached_tokens == 192
    long = "the user said hello to the assistant and the world " * 12
    model.conversation(system=long).say("a", max_new_tokens=2)
    assert model.conversation(system=long).say("b", max_new_tokens=2).cached_tokens >= 96


def test_the_beginning_of_a_text_outlives_its_end() -> None:
    model = cached("attention", max_bytes=1 << 16)
    block = 32 * 2 * 16 * 4 + 512  # slots of keys and values, and what a block takes besides
    assert (1 << 16) // block == 14
    model.generate(text(1, 390), max_new_tokens=1)
    assert model.prefix_cache.counts.nbytes == 12 * block
    model.generate(text(2, 130), max_new_tokens=1)
    counts = model.prefix_cache.counts
    assert (counts.blocks, counts.evicted, counts.nbytes) == (14, 2, 14 * block)
    assert model.generate(text(1, 390), max_new_tokens=1).cached_tokens == 10 * BLOCK
    assert model.generate(text(2, 130), max_new_tokens=1).cached_tokens == 2 * BLOCK
    model.prefix_cache.clear()
    assert model.prefix_cache.counts.nbytes == 0
    assert model.generate(text(1, 390), max_new_tokens=1).cached_tokens == 0


def test_models_and_versions_that_share_a_cache_do_not_share_states() -> None:
    cache = PrefixCache()
    models = [load(folder_of("attention", seed), threads=1, prefix_cache=cache) for seed in (0, 1)]
    models.append(load(folder_of("lstm"), threads=1, prefix_cache=cache))
    for _ in range(2):
        for model in models:
            alone = Model(model.session, model.tokenizer, model.bundle)
            assert (
                model.generate(text(1, 100), max_new_tokens=5).tokens
                == alone.generate(text(1, 100), max_new_tokens=5).tokens
            )
    assert cache.counts.hits == cache.counts.misses == 3


def test_a_model_whose_first_token_makes_a_state_is_left_alone() -> None:
    model = cached("memory")
    for _ in range(2):
        assert model.generate(text(1, 100), max_new_tokens=5).cached_tokens == 0
    assert model.prefix_cache.counts.blocks == 0


@pytest.mark.parametrize("kind", ["attention", "mixed", "lstm"])
def test_a_directory_serves_the_next_start(kind: str, tmp_path: Path) -> None:
    prompt = text(1, 200)
    expected = cached(kind, directory=tmp_path / "kept").generate(prompt, max_new_tokens=5)
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    next_start = cached(kind, directory=tmp_path / "kept")
    answer = next_start.generate(prompt, max_new_tokens=5)
    assert answer.cached_tokens == 192 and answer.tokens == expected.tokens
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 6
    rng = np.random.default_rng(0)
    for file in files:  # whatever is spoiled is read again, or the same
        data = bytearray(file.read_bytes())
        data[int(rng.integers(len(data)))] ^= 255
        file.write_bytes(data[: int(rng.integers(1, len(data) + 1))])
    spoiled = cached(kind, directory=tmp_path / "kept")
    assert spoiled.generate(prompt, max_new_tokens=5).tokens == expected.tokens
    assert spoiled.generate(prompt, max_new_tokens=5).cached_tokens == 192


def test_a_directory_has_a_limit_and_belongs_to_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = cached("attention", directory=tmp_path / "kept", max_disk_bytes=1 << 16)
    for seed in range(6):
        model.generate(text(seed, 200), max_new_tokens=1)
        assert sum(file.stat().st_size for file in (tmp_path / "kept").iterdir()) <= 1 << 16
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(StateError, match="other users may write to it; name a directory of your own"):
        PrefixCache(directory=tmp_path / "open")
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="no directory for a prefix cache"):
        PrefixCache(directory=tmp_path / "file")
    with pytest.raises(OptionError, match="max_bytes is 5"):
        PrefixCache(5)
    for file in (tmp_path / "kept").iterdir():
        file.unlink()
    (tmp_path / "kept").rmdir()
    assert model.generate(text(9, 100), max_new_tokens=1).tokens  # a directory that is gone ends nothing
    assert "no block is written" in caplog.text


def test_threads_share_a_cache() -> None:
    model = cached("mixed", max_bytes=1 << 17)
    stems = [text(seed, 130) for seed in range(3)]
    prompts = [[*stems[i % 3], *text(50 + i, i)] for i in range(24)]
    expected = [plain("mixed").generate(p, max_new_tokens=6).tokens for p in prompts]
    barrier = threading.Barrier(4)

    def work(part: int) -> list[tuple[int, ...]]:
        barrier.wait(60)
        return [model.generate(p, max_new_tokens=6).tokens for p in prompts[part::4]]

    with ThreadPoolExecutor(4) as pool:
        for part, found in enumerate(pool.map(work, range(4))):
            assert found == expected[part::4]
    counts = model.prefix_cache.counts
    assert counts.hits + counts.misses == 24 and counts.nbytes <= 1 << 17
    assert repr(model.prefix_cache).startswith("<PrefixCache: ")
