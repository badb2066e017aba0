"""What was published as a weakness of other loaders, tried on bundles; docs/security.md has the table."""

from __future__ import annotations

import ctypes
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from generation_fakes import byte_level
from onnx import TensorProto, helper
from test_hostile_template import rendered
from tiny_bundles import attention_bundle, copied, edit_manifest, sign

from edgellm_runtime import BundleError, RuntimeFault, StateError, load
from edgellm_runtime.bundle import TokenizerInfo
from edgellm_runtime.state import State
from edgellm_runtime.text.tokenizer import Tokenizer

SECRET = np.arange(64, dtype=np.float32).tobytes()


class Executed(Exception):
    """Somebody else's code has run."""


def executed(*_: Any, **__: Any) -> Any:
    raise Executed


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/secret").write_bytes(SECRET)
    return copied(attention_bundle(), tmp_path)


def reading(bundle: Path, location: str, **entries: str) -> None:
    """A graph, vouched for by the manifest, that takes a constant from another file."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    hidden = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[64], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        hidden.external_data.add(key=key, value=value)
    model.graph.node.append(helper.make_node("Constant", [], ["leak"], value=hidden))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    sign(bundle, "model.onnx")


def listed(bundle: Path, name: str, **info: Any) -> None:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files=files | {name: {"bytes": len(SECRET), "sha256": "0" * 64, **info}})


def a_parent_folder(bundle: Path) -> None:
    reading(bundle, "../secret")


def a_parent_folder_behind_another(bundle: Path) -> None:
    (bundle / "junk").mkdir()
    reading(bundle, "junk/../../secret")


def a_linked_folder(bundle: Path) -> None:
    (bundle / "sub").symlink_to(bundle.parent / "elsewhere")
    reading(bundle, "sub/secret")
    listed(bundle, "sub/secret")


def a_linked_file(bundle: Path) -> None:
    (bundle / "w.bin").symlink_to(bundle.parent / "secret")
    reading(bundle, "w.bin")
    listed(bundle, "w.bin")


def a_hard_link(bundle: Path) -> None:
    os.link(bundle.parent / "secret", bundle / "w.bin")  # whose sum the bundle's author does not know
    reading(bundle, "w.bin")
    listed(bundle, "w.bin")


def a_hard_link_that_is_not_listed(bundle: Path) -> None:
    os.link(bundle.parent / "secret", bundle / "w.bin")
    reading(bundle, "w.bin")


def attributes_beside_the_place(bundle: Path) -> None:
    (bundle / "w.bin").write_bytes(SECRET)
    reading(bundle, "w.bin", __class__="int", basepath="/")


def lengths_that_the_file_does_not_have(bundle: Path) -> None:
    reading(bundle, "model.onnx.data", offset=str(10**17))


EXTERNAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "CVE-2022-25882 onnx ../": (a_parent_folder, "which the manifest does not list"),
    "CVE-2024-27318 onnx a/../..": (a_parent_folder_behind_another, "which the manifest does not list"),
    "CVE-2026-27489 onnx linked folder": (a_linked_folder, "is not a plain name inside"),
    "CVE-2026-34447 onnx linked file": (a_linked_file, "a symbolic link to"),
    "CVE-2026-34446 onnx hard link": (a_hard_link, "checksum"),
    "CVE-2026-34446 onnx hard link, unlisted": (a_hard_link_that_is_not_listed, "which the manifest does not list"),
    "CVE-2026-34445 onnx attributes injected": (attributes_beside_the_place, "names its file with"),
    "onnx offset beyond the file": (lengths_that_the_file_does_not_have, "model.onnx"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_graph_reads_nothing_but_the_weights_of_its_bundle(bundle: Path, name: str) -> None:
    make, said = EXTERNAL[name]
    make(bundle)
    with pytest.raises(BundleError, match=said):
        load(bundle, threads=1)


LIBRARY = "/tmp/evil.so"
CONFIGS: dict[str, dict[str, Any]] = {
    "onnxruntime-genai custom_ops_library": {"model": {"session_options": {"custom_ops_library": LIBRARY}}},
    "onnxruntime-genai provider library": {"model": {"provider_options": [{"evil": {"library_path": LIBRARY}}]}},
    "OpenVINO extension": {"extensions": [LIBRARY], "properties": {"EXTENSIONS": LIBRARY}},
    "TensorRT plugins": {"plugins_to_serialize": [LIBRARY], "engine_config": {"plugin_libraries": [LIBRARY]}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_no_library_that_a_file_names_is_loaded(bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for beside in ("genai_config.json", "openvino_config.json", "config.json"):
        (bundle / beside).write_text(json.dumps(CONFIGS[name]))
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit_manifest(bundle, **CONFIGS[name], provenance={**manifest["provenance"], **CONFIGS[name]})
    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", executed)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", executed, raising=False)
    opened = ctypes.CDLL.__init__

    def checked(self: Any, path: Any, *rest: Any, **more: Any) -> None:
        if path is not None and "evil" in str(path):
            raise Executed
        opened(self, path, *rest, **more)

    monkeypatch.setattr(ctypes.CDLL, "__init__", checked)
    assert load(bundle, threads=1).generate([1, 2], max_new_tokens=2).tokens


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("EPContext", {"ep_cache_context": "../secret", "embed_mode": 0, "main_context": 1}),
        ("PyOp", {"module": "os", "class_name": "system"}),
        ("TRT_Plugin", {"plugin_library": LIBRARY}),
    ],
    ids=["onnxruntime EPContext beside the graph", "onnxruntime PyOp", "TensorRT plugin op"],
)
def test_an_operator_that_would_load_code_is_refused_by_name(
    bundle: Path, kind: str, attributes: dict[str, Any]
) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model.graph.node.append(helper.make_node(kind, [], ["leak"], domain="com.microsoft", **attributes))
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    sign(bundle, "model.onnx")
    with pytest.raises(BundleError, match=kind):
        load(bundle, threads=1)


ESCAPES = {
    "CVE-2024-34359 llama-cpp-python": "{% for x in ().__class__.__base__.__subclasses__() %}"
    "{% if 'warning' in x.__name__ %}{{ x()._module.__builtins__['__import__']('os').system('true') }}{% endif %}"
    "{% endfor %}",
    "CVE-2026-5760 SGLang": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "CVE-2016-10745 Jinja str.format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "CVE-2019-10906 Jinja str.format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
    "CVE-2024-56326 Jinja stored format": "{% set f = '{0.__class__.__init__}'.format %}{{ f(messages) }}",
    "CVE-2025-27516 Jinja attr filter": "{{ ('{0.__class__.__init__}'|attr('format'))(messages) }}",
    "namespaces": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context }}",
    "lookups by name": "{{ messages|map(attribute='__class__.__mro__')|list }}",
    "functions": "{{ raise_exception.__globals__['os'] }}{{ strftime_now.__globals__ }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_reaches_no_object_of_pythons(tmp_path: Path, name: str) -> None:
    try:
        said = rendered(tmp_path, ESCAPES[name])
    except RuntimeFault:
        return
    for word in ("<class", "<function", "built-in", "0x", "module", "__globals__"):
        assert word not in said


def test_a_template_that_never_ends_is_refused_cve_2025_61620_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm_runtime.text.template_limits._SECONDS", 1.0)
    endless = "{% for a in range(100000) %}{% for b in range(100000) %}{{ a * b }}{% endfor %}{% endfor %}"
    with pytest.raises(BundleError):
        rendered(tmp_path, endless)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+$", "(?=(a+)+$)b"],
    ids=["CVE-2024-12720 transformers repeats", "CVE-2025-1194 transformers alternatives", "lookahead"],
)  # fmt: skip
def test_a_tokenizers_expression_that_blows_up_is_refused_before_it_meets_a_text(tmp_path: Path, pattern: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    library = byte_level()
    library.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="a text may keep busy for hours"):
        Tokenizer(tmp_path / "tokenizer.json", TokenizerInfo(None, (2,), False, False), vocab_size=1000)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return executed, ()


def pickled() -> bytes:
    made = io.BytesIO()
    np.save(made, np.array([Payload()], dtype=object), allow_pickle=True)
    return made.getvalue()


def array(shape: tuple[int, ...], nbytes: int) -> bytes:
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return made.getvalue() + bytes(nbytes)


KEYS = "layers.0.k.npy"
STATES: dict[str, dict[str, bytes]] = {
    "CVE-2019-6446 numpy pickled array": {KEYS: pickled()},
    "zip bomb": {KEYS: array((1 << 24,), 1 << 26)},
    "array larger than its bytes": {KEYS: array((1 << 40,), 4)},
    "Zip Slip": {"../../escaped.npy": array((1,), 4)},
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_saved_state_is_no_code_and_no_bomb(bundle: Path, tmp_path: Path, name: str) -> None:
    session = load(bundle, threads=1).session
    state = session.new_state()
    session.step(np.array([[1, 2, 3]]), state)
    state.save(tmp_path / "state")
    with zipfile.ZipFile(tmp_path / "state") as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "spoiled", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in {**members, **STATES[name]}.items():
            archive.writestr(member, content)
    State.load(tmp_path / "state", session.signature.state)
    with pytest.raises(StateError):
        State.load(tmp_path / "spoiled", session.signature.state)
    assert not list(tmp_path.parent.glob("escaped*"))
