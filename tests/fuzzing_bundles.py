"""Tiny bundles and saved states spoiled at random, and used as a program uses them."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzzing_files import Spoiler, as_json, changed_bytes

from edgellm_runtime import load
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify, verify_quickly
from edgellm_runtime.state import State

STATE = "saved-state"
SNIPPETS = [
    "{{ messages }}", "{{ 'a' * 99999999 }}", "{% for i in range(99999) %}", "{% endfor %}", "{% set x = [x, x] %}",
    "{{ x|batch(99999999) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__ }}",
    "{{ 10**9999999 }}", "{{ x|tojson(indent=99999999) }}", "{{ [1]|sum(start=x) }}", "{{ raise_exception(x) }}",
    "{{ strftime_now('%999999999d') }}", "{{ messages|map('center', 99999999)|list }}", "{{ loop.cycle(*messages) }}",
    "{% generation %}", "{% if x %}", "{% endif %}", "{{ '%s' % messages }}", "{{ '{0.a}'.format(x) }}",
    "{{ namespace(a=messages) }}", "{{ messages|groupby('x') }}", "{#", "{{", "{{ strftime_now(messages) }}",
    "{{ bos_token + eos_token }}", "{% set ns = namespace() %}", "{{ messages[::-1]|string }}",
]  # fmt: skip


def as_template(draw: random.Random, data: bytes) -> bytes:
    text = data.decode()
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(SNIPPETS) + text[at:]
    return text.encode()


def as_graph(draw: random.Random, data: bytes) -> bytes:
    """Attributes, operators, names and sizes of a graph become others, such as the runtime's lists let through."""
    import onnx

    from edgellm_runtime.graphs.operators import TARGETS

    model = onnx.ModelProto.FromString(data)
    for _ in range(draw.choice([1, 1, 2, 4])):
        nodes = model.graph.node
        node, kind = draw.choice(nodes), draw.randrange(9)
        if kind == 0:
            node.domain, node.op_type = draw.choice(sorted(TARGETS["cpu"]))
        elif kind == 1 and node.attribute:
            attribute = draw.choice(node.attribute)
            attribute.i = draw.choice([-1, 0, 1, 2, 7, -8, 64, 65536, 2**24, 2**31, -(2**31), 2**63 - 1])
        elif kind == 2 and node.input:
            node.input[draw.randrange(len(node.input))] = draw.choice(
                [o for n in nodes for o in n.output] + ["tokens", ""]
            )
        elif kind == 3 and node.input:
            del node.input[draw.randrange(len(node.input))]
        elif kind == 4 and model.graph.initializer:
            tensor = draw.choice(model.graph.initializer)
            if tensor.dims:
                tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice([0, 1, 2, -1, 2**20, 2**31, 2**40])
        elif kind == 5 and model.graph.initializer:
            tensor = draw.choice(model.graph.initializer)
            if tensor.raw_data:
                array = np.frombuffer(tensor.raw_data, dtype=np.uint8).copy()
                array[draw.randrange(len(array))] ^= 1 << draw.randrange(8)
                tensor.raw_data = array.tobytes()
        elif kind == 6:
            name = draw.choice(
                ["axis", "block_size", "bits", "num_heads", "kv_num_heads", "K", "N", "batch_dims", "to"]
            )
            node.attribute.append(onnx.helper.make_attribute(name, draw.choice([-1, 0, 1, 2, 3, 16, 64, 1000])))
        elif kind == 7 and node.attribute:
            del node.attribute[draw.randrange(len(node.attribute))]
        else:
            at = draw.randrange(len(nodes))
            nodes.insert(at, copy.deepcopy(node))
    return model.SerializeToString()


def as_weights(draw: random.Random, data: bytes) -> bytes:
    array = np.frombuffer(data[: len(data) // 4 * 4], dtype=np.float32).copy()
    array[:: draw.choice([1, 7, 100])] = draw.choice([0, np.nan, np.inf, 1e38, -1e38, 1e-40])
    return array.tobytes() + data[len(data) // 4 * 4 :]


def as_archive(draw: random.Random, data: bytes) -> bytes:
    """Members of a saved state lost, changed, or packed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(list(members))
    kind = draw.randrange(4)
    if kind == 0:
        del members[name]
    elif kind == 1:
        members[name] = members[draw.choice(list(members))]
    else:
        members[name] = changed_bytes(draw, members[name])
    made = io.BytesIO()
    with zipfile.ZipFile(
        made, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    ) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


SPOILERS: dict[str, list[Spoiler]] = {
    "manifest.json": [as_json, as_json, changed_bytes],
    "model.onnx": [as_graph, as_graph, as_graph, changed_bytes],
    "tokenizer.json": [as_json, as_json, as_json, changed_bytes],
    "chat_template.jinja": [as_template, as_template, changed_bytes],
    "goldens.json": [as_json, as_json, changed_bytes],
    "model.onnx.data": [as_weights],
    STATE: [as_archive, changed_bytes],
}


def use_bundle(folder: Path, step: Callable[[Callable[[], Any]], Any], *, whole: bool) -> None:
    """Each part of a bundle; ``whole``: every check of it, too, and else the quick ones."""
    opened = step(lambda: Bundle(folder))
    if opened is None:
        return
    json.dumps(opened.manifest.to_json())
    model = step(lambda: load(folder, threads=1, checksums=False))
    if model is None:
        return
    step(lambda: (verify if whole else verify_quickly)(opened, model.session))
    step(lambda: State.load(folder / STATE, opened.manifest.signature.state))
    step(lambda: model.generate([1, 2], max_new_tokens=3))
    if step(lambda: model.tokenizer) is not None:
        step(lambda: model.tokenizer.decode(model.tokenizer.encode("Hello <|im_end|> world")))
        step(lambda: model.tokenizer.decode(range(min(300, model.session.vocab_size))))
        step(lambda: model.generate("Hello", max_new_tokens=3).text)
        if model.has_chat_template:
            messages = [{"role": "user", "content": "Hello <|im_end|>"}]
            step(lambda: model.chat(messages, max_new_tokens=2).text)


def make_bundles(folder: Path) -> None:
    """The bundles that are spoiled, each with a state of its own."""
    from tiny_bundles import attention_bundle, recurrent_bundle

    for name, bundle in (
        ("attention", attention_bundle()), ("plain", attention_bundle("onnx")), ("recurrent", recurrent_bundle())
    ):  # fmt: skip
        shutil.copytree(bundle, folder / name)
        session = load(bundle, threads=1).session
        state = session.new_state()
        session.step(np.array([[1, 2, 3]]), state)
        state.save(folder / name / STATE)
