"""Tasks on the device: the same answers as PyTorch with the same code, searches against all there is, bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_models import CONTEXT, LABELS, PATTERNS, bundle, in_pytorch, make, spec_of

import edgellm_runtime
from edgellm.checkpoints import load_checkpoint, save_checkpoint
from edgellm.errors import ConfigError
from edgellm.models.hybrid import HybridConfig
from edgellm_exporters.proof.torch_backend import torch_session
from edgellm_runtime import BundleError, ContextError, OptionError
from edgellm_runtime.generation.beam import beam_search
from edgellm_runtime.spec import SpecError
from edgellm_runtime.task_spec import PREDICATE, SEPARATOR, Segment, TaskSpec
from edgellm_runtime.tasks.prompt import encode_prompt, encode_words
from edgellm_runtime.tasks.viterbi import may_follow, viterbi

SENTENCES = ["the cat sat on the mat", "a bird", "our old house near the tree"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_bundle_answers_as_pytorch_does(pattern: str, tmp_path: Path) -> None:
    model = make(PATTERNS[pattern])
    device = bundle(tmp_path, model, spec_of("translation"))
    reference = in_pytorch(model, device)
    for beams in (1, 3):
        found, expected = (who.translate(SENTENCES, beams=beams) for who in (device, reference))
        assert [a.tokens for a in found] == [a.tokens for a in expected]
        np.testing.assert_allclose([a.confidence for a in found], [a.confidence for a in expected], rtol=1e-4)
        alone = [device.translate(s, beams=beams).tokens for s in SENTENCES]
        assert alone == [a.tokens for a in found]


def test_one_beam_is_greedy(tmp_path: Path) -> None:
    device = bundle(tmp_path, make(), spec_of("translation"))
    assert device.tokenizer is not None
    prompt = [*device.tokenizer.encode(SENTENCES[0]), device.tokenizer.token_id(SEPARATOR)]
    found = device.generate(prompt, max_new_tokens=8).tokens
    expected = device.translate(SENTENCES[0], beams=1)
    assert expected.tokens == tuple(t for t in found if t != 0)
    assert (expected.finish_reason == "eos") == (found[-1] == 0)


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_labelling_bundle_labels_as_pytorch_does(pattern: str, quantize: str, tmp_path: Path) -> None:
    model = make(PATTERNS[pattern], labels=len(LABELS))
    device = bundle(tmp_path, model, spec_of("srl"), quantize)
    reference = in_pytorch(model, device)
    items: list[tuple[str, int | str]] = [("the cat sat on the mat", "sat"), ("a bird saw our old tree", 2)]
    together = device.task.label_roles_batch(items)
    for (sentence, predicate), found in zip(items, together, strict=True):
        expected = reference.label_roles(sentence, predicate)
        assert found.words == tuple(sentence.split()) and found.predicate == 2
        if quantize == "none":
            assert found.labels == expected.labels
        assert found.confidence == pytest.approx(expected.confidence, rel=1e-3 if quantize == "none" else 0.1)
        assert [s.text for s in found.spans] == [" ".join(found.words[s.start : s.end]) for s in found.spans]
    with pytest.raises(OptionError, match="labels words"):
        device.generate("the cat")


def test_a_choice_is_the_likeliest_whole_answer(tmp_path: Path) -> None:
    model = make()
    device = bundle(tmp_path, model, spec_of("qa", choices=("no", "yes", "the old mat"), no_answer="no"))
    found = device.answer(["the cat", "the mat"], "the dog saw a bird")
    assert device.tokenizer is not None
    spec = device.bundle.manifest.task
    assert spec is not None
    for question, answer in zip(["the cat", "the mat"], found, strict=True):
        prompt = encode_prompt(
            spec, device.tokenizer.encode, device.tokenizer.token_id,
            {"context": "the dog saw a bird", "question": question},
        ).tokens  # fmt: skip
        scores = []
        for choice in spec.choices:
            said = [*device.tokenizer.encode(choice), 0]
            with torch.no_grad():
                logits, _ = model(torch.tensor([[*prompt, *said[:-1]]]))
            logp = logits[0].log_softmax(-1)[len(prompt) - 1 :]
            scores.append(float(logp[torch.arange(len(said)), said].sum()))
        best = spec.choices[int(np.argmax(scores))]
        assert answer.text == ("" if best == "no" else best)
        shares = np.exp(np.array(scores) - max(scores))
        assert answer.confidence == pytest.approx(shares.max() / shares.sum(), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), penalty=st.sampled_from([0.0, 0.7, 1.0]))
def test_a_beam_as_wide_as_the_vocabulary_finds_the_best_answer_of_two_tokens(seed: int, penalty: float) -> None:
    vocab = 6
    torch.manual_seed(seed)
    model = make(vocab=vocab)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.head.weight.normal_(std=1.0)  # type: ignore[union-attr, operator]
    prompt = np.random.default_rng(seed).integers(1, vocab, 4).tolist()
    session = torch_session(model)  # type: ignore[arg-type]
    found = beam_search(session, [prompt], beams=vocab, max_new_tokens=2, eos=[0], length_penalty=penalty)[0]
    with torch.no_grad():
        answers = [(0,), *((a, b) for a in range(1, vocab) for b in range(vocab))]
        best: dict[tuple[int, ...], float] = {}
        for answer in answers:
            logp = model(torch.tensor([[*prompt, *answer[:-1]]]))[0][0].log_softmax(-1)[len(prompt) - 1 :]
            best[answer] = float(logp[torch.arange(len(answer)), list(answer)].sum())
    # an ending counts where it is among the beams + 1 likeliest continuations of its length
    ranked = {n: sorted((a for a in best if len(a) == n), key=lambda a: -best[a])[: vocab + 1] for n in (1, 2)}
    ended = {a: s for a, s in best.items() if a[-1] == 0 and a in ((0,), *ranked[2])}
    expected = max(ended, key=lambda a: ended[a] / len(a) ** penalty)
    assert found.ended and (*found.tokens, 0) == expected
    assert found.log_probability == pytest.approx(ended[expected], abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 10_000))
def test_viterbi_finds_the_best_of_all_allowed_paths(words: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(words, len(LABELS)), scale=2)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    paths = [
        p for p in itertools.product(range(len(LABELS)), repeat=words)
        if all(may_follow(LABELS[p[i - 1]] if i else None, LABELS[b]) for i, b in enumerate(p))
    ]  # fmt: skip
    expected = max(paths, key=lambda p: logp[np.arange(words), p].sum())
    found, confidence = viterbi(logits, LABELS)
    assert found == [LABELS[i] for i in expected]
    assert confidence == pytest.approx(np.exp(logp[np.arange(words), expected].mean()))


def test_words_are_read_twice_and_labelled_at_their_last_token() -> None:
    ids = {PREDICATE: 1, SEPARATOR: 2}
    tokens, positions = encode_words(lambda t: [ord(c) for c in t[1:]], ids.get, ["ab", "c", "de"], 1)
    once = [97, 98, 1, 99, 100, 101]
    assert tokens == [*once, 2, *once]
    assert [tokens[p] for p in positions] == [98, 99, 101] and min(positions) > 6


def test_what_is_too_long_is_shortened_where_the_task_says_so_and_refused_elsewhere(tmp_path: Path) -> None:
    long = "the cat sat on the mat and the dog saw a bird in the old tree " * 4
    device = bundle(tmp_path / "s", make(), spec_of("summarization"))
    answer = device.summarize(long, words=3)
    assert answer.cut and not device.summarize("the cat sat").cut
    device = bundle(tmp_path / "t", make(), spec_of("translation"))
    with pytest.raises(ContextError, match=r"prompt has \d+ tokens, and this model takes 32"):
        device.translate(long)
    device = bundle(tmp_path / "l", make(labels=5), spec_of("srl"))
    with pytest.raises(ContextError, match=f"tokens, and this model takes {CONTEXT}"):
        device.label_roles(long, 0)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "translation": bundle(folder / "t", make(), spec_of("translation", scripts=("LATIN",))),
        "qa": bundle(folder / "q", make(), spec_of("qa")),
        "srl": bundle(folder / "s", make(labels=5), spec_of("srl")),
    }


@pytest.mark.parametrize(
    ("task", "call", "said"),
    [
        ("translation", lambda m: m.translate("  "), "source is empty"),
        ("translation", lambda m: m.translate("\u043a\u043e\u0448\u043a\u0430 cat"), "mostly in CYRILLIC script"),
        ("translation", lambda m: m.translate("cat", beams=0), "beams is 0"),
        ("translation", lambda m: m.translate("cat", max_new_tokens=-1), "max_new_tokens is -1"),
        ("translation", lambda m: m.summarize("cat"), "trained for translation, not for summarization"),
        ("translation", lambda m: m.label_roles("cat", 0), "trained for translation, not for srl"),
        ("translation", lambda m: m.translate("half \ud800"), "surrogate"),
        ("qa", lambda m: m.answer(["who", "what"], ["one"]), "2 questions for 1 contexts"),
        ("qa", lambda m: m.answer("who", ""), "context is empty"),
        ("srl", lambda m: m.label_roles("", 0), "the sentence is empty"),
        ("srl", lambda m: m.label_roles("the cat sat", 3), "words are 0 to 2"),
        ("srl", lambda m: m.label_roles("the cat sat", "dog"), "not one of the words"),
        ("srl", lambda m: m.label_roles("the cat saw the cat", "cat"), r"2 times, at \[1, 4\]"),
        ("srl", lambda m: m.label_roles(["the", " "], 0), "empty word"),
        ("srl", lambda m: m.translate("cat"), "trained for srl, not for translation"),
    ],
)  # fmt: skip
def test_bad_input_is_told(devices: dict[str, Any], task: str, call: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        call(devices[task])


def test_text_without_letters_and_an_overridden_script_pass(devices: dict[str, Any]) -> None:
    assert devices["translation"].translate("12 + 3").tokens
    assert devices["translation"].translate("\u043a\u043e\u0448\u043a\u0430", check_script=False).tokens
    assert devices["translation"].translate([]) == [] and devices["srl"].task.label_roles_batch([]) == []


def test_a_bundle_without_a_task_says_so(tmp_path: Path) -> None:
    from tiny_bundles import attention_bundle, recurrent_bundle

    for path in (attention_bundle(), recurrent_bundle()):
        with pytest.raises(OptionError, match="trained for no task"):
            edgellm_runtime.load(path).translate("cat")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "cooking"}, "unknown task"),
        ({"labels": ["O", "I-A0"]}, "neither B-X nor"),
        ({"labels": []}, "labels belong to srl"),
        ({"labels": ["O", "B-A0"]}, "2 labels for logits over 5"),
        ({"max_prompt": 0}, "max_prompt is 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"prompt": [{"field": "secret"}]}, "may name"),
        ({"prompt": [{"shell": "rm"}]}, "text, token or field"),
        ({"prompt": [["x"]]}, "not a piece"),
        ({"extra": 1}, "unknown keys"),
        ({"choices": "yes"}, "list of texts"),
        ({"cut": "words"}, "not in the prompt"),
    ],
)
def test_a_manifest_with_an_impossible_task_is_refused(
    devices: dict[str, Any], change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    from tiny_bundles import copied, edit_manifest

    path = copied(devices["srl"].bundle.path, tmp_path)
    edit_manifest(path, task={**json.loads((path / "manifest.json").read_text())["task"], **change})
    with pytest.raises(BundleError, match=said):
        edgellm_runtime.load(path)


def test_a_tokenizer_without_the_prompts_tokens_is_told(devices: dict[str, Any], tmp_path: Path) -> None:
    from tiny_bundles import copied, edit_manifest

    path = copied(devices["translation"].bundle.path, tmp_path)
    spec = spec_of("translation", prompt=(Segment("field", "source"), Segment("token", "<|nothing|>")))
    edit_manifest(path, task=spec.to_json())
    with pytest.raises(BundleError, match=r"lacks \['<\|nothing\|>'\]"):
        edgellm_runtime.load(path).translate("cat")


def test_a_checkpoint_carries_its_task(tmp_path: Path) -> None:
    spec = spec_of("srl")
    save_checkpoint(
        tmp_path / "c", make(labels=5), architecture="hybrid", tokenizer_json=None, eos_token_ids=(0,), task=spec
    )
    assert load_checkpoint(tmp_path / "c").task == spec
    assert TaskSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_labels_are_no_words_of_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="tie_embeddings"):
        HybridConfig(vocab_size=300, num_labels=3, tie_embeddings=True)
    with pytest.raises(ConfigError, match="num_labels is -1"):
        HybridConfig(vocab_size=300, num_labels=-1)
    with pytest.raises(SpecError, match="first label"):
        TaskSpec(name="srl", labels=("B-A0", "O"))
