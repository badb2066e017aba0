"""Chat templates that mean harm: refused in a sentence, in seconds, within little memory; real shapes pass."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from generation_fakes import byte_level
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgellm_runtime import BundleError
from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.text.chat import ChatTemplate
from edgellm_runtime.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]


def rendered(folder: Path, template: str, messages: list[dict[str, str]] | None = None) -> str:
    (folder / "chat_template.jinja").write_text(template)
    byte_level().save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder / "tokenizer.json", TokenizerInfo(None, (2,), False, True), vocab_size=1000)
    return ChatTemplate(folder / "chat_template.jinja", tokenizer).render(messages or HELLO)


DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"


def doubled(start: str, step: str, rest: str = "") -> str:
    return DOUBLE.replace("START", start).replace("STEP", step) + rest


NEST = "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}x{% endfor %}{% endfor %}"
HOSTILE = {
    "nested ranges": NEST + "{% endfor %}",
    "nested ranges without output": NEST.replace("x{", "{") + "{% endfor %}",
    "ranges with a test": "{% for a in range(100000) %}{% for b in range(100000) if b < 0 %}{% endfor %}{% endfor %}",
    "batch": "{{ 'a'|batch(10**9, 'x')|list }}",
    "slice": "{{ 'a'|slice(10**9)|list }}",
    "tojson": "{{ [1]|tojson(indent=10**9) }}",
    "tojson by separators": "{{ range(99999)|list|tojson(separators=('x' * 99999, ':')) }}",
    "center": "{{ 'a'|center(10**9) }}",
    "indent": "{{ 'a\\nb'|indent(10**9) }}",
    "indent by a text": "{{ ('a\\n' * 100000)|indent('x' * 100000) }}",
    "wordwrap": "{{ ('ab' * 100000)|wordwrap(1, true, 'x' * 100000) }}",
    "text times number": "{{ 'a' * 10**9 }}",
    "number times list": "{{ 10**9 * [1] }}",
    "power": "{{ 10**(10**9) }}",
    "power by hand": doubled("9", "ns.x * ns.x", "{{ ns.x }}"),
    "text doubling": doubled("'a'", "ns.x + ns.x"),
    "text doubling by ~": doubled("'a'", "ns.x ~ ns.x"),
    "list doubling": doubled("[1]", "ns.x + ns.x"),
    "lists of lists": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "tuples as keys": doubled("(1,)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    "objects of objects": doubled("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x.items() }}"),
    "namespaces of namespaces": "{% set x = namespace(a=1) %}"
    + "".join(f"{{% set x{i} = namespace(a=x{i - 1 if i else ''}, b=x{i - 1 if i else ''}) %}}" for i in range(40))
    + "{{ x39 }}",
    "itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}{{ ns|string }}",
    "replace": doubled("'aa'", "ns.x|replace('a', 'aa')"),
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "join": "{{ (['a'] * 100000)|join('b' * 100000) }}",
    "join of a text": "{{ ('b' * 100000).join(['a'] * 100000) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(10**9) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format by an argument": "{{ '{:{}}'.format(1, 10**9) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent by an argument": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%1000000000d'|format(1) }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "bytes of a text": "{{ 'a'.encode().ljust(10**9) }}",
    "lipsum": "{{ lipsum(10**9) }}",
    "recursive macro": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "two branches": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in range(90000) recursive %}{{ loop(range(90000)) }}{% endfor %}",
    "captured text": "{% set x %}{% for a in range(100000) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "kept slices": "{% set ns = namespace(x=[]) %}{% set t = 'a' * 1000000 %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + [t[1:]] %}{% endfor %}",
    "sum of lists": "{% set a = [[1] * 1000] * 1000 %}{% for i in range(99999) %}{% set b = a|sum(start=[]) %}"
    "{% endfor %}",
    "sort": "{% for i in range(99999) %}{% set b = range(99999)|sort(reverse=true) %}{% endfor %}",
    "search": "{% set t = 'a' * 4000000 %}{% for i in range(99999) %}{% if 'ab' in t %}{% endif %}{% endfor %}",
    "map of filters": "{{ ['a']|map('center', 10**9)|list }}",
    "filter block": "{% filter center(10**9) %}a{% endfilter %}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "long sum": "{{ " + "1+" * 10_000 + "1 }}",
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_in_seconds_and_megabytes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm_runtime.text.template_limits._SECONDS", 1.0)  # ten, for a machine that is busy
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match="the chat template failed"):
            rendered(tmp_path, HOSTILE[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 20
    assert peak < 400 << 20


REAL = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "first and last": "{%- for m in messages -%}{%- if loop.first and m.role != 'system' -%}S{%- endif -%}"
    "{{ m.content.strip() }}{%- if not loop.last -%}|{%- endif -%}{%- endfor -%}",
    "namespace": "{% set ns = namespace(found=false, text='') %}{% for m in messages[::-1] %}"
    "{% if not ns.found and m.role == 'user' %}{% set ns.found = true %}{% set ns.text = m.content[:3] ~ '…' %}"
    "{% endif %}{% endfor %}{{ ns.text }}",
    "macro": "{% macro turn(role, content='x') -%}<{{ role }}>{{ content }}{%- endmacro %}"
    "{% for m in messages %}{{ turn(m.role, content=m.content) }}{{ caller }}{% endfor %}",
    "split": "{{ messages[0].content.split('l')[-1].lstrip('\\n') }}{{ messages[0]['content'].startswith('h') }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | length }}{{ messages[0] | tojson }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a\\nb' | indent(4) }}",
    "numbers": "{{ (messages | length) % 2 == 0 }}{{ 2 * 3 + 1 }}{{ '%s-%d' % ('a', 7) }}{{ '=' * 8 }}"
    "{{ 7 // 2 ** 2 }}",
    "format": "{{ '{}:{role:>6}'.format(1, role='a') }}{{ '%05d' | format(3) }}",
    "lists": "{% set a = [1, 2] + [messages[0].role] %}{{ a }}{{ {'k': a, 'l': (1, a)} }}{{ 'user' in a }}"
    "{{ a[1:] | list }}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[0].get('x', 'none') }}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{% if x is number %}{{ x }}{% else %}{{ loop(x) }}{% endif %}"
    "{% endfor %}",
    "tests": "{{ tools is none }}{{ x is defined }}{{ messages is iterable }}{{ messages[0].content is string }}",
    "control": "{% for i in range(9) %}{% if i == 3 %}{% continue %}{% elif i > 5 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}",
    "call": "{% macro b() %}[{{ caller() }}]{% endmacro %}{% call b() %}in{% endcall %}"
    "{% set s %}a{{ 1 }}{% endset %}{{ s }}",
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_limits_change_nothing_that_a_real_template_writes(tmp_path: Path, name: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    plain.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " there\n"}]
    given = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
    expected = plain.from_string(REAL[name]).render(**given, eos_token="<|im_end|>")
    assert rendered(tmp_path, REAL[name], messages) == expected


def test_thousand_messages_of_a_real_shape_take_little_time(tmp_path: Path) -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(1000)]
    template = REAL["first and last"] + REAL["chatml"]
    started = time.process_time()
    assert len(rendered(tmp_path, template, messages)) > 2_000_000
    assert time.process_time() - started < 5


def test_message_larger_than_a_template_may_make_still_passes(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x" * (6 << 20)}]
    assert len(rendered(tmp_path, REAL["chatml"], messages)) > 6 << 20
