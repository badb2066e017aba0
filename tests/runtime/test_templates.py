"""Chat templates in the shapes that are met: what transformers renders, character by character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generation_fakes import byte_level
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.errors import BundleError, OptionError
from edgellm_runtime.text.chat import ChatTemplate
from edgellm_runtime.text.tokenizer import Tokenizer

TEMPLATES = sorted((Path(__file__).parents[1] / "data" / "templates").glob("*.jinja"))
SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
MORE = ["<pad>", "<unk>", "<|im_sep|>", "</think>", "<|channel|>"]

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {
        "name": "weather", "description": "Today's weather,\nin <b>degrees</b> & more.",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "It's a city: é日"},
            "unit": {"enum": ["C", "F"], "type": "string"}, "days": {"type": "array", "items": {"type": "integer"}},
        }},
    }},
    {"type": "function", "function": {
        "name": "now", "description": "", "parameters": {"type": "object", "properties": {}},
    }},
]  # fmt: skip
DOCUMENTS = [{"title": "One & two", "text": "It's <first>."}, {"title": "Zwei", "text": '\n second "text" '}]
USER = {"role": "user", "content": ' What\'s <up> & "down"?\n'}
SYSTEM = {"role": "system", "content": "Be brief.  "}
SAID = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 5 & <6>.\n"}
THOUGHT = {"role": "assistant", "content": "Five.", "reasoning_content": "two and three"}
THINKING = {"role": "assistant", "content": "Five.", "thinking": "é"}
CALL = {
    "role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {
            "name": "weather", "arguments": {"city": "Zürich's", "days": [1, 2.5, None]},
        }},
    ],
}  # fmt: skip
TWO_CALLS = {
    "role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        {"id": "2", "type": "function", "function": {"name": "weather", "arguments": {"city": "<x>"}}},
    ],
}  # fmt: skip
RESULT = {"role": "tool", "tool_call_id": "1", "name": "weather", "content": '{"degrees": 5}'}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "it's?"}],
}
SCENARIOS: dict[str, dict[str, Any]] = {
    "one message": {"messages": [USER]},
    "a system message": {"messages": [SYSTEM, USER, SAID, USER]},
    "thoughts": {"messages": [USER, THOUGHT, USER, THINKING], "template_variables": {"enable_thinking": True}},
    "no thinking": {"messages": [SYSTEM, USER], "template_variables": {"enable_thinking": False}},
    "tools": {"messages": [SYSTEM, USER, CALL, RESULT], "tools": TOOLS},
    "tools without a system message": {"messages": [USER, TWO_CALLS, RESULT, RESULT, THOUGHT, USER], "tools": TOOLS},
    "no tools at all": {"messages": [USER], "tools": []},
    "documents": {"messages": [USER], "documents": DOCUMENTS, "template_variables": {"citation_mode": "accurate"}},
    "parts": {"messages": [PARTS, SAID, USER]},
    "the assistant begins": {"messages": [SAID, USER]},
    "its own variables": {
        "messages": [USER, SAID, USER],
        "template_variables": {"date_string": "1 Jan", "reminder": "é & <x>", "bos_token": "!"},
    },
}  # fmt: skip


def library():
    made = byte_level()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in MORE])
    return made


@pytest.fixture(scope="module")
def theirs():
    return PreTrainedTokenizerFast(tokenizer_object=library(), **SPECIALS)


def ours(folder: Path, source: str, specials: dict[str, str] = SPECIALS) -> ChatTemplate:
    library().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8", newline="")
    info = TokenizerInfo(0, (2,), False, True, specials)
    return ChatTemplate(folder / "chat_template.jinja", Tokenizer(folder / "tokenizer.json", info, vocab_size=400))


def rendered(theirs, source: str, scenario: dict[str, Any], prompt: bool) -> str | None:
    """What transformers renders; None where it refuses."""
    given = {key: value for key, value in scenario.items() if key in ("tools", "documents")}
    try:
        text: str = theirs.apply_chat_template(
            scenario["messages"], chat_template=source, tokenize=False, add_generation_prompt=prompt, **given,
            **scenario.get("template_variables", {}),
        )  # fmt: skip
    except Exception:  # whatever a template raises
        return None
    return text


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_renders_what_transformers_renders(theirs, tmp_path, path):
    source = path.read_text(encoding="utf-8")
    chat, texts = ours(tmp_path, source), 0
    for name, scenario in SCENARIOS.items():
        for prompt in (True, False):
            expected = rendered(theirs, source, scenario, prompt)
            if expected is None:
                with pytest.raises((OptionError, BundleError)):
                    chat.render(**scenario, add_generation_prompt=prompt)
                continue
            texts += 1
            assert chat.render(**scenario, add_generation_prompt=prompt) == expected, name
    assert texts >= 6 or path.stem == "underscored_namespace"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_tokens_are_those_of_the_rendered_text(theirs, tmp_path, path):
    source = path.read_text(encoding="utf-8")
    chat, plain = ours(tmp_path, source), {k: v for k, v in SCENARIOS.items() if "'</think>'" not in str(v)}
    for scenario in plain.values():
        text = rendered(theirs, source, scenario, True)
        if text is None:
            continue
        ids = chat.encode(**scenario)
        assert chat._tokenizer._library.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{{ messages | tojson(ensure_ascii=true) }}<|im_end|>", "é <|im_end|> x"),
        ("{{ messages | tojson }}<|im_end|>", "é <|im_end|> x"),
        ("{{ messages[0].content | upper }}<|im_end|>", "a <|im_end|> b"),
        ("{{ messages[0].content.split('</think>')[-1] }}<|im_end|>", "thought </think> said"),
        ("{{ messages[0].content | trim }}<|im_end|>", " a<|im_end|> "),
        ("{{ tools[0] | tojson }}{{ messages[0].content }}<|im_end|>", "x"),
    ],
)
def test_what_is_encoded_is_what_is_rendered_also_where_a_message_names_a_special_token(tmp_path, source, content):
    chat = ours(tmp_path, source)
    given = {"messages": [{"role": "user", "content": content}], "tools": [{"a": "<|im_end|>"}]}
    text = chat.render(**given)
    ids = chat.encode(**given)
    assert chat._tokenizer._library.decode(ids, skip_special_tokens=False) == text
    assert [i for i in ids if i in chat._tokenizer.special_ids] == [2]  # the template's own, and no other


def test_a_name_that_cannot_be_told_from_the_templates_own_is_refused(tmp_path):
    chat = ours(tmp_path, "{{ messages[0].content[:12] }}<|im_end|>")
    message = r"names <\|im_end\|>, and .* cannot be told from a special token of its own; take it out"
    with pytest.raises(OptionError, match=message):
        chat.encode([{"role": "user", "content": "a <|im_end|> b"}])


def test_a_template_that_refuses_a_name_refuses_it_when_encoding_too(tmp_path):
    chat = ours(tmp_path, "{% if '<|channel|>' in messages[0].content %}{{ raise_exception('no tags') }}{% endif %}x")
    for call in (chat.render, chat.encode):
        with pytest.raises(OptionError, match="refuses these messages: no tags"):
            call([{"role": "user", "content": "a <|channel|> b"}])


def test_the_tokenizers_own_names_are_the_templates(tmp_path):
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}"
    assert ours(tmp_path, source).render([USER]) == "<|endoftext|><|im_end|><pad><unk>"
    # a bundle of before says them by number only
    assert ours(tmp_path, source, {}).render([USER]) == "<|endoftext|><|im_end|>"


def test_a_role_that_the_template_names_is_a_role(tmp_path):
    chat = ours(tmp_path, "{% if messages[0].role == 'observation' %}seen{% endif %}")
    assert chat.render([{"role": "observation", "content": "x"}]) == "seen"
    with pytest.raises(OptionError, match="role 'obser'; use one of system"):
        chat.render([{"role": "obser", "content": "x"}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": {"a": 1}}, "tools is {'a': 1}; it must be a list of JSON objects"),
        ({"tools": [print]}, r"tools\[0\] is <built-in function print>; it must be a JSON object"),
        ({"documents": [{"text": object}]}, r"documents\[0\].text is <class 'object'>; it must be JSON"),
        ({"template_variables": {"messages": []}}, "names 'messages'; use a name of the template's own"),
        ({"template_variables": {"a b": 1}}, "names 'a b'; use a name"),
        ({"template_variables": {"x": float("inf")}}, "x is inf; it must be JSON"),
        ({"template_variables": [1]}, r"template_variables is \[1\]; it must be a dict"),
    ],
)
def test_what_a_template_cannot_be_given_is_told(tmp_path, given, message):
    chat = ours(tmp_path, "x")
    for call in (chat.render, chat.encode):
        with pytest.raises(OptionError, match=message):
            call([USER], **given)
