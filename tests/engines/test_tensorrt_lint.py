"""Every row of the lint's table: the form is refused by name, and the installed library does what the row says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from engine_rows import CAPABILITY

from edgellm_exporters.engines.lint import TRAPS, lint
from edgellm_exporters.errors import LoweringError

trt = pytest.importorskip("tensorrt_rtx", reason="pip install '.[tensorrt]' builds engines without a GPU")

HALF = np.float16
WEIGHT = (np.arange(128) % 7).reshape(64, 2)
SMALL = np.full((1, 4, 4), 0.1, HALF)


def attend(node: str, more: str = "") -> str:
    return (
        "g (float16[B,4,1,16] q, float16[B,2,32,16] k, float16[B,2,32,16] v, float16[B,1,1,32] m"
        f"{more}) => (float16[B,4,1,16] y) {{ y = {node} }}"
    )


def scatter(attributes: str, dtype: str = "float16", past: str = "B,2,32,16", new: str = "B,2,1,16") -> str:
    return (
        f"g ({dtype}[{past}] past, {dtype}[{new}] new, int64[B] at) => ({dtype}[{past}] present) "
        f"{{ present = TensorScatter <{attributes}> (past, new, at) }}"
    )


def product(attributes: str, zeros: str = "") -> str:
    return (
        "g (float16[B,64] x) => (float16[B,2] y) "
        f"{{ d = DequantizeLinear <{attributes}> (w, s{zeros}) y = MatMul (x, d) }}"
    )


BESIDE_A_LOOP = (
    "g (float16[B,4,16,16] q, float16[B,2,32,16] k, float16[B,2,32,16] v, float16[B,1,16,32] m, float16[B,16] h) "
    "=> (float16[B,16,64] z, float16[B,16] h2) { y = Attention (q, k, v, m) t = Transpose <perm=[2,0,1,3]> (y) "
    "shp = Constant <value = int64[3] {0,0,-1}> () x = Reshape (t, shp) sl = Constant <value=int64[2] {16,48}> () "
    "a, b = Split <axis: int = 2> (x, sl) h2, o = Scan <num_scan_inputs: int = 1, body = f (float16[B,16] s, "
    "float16[B,16] i) => (float16[B,16] n, float16[B,16] j) { n = Add (s, i) j = Identity (n) }> (h, a) "
    "c = Concat <axis: int = 2> (o, b) z = Transpose <perm=[1,0,2]> (c) }"
)
ONES = {"w": WEIGHT.astype(np.int8), "s": np.ones(2, HALF)}

GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": (attend("Attention (q, k, v, m)"), {}),
    "cache": (scatter('axis: int = 2, mode = "linear"'), {}),
    "int8": (product("axis: int = 1"), ONES),
    "int4": (
        product("axis: int = 0, block_size: int = 16"),
        {"w": WEIGHT.astype(ml_dtypes.int4), "s": np.ones((4, 2), HALF)},
    ),
}
# trap -> graph, weights, what the library does: parse or build: it refuses there; a layer's test: it takes the graph
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "causal attention": (attend("Attention <is_causal: int = 1> (q, k, v)"), {}, "upper left"),
    "attention without a mask": (attend("Attention (q, k, v)"), {}, "no mask"),
    "nonpad_kv_seqlen": (attend("Attention (q, k, v, m, , , n)", ", int64[B] n"), {}, "n unused"),
    "attention with its own cache": (
        "g (float16[B,4,1,16] q, float16[B,2,1,16] k, float16[B,2,1,16] v, float16[B,1,1,32] m, float16[B,2,31,16] a, "
        "float16[B,2,31,16] b) => (float16[B,4,1,16] y, float16[B,2,32,16] c, float16[B,2,32,16] d) "
        "{ y, c, d = Attention (q, k, v, m, a, b) }", {}, "parse",
    ),
    "softcap": (attend("Attention <softcap: float = 30.0> (q, k, v, m)"), {}, "parse"),
    "attention beside a loop": (BESIDE_A_LOOP, {}, "build"),
    "cache written along another axis": (
        scatter("axis: int = 1", past="B,32,2,16", new="B,1,2,16"), {}, "parse",
    ),
    "circular cache": (scatter('axis: int = 2, mode = "circular"'), {}, "parse"),
    "cache of 8 bits": (scatter("axis: int = 2", dtype="int8"), {}, "parse"),
    "cache inside the graph": (
        "g (float16[B,2,32,16] past, float16[B,2,1,16] new, int64[B] at) => (float16[B,2,32,16] present) "
        "{ a = Add (past, past) b = TensorScatter <axis: int = 2> (a, new, at) present = Add (b, b) }", {}, "build",
    ),
    "unsigned codes": (
        product("axis: int = 1", ", z"),
        {"w": WEIGHT.astype(np.uint8), "s": np.ones(2, HALF), "z": np.zeros(2, np.uint8)}, "parse",
    ),
    "zero points": (product("axis: int = 1", ", z"), {**ONES, "z": np.array([3, 0], np.int8)}, "parse"),
    "scales of another dtype": (product("axis: int = 1"), {**ONES, "s": np.ones(2, np.float32)}, "parse"),
    "negative scales": (product("axis: int = 1"), {**ONES, "s": np.array([-1, 1], HALF)}, "parse"),
    "integer products": ("g (int8[B,64] x) => (int32[B,2] y) { y = MatMulInteger (x, w) }", {"w": ONES["w"]}, "parse"),
    "foreign operators": (
        "g (float16[B,64] x) => (float16[B,2] y) { y = com.microsoft.MatMulNBits <K: int = 64, N: int = 2, "
        "bits: int = 4, block_size: int = 32> (x, w, s) }",
        {"w": np.zeros((2, 2, 16), np.uint8), "s": np.ones((2, 2), HALF)}, "parse",
    ),
    "values scattered into sums": (
        "g (float16[B,8] x, int64[B,4] at, float16[B,4] new) => (float16[B,8] y) "
        '{ y = ScatterElements <axis: int = 1, reduction = "add"> (x, at, new) }', {}, "parse",
    ),
    "batch-first recurrences": (
        "g (float[B,4,4] x) => (float[B,4,1,4] y) { y = RNN <hidden_size: int = 4, layout: int = 1> (x, w, r) }",
        {"w": SMALL.astype(np.float32), "r": SMALL.astype(np.float32)}, "ONNX Runtime",
    ),
    "recurrences with lengths in 16 bits": (
        "g (float16[4,B,4] x, int32[B] n) => (float16[4,1,B,4] y) { y = RNN <hidden_size: int = 4> (x, w, r, , n) }",
        {"w": SMALL, "r": SMALL}, "parse",
    ),
    "GRU with quantized weights": (
        "g (float16[4,B,2] x) => (float16[4,1,B,2] y) { d = DequantizeLinear (w, s) e = DequantizeLinear (w, s) "
        "y = GRU <hidden_size: int = 2> (x, d, e) }",
        {"w": np.ones((1, 6, 2), np.int8), "s": np.array(0.01, HALF)}, "crash",
    ),
}  # fmt: skip


def model_of(text: str, weights: dict[str, Any]) -> onnx.ModelProto:
    model = onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 24, "com.microsoft": 1]> ' + text)
    for name, array in weights.items():
        model.graph.initializer.append(ir.serde.serialize_tensor(ir.tensor(array, name=name)))
    return model


class Silent(trt.ILogger):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()

    def log(self, severity: Any, message: str) -> None:
        pass


def outcome(file: Path) -> tuple[str, Any]:
    """How far the library gets: parse, build or built; and the network."""
    logger = Silent()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        return "parse", None
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + CAPABILITY.replace(".", "")), 0)
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *[[k if size < 0 else size for size in tensor.shape] for k in (1, 1, 4)])
    config.add_optimization_profile(profile)
    return ("build", None) if builder.build_serialized_network(network, config) is None else ("built", network)


def attention_of(network: Any) -> Any:
    layer = next(
        network.get_layer(i)
        for i in range(network.num_layers)
        if network.get_layer(i).type == trt.LayerType.ATTENTION_INPUT
    )
    layer.__class__ = trt.IAttentionInputLayer
    return layer.attention


def reads(network: Any, name: str) -> bool:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return any(layer.get_input(i).name == name for layer in layers for i in range(layer.num_inputs))


SILENT: dict[str, Callable[[Any], bool]] = {
    "upper left": lambda network: attention_of(network).causal_kind.name == "UPPER_LEFT",
    "no mask": lambda network: attention_of(network).mask is None and not reads(network, "m"),
    "n unused": lambda network: not reads(network, "n"),
}


def test_every_row_of_the_table_has_an_example() -> None:
    assert [trap.name for trap in TRAPS] == list(dict.fromkeys(t.name for t in TRAPS))
    assert {trap.name for trap in TRAPS} == set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_a_form_is_refused_by_name_with_the_form_to_use(name: str) -> None:
    text, weights, _ = BAD[name]
    model = ir.serde.deserialize_model(model_of(text, weights))
    dtype = "float32" if name == "batch-first recurrences" else "float16"
    with pytest.raises(LoweringError) as caught:
        lint(model, dtype, tuple(trap for trap in TRAPS if trap.name == name))
    trap = next(trap for trap in TRAPS if trap.name == name)
    assert name in str(caught.value) and trap.instead in str(caught.value)


@pytest.mark.parametrize("name", GOOD)
def test_the_forms_that_are_used_pass_and_build(name: str, tmp_path: Path) -> None:
    model = model_of(*GOOD[name])
    lint(ir.serde.deserialize_model(model), "float16")
    onnx.save(model, tmp_path / "g.onnx")
    assert outcome(tmp_path / "g.onnx")[0] == "built"


@pytest.mark.parametrize("name", [name for name in BAD if BAD[name][2] != "crash"])
def test_the_library_does_what_the_row_says(name: str, tmp_path: Path) -> None:
    text, weights, expected = BAD[name]
    onnx.save(model_of(text, weights), tmp_path / "g.onnx")
    if expected == "ONNX Runtime":
        with pytest.raises(Exception, match="layout == 1"):
            onnxruntime.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"])
        return
    found, network = outcome(tmp_path / "g.onnx")
    if expected in SILENT:
        assert found == "built" and SILENT[expected](network)
    else:
        assert found == expected


def test_a_gru_with_quantized_weights_ends_the_process(tmp_path: Path) -> None:
    text, weights, _ = BAD["GRU with quantized weights"]
    onnx.save(model_of(text, weights), tmp_path / "g.onnx")
    code = "import sys, pathlib, test_tensorrt_lint as t; print(t.outcome(pathlib.Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "g.onnx"],
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode < 0 and not done.stdout
