"""Tiny bundles and saved states spoiled at random, and used as a program uses them, in a process of its own.

Each case is made from its number alone. The process says when a case begins and how it ended, so that the one that
watches it knows which case crashed, hung or raised what nobody expects. Run as a program: SOURCE FOLDER FIRST COUNT.
"""

from __future__ import annotations

import copy
import json
import math
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tiny_files import sign

from edgellm_runtime import RuntimeFault, load
from edgellm_runtime.bundle import Bundle
from edgellm_runtime.checks.verify import verify
from edgellm_runtime.state import State

MEMORY, SECONDS = 6 << 30, 60
STATE = "saved-state"
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-308,
    math.inf, math.nan, "", "a", "\0", "\ud800", "9" * 5000, "batch", "capacity", "float64", "bfloat16", "append",
    "replace", "ring", "static", "onnx", "cuda", "tensorrt", "model.onnx", "../x", "x" * 70_000, [], {}, [[]],
    [0] * 5000, {"a": {}}, {"type": "Replace", "pattern": {"String": ""}, "content": "x"}, {"Regex": "(a+)+$"},
]  # fmt: skip
SNIPPETS = [
    "{{ messages }}", "{{ 'a' * 99999999 }}", "{% for i in range(99999) %}", "{% endfor %}", "{% set x = [x, x] %}",
    "{{ x|batch(99999999) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__ }}",
    "{{ 10**9999999 }}", "{{ x|tojson(indent=99999999) }}", "{{ [1]|sum(start=x) }}", "{{ raise_exception(x) }}",
    "{{ strftime_now('%999999999d') }}", "{{ messages|map('center', 99999999)|list }}", "{{ loop.cycle(*messages) }}",
    "{% generation %}", "{% if x %}", "{% endif %}", "{{ '%s' % messages }}", "{{ '{0.a}'.format(x) }}",
    "{{ namespace(a=messages) }}", "{{ messages|groupby('x') }}", "{#", "{{", "{{ strftime_now(messages) }}",
    "{{ bos_token + eos_token }}", "{% set ns = namespace() %}", "{{ messages[::-1]|string }}",
]  # fmt: skip


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes lost, repeated or moved."""
    made = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at, other = draw.randrange(len(made) + 1), draw.randrange(len(made) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            del made[at:]
        elif kind == 1:
            del made[min(at, other) : min(at, other) + draw.choice([1, 2, 8, 100])]
        elif kind == 2:
            made[at:at] = made[other : other + draw.choice([1, 4, 64])]
        elif kind == 3:
            made[at:at] = draw.choice([b"\xff" * 10, b"\0" * 8, b"\x80\x80\x00", b"[" * 900, b"{", b'"', b"9" * 5000])
        elif made and at < len(made):
            made[at] ^= 1 << draw.randrange(8)
    return bytes(made)


def changed_json(draw: random.Random, value: Any) -> Any:
    """One place becomes something else, is lost, or comes twice."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = draw.randrange(12)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[draw.choice(["", "x", "type", *value])] = value.pop(key)
        elif kind == 2 and isinstance(value, list):
            value += value[:1] * draw.choice([1, 50])
        elif kind == 3:
            value[key] = copy.deepcopy(draw.choice(list(value.values()) if isinstance(value, dict) else value))
        else:
            value[key] = changed_json(draw, value[key])
        return value
    if type(value) is int and draw.random() < 0.5:
        return draw.choice([value + 1, value - 1, -value, value * 2, value << 20, value << 40])
    return copy.deepcopy(draw.choice(VALUES))


def as_json(draw: random.Random, data: bytes) -> bytes:
    value = json.loads(data)
    for _ in range(draw.choice([1, 1, 1, 3])):
        value = changed_json(draw, value)
    return json.dumps(value).encode()


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
    import io

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


SPOILERS: dict[str, list[Callable[[random.Random, bytes], bytes]]] = {
    "manifest.json": [as_json, as_json, changed_bytes],
    "model.onnx": [as_graph, as_graph, as_graph, changed_bytes],
    "tokenizer.json": [as_json, as_json, as_json, changed_bytes],
    "chat_template.jinja": [as_template, as_template, changed_bytes],
    "goldens.json": [as_json, as_json, changed_bytes],
    "model.onnx.data": [as_weights],
    STATE: [as_archive, changed_bytes],
}


