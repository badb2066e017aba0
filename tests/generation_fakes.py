"""A tiny deterministic model behind the session's interface, a tokenizer trained in a blink, and a bundle of both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.errors import ContextError
from edgellm_runtime.model import Model
from edgellm_runtime.session import Session
from edgellm_runtime.spec import StateSpec
from edgellm_runtime.state import State
from edgellm_runtime.state.storage import HOST
from edgellm_runtime.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
KEYS = StateSpec("k", ("batch", "capacity"), "int64", "append")
HIDDEN = StateSpec("h", ("batch", 1), "int64", "replace")


def byte_level(texts: list[str] | None = None, vocab_size: int = 320) -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    library.train_from_iterator(texts or ["the user said hello to the assistant and the world"] * 4, trainer)
    return library


class FakeSession:
    """Logits that depend on every token of the row, in order, and on nothing else."""

    device, candidates, predicts_tokens, encoder = "cpu", 0, True, None
    adapter: str | None = None
    adapters: tuple[str, ...] = ()
    with_adapter = Session.with_adapter
    chunk, one_pass = 256, False

    def __init__(self, vocab_size: int, max_context: int = 64, *, recurrent: bool = True) -> None:
        self.vocab_size = self.width = vocab_size
        self.max_context = max_context
        self.specs = (KEYS, HIDDEN) if recurrent else (KEYS,)
        self.signature, self.storage = SimpleNamespace(state=self.specs), HOST
        self.table = np.random.default_rng(7).normal(size=(61, vocab_size)).astype(np.float32) * 2
        self.read = 0  # tokens read in all, to see what was not read again
        self.fail_at: int | None = None
        self._outs: dict[int, Any] = {}  # of each state, as of each its own binding

    @property
    def context_words(self) -> str:
        return str(self.max_context)

    def new_state(self, batch: int = 1, capacity: int = 0) -> State:
        return State(self.specs, batch, max(capacity, 1))

    def step(self, tokens, state, *, lengths=None, logits="last", progress=None):
        batch, time = tokens.shape
        assert batch == state.batch
        valid = np.full(batch, time) if lengths is None else lengths
        assert (valid >= 1).all()
        if (state.lengths + valid).max() > self.max_context:
            raise ContextError("over the context")
        state.reserve(int((state.lengths + valid).max()))
        if (before := self._outs.get(id(state))) is not None:
            before[...] = np.nan  # the last step's logits are no longer to be looked at
        out = self._outs[id(state)] = np.empty((batch, 1, self.vocab_size), dtype=np.float32)
        for row in range(batch):
            for token in tokens[row, : valid[row]]:
                if self.fail_at is not None and self.read == self.fail_at:
                    self.fail_at = None
                    raise KeyboardInterrupt
                state.tensors["k"][row, state.lengths[row]] = token
                state.lengths[row] += 1
                self.read += 1
            out[row, 0] = self.table[self._hash(state, row)]
        return out

    def _hash(self, state: State, row: int) -> int:
        h = 0
        for token in state.tensors["k"][row, : state.lengths[row]]:
            h = (h * 31 + int(token) + 7) % 1000003
        return h % 61


class FakeBundle:
    def __init__(self, path: Path, info: TokenizerInfo | None) -> None:
        self.path, self.manifest = path, SimpleNamespace(tokenizer=info, name="fake", generation={}, adapters=())

    def file(self, name: str) -> Path:
        return self.path / name


def fake_model(
    folder: Path, *, template: str | None = TEMPLATE, bos: int | None = None, eos: tuple[int, ...] = (2,),
    max_context: int = 64, recurrent: bool = True, with_tokenizer: bool = True, library: Library | None = None,
) -> Model:  # fmt: skip
    info = TokenizerInfo(bos, eos, bos is not None, template is not None)
    library = library or byte_level()
    library.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    session = FakeSession(library.get_vocab_size(), max_context, recurrent=recurrent)
    tokenizer = Tokenizer(folder / "tokenizer.json", info, vocab_size=session.vocab_size) if with_tokenizer else None
    return Model(session, tokenizer, FakeBundle(folder, info if with_tokenizer else None))
