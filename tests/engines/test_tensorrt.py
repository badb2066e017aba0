"""Engines: what is built of every family in every precision, options, bundles, and the names asked of the libraries."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import engine_rows
import numpy as np
import pytest
import torch
from engine_rows import CAPABILITY, PRECISIONS
from families import CONTEXT, EVERY, FAMILIES, VOCAB, make
from source_models import SOURCE_FAMILIES, t5_model
from tiny_bundles import copied

from edgellm.cli import run
from edgellm.models.layers import GatedDeltaMixer, RecurrentMixer, SelectiveMixer, SelfAttention
from edgellm.models.recurrent_gemma import GatedRecurrence
from edgellm.models.rwkv import TimeMixing
from edgellm.models.rwkv7 import TimeMixing7
from edgellm_exporters.engines import tensorrt
from edgellm_exporters.engines.fixed_sizes import write_roles
from edgellm_exporters.engines.lint import TRAPS
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.engines.rebuild import build_engines
from edgellm_exporters.errors import EngineError, ExportError
from edgellm_exporters.export import ExportOptions, export
from edgellm_exporters.graph.targets import find_target
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.quantize.methods import ENGINE_METHODS
from edgellm_exporters.quantize.quantized_model import quantized_model
from edgellm_runtime import load, open_session
from edgellm_runtime.backends.engine_fit import choosers_here
from edgellm_runtime.bundle import Bundle

pytest.importorskip("tensorrt_rtx", reason="pip install 'edgellm[tensorrt]' builds engines without a GPU")

# Against PyTorch with the same weights. Where inputs are rounded too, 16-bit activations fall on the other side of a
# code's edge now and then, which is no error of the graph: the float32 graphs below are held to equality.
BOUNDS = {
    "float16": (0.9999, 0.99), "bfloat16": (0.99999, 1.0), "int8": (0.9999, 0.99), "int4": (0.9999, 0.97),
    "w8a8": (0.997, 0.85), "fp8": (0.99, 0.85),
}  # fmt: skip
# Of these a prompt is a loop over its tokens.
LOOPS = (RecurrentMixer, SelectiveMixer, GatedDeltaMixer, GatedRecurrence, TimeMixing, TimeMixing7)
# What the library does not build: its own words.
REFUSED = {("Bergamot with a shortlist", "int8"): "cannot build an engine of it: .*MyelinCheckException"}
FEW = {"T5": ("float16",), "BART": ("int4",), "Bergamot with a shortlist": ("int8",)}
FURTHER = bool(os.environ.get("FURTHER_FAMILIES"))  # make test-families
SOURCE_ROWS = [
    (family, precision) for family in SOURCE_FAMILIES for precision in PRECISIONS
    if FURTHER or precision in FEW.get(family, ())
]  # fmt: skip
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_engines_are_built_of_graphs_that_compute_what_pytorch_computes(
    family: str, precision: str, tmp_path: Path
) -> None:
    row = engine_rows.row(family, precision, tmp_path)
    least_cosine, least_top1 = BOUNDS[precision]
    assert row.cosine >= least_cosine
    assert row.report.top1 >= least_top1
    model = make(family)
    kinds = [spec.update for spec in model.state_specs()]
    recurrent = any(isinstance(part, LOOPS) for part in model.modules())
    capped = any(isinstance(part, SelfAttention) and part.softcap for part in model.modules())
    for role, layers in row.layers.items():
        assert row.engines[role] > 0
        assert layers.get("KV_CACHE_UPDATE", 0) == kinds.count("append")
        loops = role == "prefill" and recurrent
        assert bool(layers.get("RECURRENCE")) == loops
        attentions = kinds.count("append") // 2 + kinds.count("ring") // 2
        written_out = loops or capped  # no engine has both a loop and an attention, and none caps scores
        assert layers.get("ATTENTION_INPUT", 0) == (0 if written_out else attentions)
        assert bool(layers.get("DEQUANTIZE")) == (precision in ENGINE_METHODS)


@pytest.mark.parametrize(("family", "precision"), SOURCE_ROWS)
def test_engines_that_read_sources_are_built_of_graphs_that_compute_what_pytorch_computes(
    family: str, precision: str, tmp_path: Path
) -> None:
    if (family, precision) in REFUSED:
        with pytest.raises(EngineError, match=REFUSED[family, precision]):
            engine_rows.row(family, precision, tmp_path)
        return
    row = engine_rows.row(family, precision, tmp_path)
    least_cosine, least_top1 = BOUNDS[precision]
    assert row.cosine >= least_cosine
    assert row.report.top1 >= least_top1
    kinds = [spec.update for spec in engine_rows.model_of(family).state_specs()]
    assert row.layers.keys() == {"prefill", "decode", "encode"}
    for role, layers in row.layers.items():
        assert row.engines[role] > 0
        assert layers.get("KV_CACHE_UPDATE", 0) == (0 if role == "encode" else kinds.count("append"))
        assert not (layers.get("RECURRENCE") and layers.get("ATTENTION_INPUT"))
        assert bool(layers.get("DEQUANTIZE")) == (precision in ENGINE_METHODS)


@pytest.mark.parametrize("family", ["mixed", *(["T5", "encoder of recurrences and attention"] if FURTHER else [])])
@pytest.mark.parametrize("method", [m for m in ENGINE_METHODS if m != "none"])
@torch.no_grad()
def test_quantized_graphs_equal_pytorch_with_the_same_numbers(method: str, family: str, tmp_path: Path) -> None:
    """In float32, where nothing else is rounded, the graphs and the reference agree code for code."""
    model = engine_rows.model_of(family)
    graphs, plan = engine_rows.planned_graphs(model, method)
    forms = engine_rows.sizes_for(model).forms("float32")
    write_roles(graphs, find_target("tensorrt"), plan, forms, tmp_path, lambda what, share: None)
    session = engine_rows.session_of(model, tmp_path, "float32")
    window = np.random.default_rng(2).integers(0, VOCAB, 38).tolist()
    sources = [window[:24]] if family in SOURCE_FAMILIES else None
    rounded = quantized_model(model, plan, integer_products=False)
    assert compare(rounded, session, [window], sources=sources).logits < 2e-4
    assert compare(model, session, [window], sources=sources).logits > 2e-3  # the comparison would see it


@torch.no_grad()
def test_a_model_of_plain_pytorch_becomes_engines_too(tmp_path: Path) -> None:
    """Not one of ours: a retention written with einsum, cumulative sums and splits."""
    spec = importlib.util.spec_from_file_location("own_module_model", EXAMPLES / "own_module" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    config = module.RetentionConfig(VOCAB, max_context=CONTEXT, width=64, num_heads=2, num_layers=2)
    model = module.RetentionModel(config).eval()
    engine = EngineOptions(compute_capabilities=(CAPABILITY,), chunk=16)
    options = ExportOptions(target="tensorrt", dtype="float16", engine=engine)
    exported = export(model, tmp_path / "b", options=options)
    assert exported.parity.kl < 1e-5 and exported.parity.top1 == 1.0
    assert len(exported.bundle.manifest.engines) == 2


def test_float32_engines_are_built_where_no_fused_attention_is(tmp_path: Path) -> None:
    engine = EngineOptions(compute_capabilities=(CAPABILITY,), chunk=16)
    exported = export(
        make("decoder"), tmp_path / "b", options=ExportOptions(target="tensorrt", dtype="float32", engine=engine)
    )
    assert exported.parity.logits < 1e-5
    assert {spec.dtype for spec in exported.bundle.manifest.signature.state} == {"float32"}


def test_rows_of_a_ragged_batch_get_what_each_gets_alone(tmp_path: Path) -> None:
    _, _, session = engine_rows.graphs("mixed", "float16", tmp_path)
    tokens = np.random.default_rng(3).integers(0, VOCAB, (3, 21))
    lengths = np.array([21, 4, 17], np.int32)
    together = session.new_state(3)
    first = session.step(tokens, together, lengths=lengths).copy()
    second = session.step(tokens[:, :2], together, lengths=np.array([1, 2, 2], np.int32)).copy()
    for i, length in enumerate(lengths):
        alone = session.new_state(1)
        expected = session.step(tokens[i : i + 1, :length], alone).copy()
        assert np.abs(first[i] - expected[0]).max() < 5e-3 * np.abs(expected).max()
        expected = session.step(tokens[i : i + 1, : [1, 2, 2][i]], alone)
        assert np.abs(second[i] - expected[0]).max() < 5e-3 * np.abs(expected).max()


# --- bundles --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = EngineOptions(compute_capabilities=("8.6", CAPABILITY), max_batch=3, max_context=48, chunk=16)
    options = ExportOptions(target="tensorrt", dtype="float16", engine=engine)
    return export(make("decoder"), tmp_path_factory.mktemp("b") / "b", options=options).bundle.path


def test_a_bundle_holds_graphs_engines_and_their_fingerprints(bundle: Path) -> None:
    opened = Bundle(bundle)
    manifest = opened.manifest
    assert sorted(manifest.files) == sorted([
        "prefill.onnx", "decode.onnx", "model.onnx.data", "prefill.engine", "decode.engine", "goldens.json",
        "choose-1.engine", "choose-64.engine",
    ])  # fmt: skip
    assert (manifest.max_context, manifest.capacity, manifest.graphs["prefill"].time) == (48, 64, 16)
    assert {spec.dtype for spec in manifest.signature.state} == {"float16"}
    prefill, decode = sorted(manifest.engines, key=lambda e: e.role, reverse=True)
    library = tensorrt.find_library()
    assert (prefill.library, prefill.library_version) == (library.name, library.version)
    assert prefill.compute_capabilities == ("8.6", CAPABILITY)
    assert prefill.graph_sha256 == manifest.files["prefill.onnx"].sha256
    assert (prefill.profile["tokens"].min, prefill.profile["tokens"].max) == ((1, 16), (3, 16))
    assert (prefill.profile["logit_positions"].min, prefill.profile["logit_positions"].max) == ((1, 1), (3, 16))
    assert decode.profile["tokens"].max == (3, 1) and "logit_positions" not in decode.profile
    assert decode.profile["past.layers.0.k"].max == (3, 2, 64, 32)
    assert [(c.count, c.engine.profile["logits"].max) for c in manifest.choosers] == [
        (count, (3, 1, VOCAB)) for count in (1, 64)
    ]
    here = {"library": library.name, "version": library.version, "compute_capability": CAPABILITY}
    assert choosers_here(manifest, **here) == ({c.count: c for c in manifest.choosers}, "")
    weights = sum(p.numel() for p in make("decoder").parameters())
    assert manifest.files["model.onnx.data"].bytes < 2.3 * weights  # 16 bits each, for both graphs together


def test_the_bundle_runs_on_the_cpu_and_keeps_to_its_context(bundle: Path) -> None:
    session = open_session(Bundle(bundle), device="cpu", threads=1)
    report = compare(make("decoder"), session, [np.random.default_rng(5).integers(0, VOCAB, 40).tolist()])
    assert report.kl < 1e-4
    state = session.new_state(2, 5)
    session.step(np.zeros((2, 40), np.int64), state)
    assert state.capacity == 64
    with pytest.raises(Exception, match="context of 48"):
        session.step(np.zeros((2, 9), np.int64), state)


def test_build_replaces_the_engines_and_nothing_else(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    bundle = copied(bundle, tmp_path)
    before = Bundle(bundle).manifest
    assert run(["build", str(bundle), "--compute-capability", "12.0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    after = Bundle(bundle).manifest
    assert [e["compute_capabilities"] for e in said["engines"]] == [["12.0"], ["12.0"]]
    assert {e.profile["tokens"].max[0] for e in after.engines} == {3}  # what it was exported with
    engines = after.engine_files
    assert engines == before.engine_files and len(said["choosers"]) == len(after.choosers) == 2
    assert {n: f for n, f in after.files.items() if n not in engines} == {
        n: f for n, f in before.files.items() if n not in engines
    }
    assert after.files["decode.engine"] != before.files["decode.engine"]


def test_a_bundle_that_answers_sources_holds_an_engine_of_its_encoder(tmp_path: Path) -> None:
    engine = EngineOptions(compute_capabilities=(CAPABILITY,), max_batch=3, chunk=8)
    options = ExportOptions(target="tensorrt", dtype="float16", engine=engine, bounds={"top1": 0.0})
    path = export(t5_model(), tmp_path / "b", options=options).bundle.path
    build_engines(path, lambda most: EngineOptions(max_batch=most, compute_capabilities=(CAPABILITY,)))
    manifest = Bundle(path).manifest
    engines = {e.role: e for e in manifest.engines}
    assert engines.keys() == {"prefill", "decode", "encode"}
    assert engines["encode"].graph_sha256 == manifest.files["encoder.onnx"].sha256
    source = engines["encode"].profile["source"]
    assert (source.min, source.opt, source.max) == ((1, 1), (1, 24), (3, 24))
    for role in ("prefill", "decode"):
        keys = engines[role].profile["past.layers.0.cross_k"]
        assert (keys.min, keys.max) == ((1, 2, 1, 16), (3, 2, 24, 16))
    answers = load(path, device="cpu", threads=1).generate([[5, 6, 7], [9]], max_new_tokens=3)
    assert [len(answer.tokens) for answer in answers] == [3, 3]


def test_building_needs_neither_pytorch_nor_onnx(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from edgellm.cli import run; "
        "assert run(['build', sys.argv[1], '--compute-capability', '8.9', '--json']) == 0; "
        "assert not {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime'} & sys.modules.keys()"
    )
    bundle = copied(bundle, tmp_path)
    done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle / "manifest.json").read_bytes()
    monkeypatch.setattr(tensorrt, "check_parsed", lambda *_: (_ for _ in ()).throw(EngineError("read back otherwise")))
    with pytest.raises(EngineError, match="read back otherwise"):
        build_engines(bundle, lambda most: EngineOptions(compute_capabilities=(CAPABILITY,)))
    assert (bundle / "manifest.json").read_bytes() == before
    Bundle(bundle)
    assert len(list(bundle.parent.iterdir())) == 1


def test_an_export_without_engines_is_whole_and_says_how_to_build_them(tmp_path: Path) -> None:
    options = ExportOptions(
        target="tensorrt", dtype="bfloat16", engine=EngineOptions(build=False, chunk=16, max_context=48)
    )
    exported = export(make("gru alone"), tmp_path / "b", options=options)
    assert not exported.bundle.manifest.engines
    assert exported.parity.kl < 1e-3
    with pytest.raises(Exception, match="computes in bfloat16, which ONNX Runtime"):
        open_session(exported.bundle, device="cpu")


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float64"}, "no dtype 'float64'; it has float16, bfloat16, float32"),
        ({"quantize": "keep"}, "no quantization 'keep'; it has none, int8, w8a8, int4, fp8"),
        ({"quantize": "4:32:asymmetric"}, "no quantization '4:32:asymmetric'"),
        ({"kv_cache": "int8"}, "keeps keys and values in float32, not 'int8'"),
        ({"target": "cpu", "dtype": "float32", "engine": EngineOptions()}, "target cpu has no engines"),
        ({"target": "cpu", "dtype": "float32", "quantize": "fp8"}, "unknown quantization 'fp8'"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(options: dict[str, object], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        ExportOptions(**{"target": "tensorrt", "dtype": "float16", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "quantize", "says"),
    [
        ({"compute_capabilities": ("sm86",)}, "none", "compute capability 'sm86'; write it as NVIDIA does"),
        ({"compute_capabilities": ("8.6", "")}, "none", "compute capability ''"),
        (
            {"compute_capabilities": ("9.0",)},
            "none",
            "builds no engines for compute capability 9.0 here; it builds for",
        ),
        ({"compute_capabilities": ("8.6",)}, "fp8", "fp8 needs compute capability 8.9"),
        ({"compute_capabilities": ("8.9",), "max_context": 2 * CONTEXT}, "none", "max_context is 128, but the model"),
    ],
)
def test_engines_that_cannot_be_are_refused_before_any_work(
    engine: dict[str, object], quantize: str, says: str, tmp_path: Path
) -> None:
    options = ExportOptions(
        target="tensorrt", dtype="float16", quantize=quantize, engine=EngineOptions(**engine),  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(ExportError, match=says):
        export(make("decoder"), tmp_path / "b", options=options)
    assert not list(tmp_path.iterdir())


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(ExportError, match="max_batch is 0; it must be at least 1"):
        EngineOptions(max_batch=0)


def test_without_a_gpu_and_a_capability_the_choice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "current_compute_capability", lambda: None)
    with pytest.raises(
        EngineError, match=r"no GPU here .* --compute-capability with some of 7\.5, 8\.0, .* --no-engine"
    ):
        tensorrt.check_engine_options(EngineOptions())


def test_without_a_library_both_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "LIBRARIES", ("tensorrt_of_nobody",))
    with pytest.raises(EngineError, match=r"pip install tensorrt-rtx cuda-bindings, or .*--no-engine"):
        tensorrt.check_engine_options(EngineOptions(compute_capabilities=("8.6",)))
    assert tensorrt.check_engine_options(EngineOptions(build=False)) is None


def test_build_refuses_a_bundle_without_graphs_for_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(make("gru alone"), tmp_path / "b")
    assert run(["build", str(tmp_path / "b")]) == 1
    assert "is for target cpu, which has no engines; export the model with --target tensorrt" in capsys.readouterr().err


def test_the_librarys_own_words_are_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"g\.onnx: tensorrt_rtx .* cannot parse it: \S"):
        tensorrt.build_engine(
            tensorrt.find_library(), tmp_path / "g.onnx", tmp_path / "e", facts=engine_rows.Facts({}, {}, 0), time=1,
            options=EngineOptions(), capabilities=[CAPABILITY],
        )  # fmt: skip


# --- docs/tensorrt.md -----------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text(encoding="utf-8")


def _table(header: str) -> list[list[str]]:
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (lines[0], *lines[2:])]


def test_the_page_has_every_row_and_every_precision_that_is_built() -> None:
    head, *rows = _table("| model |")
    assert head == ["model", *PRECISIONS]
    assert rows == [
        [family, *("refused" if (family, precision) in REFUSED else "built" for precision in PRECISIONS)]
        for family in (*EVERY, *SOURCE_FAMILIES)
    ]  # fmt: skip


def test_the_page_has_the_lints_table() -> None:
    _, *rows = _table("| form |")
    assert rows == [[trap.name, trap.what, trap.instead] for trap in TRAPS]


# --- names ----------------------------------------------------------------------------------------------------------


def test_every_name_that_is_asked_of_the_library_is_there() -> None:
    library = tensorrt.find_library().module
    for owner, names in (*tensorrt.API.items(), *tensorrt.RTX_API.items()):
        holder = getattr(library, owner) if owner else library
        assert not [name for name in names if not hasattr(holder, name)], owner


def test_every_name_is_in_tensorrts_documentation_and_none_was_removed_in_11() -> None:
    data = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_api.json").read_text())
    for owner, names in tensorrt.API.items():
        assert set(names) == set(data["names"][owner]), owner
        assert not {f"{owner}.{name}" for name in names} & set(data["removed"])
    assert {s for names in data["names"].values() for s in names.values()} <= set(data["sources"])
