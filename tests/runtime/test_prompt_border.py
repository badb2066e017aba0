"""Where the prompt ends and the answer begins: an answer's text is what it adds to the prompt's."""

from __future__ import annotations

import pytest
from generation_fakes import byte_level, fake_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_kinds import metaspace, sentencepiece, suffixed, word_level, word_piece

from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.text.decoding import Pieces
from edgellm_runtime.text.tokenizer import Tokenizer

MAKERS = {
    "ByteLevel": byte_level,
    "Replace, ByteFallback, Fuse, Strip": lambda: sentencepiece(True),
    "Replace, ByteFallback, Fuse": lambda: sentencepiece(False),
    "Metaspace": metaspace,
    "WordPiece": word_piece,
    "BPEDecoder": suffixed,
    "none": word_level,
}
KINDS = list(MAKERS)
quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    made = {}
    for number, (kind, make) in enumerate(MAKERS.items()):
        library = make()
        library.save(str(folder / f"{number}.json"))
        made[kind] = Tokenizer(folder / f"{number}.json", TokenizerInfo(), vocab_size=library.get_vocab_size())
    return made


def whole_characters(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The library's text of all tokens; a character that is not complete is no part of it."""
    return tokenizer._library.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@quick
def test_an_answers_text_is_what_it_adds_to_the_prompts(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    words = [i for i in range(tokenizer._vocab_size) if "<0x" not in tokenizer._library.id_to_token(i)]
    tokens = st.lists(st.sampled_from(words), max_size=30)
    if kind == "ByteLevel":  # half characters and nonsense too
        tokens = st.lists(st.integers(0, tokenizer._vocab_size - 1), max_size=30)
    prompt, new = data.draw(tokens), data.draw(tokens)
    decoder = tokenizer.stream(after=prompt)
    shown = "".join([*(decoder.push(t) for t in new), decoder.finish()])
    assert shown == tokenizer.decode(new, after=prompt)
    before, everything = whole_characters(tokenizer, prompt), tokenizer._library.decode([*prompt, *new])
    if not tokenizer._library.decode(prompt).endswith("\ufffd"):
        assert before + shown == everything
    elif everything.startswith(before) and "\ufffd" not in everything[len(before) :]:
        assert shown == everything[len(before) :]  # the character that the prompt began is whole in the answer


@pytest.mark.parametrize("kind", KINDS)
def test_text_cut_anywhere_is_put_together_again(tokenizers, kind):
    tokenizer = tokenizers[kind]
    text = "hello world the é hello 日 world hello" if kind in KINDS[:3] else "hello world hello hello world world"
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for cut in range(len(ids)):
        before = tokenizer.decode(ids[:cut])
        assert before.rstrip("\ufffd") + tokenizer.decode(ids[cut:], after=ids[:cut]) == whole


def test_the_space_after_a_prompt_is_kept(tokenizers):
    for kind in ("Replace, ByteFallback, Fuse, Strip", "Metaspace", "WordPiece", "none"):
        tokenizer = tokenizers[kind]
        first, second = (
            ("▁the", "▁h") if "Strip" in kind else ("▁hello",) * 2 if kind == "Metaspace" else ("hello",) * 2
        )
        a, b = map(tokenizer._library.token_to_id, (first, second))
        assert tokenizer.decode([b]) == second.strip("▁")
        assert tokenizer.decode([b], after=[a]) == " " + second.strip("▁")


def test_special_tokens_before_an_answer_are_no_text_before_it(tokenizers):
    tokenizer = tokenizers["Replace, ByteFallback, Fuse, Strip"]
    the = tokenizer._library.token_to_id("▁the")
    assert tokenizer.decode([the], after=[1]) == "the"
    assert tokenizer.decode([the], after=[1, the, 2]) == " the"


def test_a_prompt_may_end_within_a_character(tokenizers):
    for kind in KINDS[:3]:
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("the €")
        for cut in (1, 2):
            assert tokenizer.decode(ids[-cut:], after=ids[:-cut]) == "€"


def test_a_long_prompt_is_not_decoded_for_a_tokens_text(tokenizers, monkeypatch):
    looked, text = [], Pieces._text
    monkeypatch.setattr(Pieces, "_text", lambda self, token: looked.append(token) or text(self, token))
    for kind in ("ByteLevel", "Replace, ByteFallback, Fuse, Strip", "WordPiece"):
        tokenizers[kind].stream(after=tokenizers[kind].encode("hello") * 5000)
    assert len(looked) < 200


@pytest.mark.parametrize("kind", ["Replace, ByteFallback, Fuse, Strip", "ByteLevel"])
def test_prompt_and_answer_join_to_the_text_of_all_tokens(tmp_path, kind):
    model = fake_model(tmp_path, library=MAKERS[kind](), template=None)
    words = [model.tokenizer._library.token_to_id(t) for t in (["▁the", "▁h", "e", "t"] if "Strip" in kind else "the")]
    others = [i for i in range(model.session.vocab_size) if i not in words]
    model.session.table[:, others] = -1e9
    for prompt in ("the h", "h", "the"):
        ids = model.tokenizer.encode(prompt)
        answer = model.generate(prompt, max_new_tokens=12)
        whole = model.tokenizer._library.decode([*ids, *answer.tokens])
        assert prompt + answer.text == whole
        assert prompt + "".join(chunk.text for chunk in model.stream(prompt, max_new_tokens=12)) == whole
        one_by_one = list(ids)
        text = prompt
        for _ in range(12):
            step = model.generate(one_by_one, max_new_tokens=1)
            one_by_one += step.tokens
            text += step.text
        assert text == whole
    if "Strip" in kind:
        assert " " in whole