def spoiled(source: Path, folder: Path, number: int) -> Path:
    """Case ``number``: a copy of one of the bundles in ``source`` with one file, sometimes two, of another content."""
    draw = random.Random(number)
    original = draw.choice(sorted(source.iterdir()))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    for name in draw.sample([n for n in SPOILERS if (folder / n).is_file()], draw.choice([1, 1, 1, 2])):
        data = draw.choice(SPOILERS[name])(draw, (folder / name).read_bytes())
        (folder / name).write_bytes(data)
        if name not in ("manifest.json", STATE) and draw.random() < 0.95:
            with suppress(ValueError, TypeError, KeyError, AttributeError):  # the manifest may be none by now
                sign(folder, name)
    return folder


def use(folder: Path) -> None:
    """Each part of a bundle, as a program uses it; the first fault does not hide the others."""

    def step(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except RuntimeFault as fault:
            said = str(fault).strip()
        if not 0 < len(said) < 2000:
            raise AssertionError(f"a fault of {len(said)} characters: {said[:200]}")
        return None

    opened = step(lambda: Bundle(folder))
    if opened is None:
        return
    json.dumps(opened.manifest.to_json())
    model = step(lambda: load(folder, threads=1, checksums=False))
    if model is None:
        return
    step(lambda: verify(opened, model.session))
    step(lambda: State.load(folder / STATE, opened.manifest.signature.state))
    step(lambda: model.generate([1, 2], max_new_tokens=3))
    if step(lambda: model.tokenizer) is not None:
        step(lambda: model.tokenizer.decode(model.tokenizer.encode("Hello <|im_end|> world")))
        step(lambda: model.tokenizer.decode(range(min(300, model.session.vocab_size))))
        step(lambda: model.generate("Hello", max_new_tokens=3).text)
        if model.has_chat_template:
            messages = [{"role": "user", "content": "Hello <|im_end|>"}]
            step(lambda: model.chat(messages, max_new_tokens=2).text)


def child(source: Path, folder: Path, first: int, count: int) -> None:
    """Run cases; one line before each, one after."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    for number in range(first, first + count):
        print("begin", number, flush=True)
        try:
            use(spoiled(source, folder, number))
            said = "ok"
        except BaseException as error:
            said = json.dumps(f"{type(error).__name__}: {error}"[:300] + "\n" + traceback.format_exc()[-3000:])
        print("end", number, said, flush=True)


@dataclass(frozen=True)
class Failure:
    """A case that did something else than work or be refused."""

    number: int
    what: str


def run_cases(source: Path, scratch: Path, first: int, count: int) -> Iterator[Failure]:
    """Cases in as few processes as it takes: a new one after each crash and each case that takes too long."""
    number, end = first, first + count
    while number < end:
        process = subprocess.Popen(
            [sys.executable, __file__, str(source), str(scratch / "case"), str(number), str(end - number)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "2"},
        )  # fmt: skip
        lines: queue.Queue[str] = queue.Queue()
        errors: list[str] = []
        assert process.stdout is not None and process.stderr is not None
        readers = [
            threading.Thread(target=_pass_on, args=(process.stdout, lines.put), daemon=True),
            threading.Thread(target=_pass_on, args=(process.stderr, errors.append), daemon=True),
        ]
        for reader in readers:
            reader.start()
        while number < end:
            try:
                line = lines.get(timeout=SECONDS)
            except queue.Empty:
                yield Failure(number, f"took more than {SECONDS} s")
                number += 1
                break
            kind, _, rest = line.partition(" ")
            if not kind:
                yield Failure(number, f"ended its process ({process.wait()}): {''.join(errors)[-2000:]}")
                number += 1
                break
            if kind == "end":
                said = rest.partition(" ")[2].strip()
                if said != "ok":
                    yield Failure(number, json.loads(said))
                number += 1
        process.kill()
        for reader in readers:
            reader.join()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def _pass_on(stream: Any, put: Callable[[str], Any]) -> None:
    for line in stream:
        put(line)
    put("")


def make_source(folder: Path) -> Path:
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
    return folder


if __name__ == "__main__":
    child(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
