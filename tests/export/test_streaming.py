"""A model whose weights stay in the checkpoint: its bundle and its proof are those of the model in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import CONTEXT, VOCAB, make
from torch import nn

from edgellm import streaming
from edgellm.checkpoints import Checkpoint, load_checkpoint, open_checkpoint, save_checkpoint
from edgellm.models.protocol import Step, empty_state
from edgellm.streaming import OwnWeights, resident, row_blocks
from edgellm_exporters.errors import CaptureError
from edgellm_exporters.export import Exported, ExportOptions, export
from edgellm_exporters.graph.capture import capture
from edgellm_exporters.proof.parity import compare
from edgellm_exporters.proof.traces import continuations, take_traces, traces
from edgellm_exporters.weights.lazy import LazyWeight
from edgellm_runtime import open_session

FAMILIES = ("decoder", "decoder untied with biases", "decoder with q/k norm", "lstm", "mixed")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that the vocabulary's tables are read by rows."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 4096)


def saved(family: str, folder: Path) -> Path:
    path = folder / "checkpoint"
    save_checkpoint(
        path, make(family), architecture="decoder" if "decoder" in family else "hybrid", tokenizer_json=None
    )
    return path


def opened(family: str, folder: Path) -> tuple[Any, Any, Any]:
    """The model in memory, the one without weights, and where its weights are."""
    path = saved(family, folder)
    streamed = open_checkpoint(path)
    assert all(p.is_meta for p in streamed.model.parameters())
    return load_checkpoint(path).model, streamed.model, streamed.weights


@pytest.mark.parametrize("method", ["none", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_bundle_is_the_bundle_of_the_model_in_memory(family: str, method: str, tmp_path: Path) -> None:
    path, options = saved(family, tmp_path), ExportOptions(quantize=method, name="same")

    def exported(loaded: Checkpoint, name: str) -> Exported:
        model: Any = loaded.model
        return export(model, tmp_path / name, weights=loaded.weights, options=options)

    one, other = exported(load_checkpoint(path), "memory"), exported(open_checkpoint(path), "streamed")
    for name in ("model.onnx", "model.onnx.data"):
        assert one.bundle.manifest.files[name] == other.bundle.manifest.files[name]
    ours, theirs = (json.loads(e.bundle.file("goldens.json").read_text())["traces"] for e in (one, other))
    for a, b in zip(ours, theirs, strict=True):
        assert (a["tokens"], a["top_ids"], a["greedy"]) == (b["tokens"], b["top_ids"], b["greedy"])
        for key in ("top_logits", "logsumexp"):
            np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-5)
        for name, sample in a["state"].items():
            assert sample["index"] == b["state"][name]["index"]
            np.testing.assert_allclose(sample["values"], b["state"][name]["values"], rtol=0, atol=1e-5)
    for name in ("logits", "kl", "top1", "state", "greedy", "perplexity", "reference_perplexity"):
        assert getattr(one.parity, name) == pytest.approx(getattr(other.parity, name), rel=1e-2, abs=1e-5), name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_runs_on_weights_that_are_read_while_it_runs(family: str, tmp_path: Path) -> None:
    whole, model, weights = opened(family, tmp_path)
    tokens = torch.randint(0, VOCAB, (2, 12))
    with resident(model, weights):
        found, _ = model(tokens, empty_state(model, 2, 12), Step.whole(tokens))
    expected, _ = whole(tokens, empty_state(whole, 2, 12), Step.whole(tokens))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(p.is_meta for p in model.parameters())
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_hooks_see_real_weights_and_may_replace_them_until_the_module_is_left(tmp_path: Path) -> None:
    whole, model, weights = opened("decoder untied with biases", tmp_path)
    layer, before = model.layers[0].mlp.up_proj, model.layers[0].mlp.up_proj.weight
    seen: list[torch.Tensor] = []

    def halve(module: nn.Module, _: Any) -> None:
        seen.append(module.weight.detach().clone())  # type: ignore[operator]
        module.weight = nn.Parameter(module.weight * 0.5)  # type: ignore[operator]

    whole.layers[0].mlp.up_proj.weight *= 0.5
    tokens = torch.randint(0, VOCAB, (1, 7))
    with resident(model, weights):
        handle = layer.register_forward_pre_hook(halve)
        found, _ = model(tokens)
        handle.remove()
        assert layer.weight is before
        later, _ = model(tokens)
    torch.testing.assert_close(seen[0] * 0.5, whole.layers[0].mlp.up_proj.weight.data)
    torch.testing.assert_close(found, whole(tokens)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, later)


def test_asking_a_parameter_for_gradients_asks_no_weight_that_is_read(tmp_path: Path) -> None:
    """Weights that are kept would need gradients ever after."""
    _, model, weights = opened("decoder", tmp_path)
    kept = {name: weights.read(name) for name, _ in model.named_parameters()}

    class Kept:
        def read(self, name: str) -> torch.Tensor:
            return kept[name]

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            return kept[name][start:stop]

    with resident(model, Kept()):
        for parameter in model.parameters():
            parameter.requires_grad_(False).requires_grad_(True)
    assert not any(tensor.requires_grad for tensor in kept.values())


@torch.no_grad()
def test_a_hook_that_puts_weights_back_late_leaves_nothing_behind(tmp_path: Path) -> None:
    _, model, weights = opened("decoder", tmp_path)
    layer = model.layers[0].attention.o_proj
    kept: list[nn.Parameter] = []
    with resident(model, weights):
        layer.register_forward_pre_hook(lambda module, _: kept.append(module.weight))
        layer.register_forward_hook(lambda module, *_: setattr(module, "weight", kept[0]))
        model(torch.zeros(1, 3, dtype=torch.int64))
        assert layer.weight.is_meta
    assert all(p.is_meta for p in model.parameters())


@torch.no_grad()
def test_a_pass_that_fails_leaves_no_weights_behind(tmp_path: Path) -> None:
    _, model, weights = opened("mixed", tmp_path)

    def fail(*_: Any) -> None:
        raise KeyError("stop")

    with resident(model, weights):
        model.blocks[1].mixer.o_proj.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(torch.zeros(1, 3, dtype=torch.int64))
        assert all(p.is_meta for p in model.parameters())


@torch.no_grad()
def test_weights_that_a_parent_reads_are_there_too() -> None:
    from own_models import Sound

    model = Sound().eval()
    weights = OwnWeights(model)
    tokens = torch.randint(0, 61, (2, 5))
    expected, _ = model(tokens)
    bare = Sound().to("meta").eval()
    with resident(bare, weights):
        found, _ = bare(tokens)
        assert bare.cell.weight_hh_l0.device == torch.device("cpu")
        assert bare.cell.weight_hh_l0.is_meta
        torch.testing.assert_close(bare.head.weight.T @ torch.ones(61), model.head.weight.T @ torch.ones(61))
    torch.testing.assert_close(found, expected)


def test_tied_weights_stay_tied_in_a_model_without_weights(tmp_path: Path) -> None:
    _, model, _ = opened("decoder", tmp_path)
    assert model.head.weight is model.embedding.weight
    capture(model)
    assert model.head.weight is model.embedding.weight


def test_rows_of_a_table_equal_the_whole(tmp_path: Path) -> None:
    whole, model, weights = opened("decoder", tmp_path)
    table = model.embedding.weight
    blocks = row_blocks(table.shape, table.dtype)
    assert len(blocks) > 1
    assert blocks[0][0] == 0
    assert blocks[-1][1] == VOCAB
    together = torch.cat([weights.rows("head.weight", *block) for block in blocks])
    assert torch.equal(together, whole.embedding.weight)
    assert torch.equal(together, weights.read("embedding.weight"))
    initializers = capture(model, weights).graph.initializers
    (lazy,) = (v.const_value for n, v in initializers.items() if n in ("embedding.weight", "head.weight"))
    assert isinstance(lazy, LazyWeight)
    assert np.array_equal(lazy.rows(3, 9), lazy.numpy()[3:9])


def test_capture_reads_no_weight() -> None:
    class Nothing:
        def read(self, name: str) -> Any:
            raise AssertionError(name)

        def rows(self, name: str, start: int, stop: int) -> Any:
            raise AssertionError(name)

    model: Any = make("mixed").to("meta")
    graph = capture(model, Nothing())
    assert {n for n, _ in model.named_parameters() if "norm" in n} <= set(graph.graph.initializers)


def test_the_garbage_collector_is_left_as_it_was(tmp_path: Path) -> None:
    gc.unfreeze()  # what tests/conftest.py froze
    model: Any = make("decoder")
    exported = export(model, tmp_path / "bundle")
    assert gc.get_freeze_count() == 0
    compare(model, open_session(exported.bundle), [[1, 2, 3]], greedy_prompts=[[1, 2]], greedy_count=2)
    assert gc.get_freeze_count() == 0


# what PyTorch says next


class Parrot:
    """Stands for a session: proposes what it is told to."""

    def __init__(self, propose: Callable[[list[int]], int]) -> None:
        self._propose = propose

    def new_state(self, batch: int, capacity: int, *, sources: Any = None) -> list[int]:
        assert sources is None
        return []

    def step(self, tokens: Any, state: list[int]) -> Any:
        state += tokens[0].tolist()
        logits = np.zeros((1, 1, VOCAB), dtype=np.float32)
        logits[0, 0, self._propose(state)] = 1
        return logits


@torch.no_grad()
def said_one_by_one(model: Any, row: list[int], count: int) -> list[int]:
    said: list[int] = []
    for _ in range(count):
        said.append(int(model(torch.tensor([row + said]))[0][0, -1].argmax()))
    return said


@pytest.mark.parametrize("family", ["decoder", "gru"])
def test_what_pytorch_says_is_found_whatever_the_bundle_proposes(family: str) -> None:
    model: Any = make(family)
    rows = [np.random.default_rng(n).integers(0, VOCAB, 9).tolist() for n in range(2)]
    expected = [said_one_by_one(model, row, 6) for row in rows]
    right = partial(_next, model)
    half = lambda tokens: right(tokens) if len(tokens) < 12 else 0  # noqa: E731
    for propose, agreed in ((right, 1.0), (half, 0.5), (lambda _: 0, 0.0)):
        found, _ = continuations(model, partial(Parrot, propose), rows, [6, 6], whole=True)
        assert [list(f.tokens) for f in found] == expected
        partly, _ = continuations(model, partial(Parrot, propose), rows, [6, 6], whole=False)
        assert [list(p.tokens) for p in partly] == [e[: len(p.tokens)] for p, e in zip(partly, expected, strict=True)]
        assert all(p.agreed == f.agreed for p, f in zip(partly, found, strict=True))
        if agreed in (0.5, 1.0):
            assert all(abs(p.agreed - agreed) < 0.2 for p in partly)


@torch.no_grad()
def _next(model: Any, tokens: list[int]) -> int:
    return int(model(torch.tensor([tokens]))[0][0, -1].argmax())


@pytest.mark.parametrize("family", ["decoder", "mixed"])
def test_traces_of_rows_do_not_depend_on_what_is_said_after_them(family: str) -> None:
    model: Any = make(family)
    rows = [np.random.default_rng(n).integers(0, VOCAB, 9).tolist() for n in range(2)]
    session: Any = Parrot(partial(_next, model))
    found, said = take_traces(model, lambda: session, rows, CONTEXT, whole=True, max_context=model.config.max_context)
    assert [len(s.tokens) for s in said] == [CONTEXT - 9] * 2
    for trace, alone in zip(found, (next(traces(model, [row])) for row in rows), strict=True):
        assert trace.tokens == alone.tokens
        torch.testing.assert_close(trace.logits, alone.logits, rtol=1e-4, atol=1e-4)
        for name, tensor in alone.state.items():
            torch.testing.assert_close(trace.state[name], tensor, rtol=1e-4, atol=1e-4)


# what goes wrong, and what it costs


def test_weights_that_are_not_numbers_are_found_when_they_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from edgellm.errors import CheckpointError

    path = saved("decoder", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["embedding.weight"][77, 3] = float("nan")
    save_file(tensors, path / "model.safetensors")
    loaded = open_checkpoint(path)
    model: Any = loaded.model
    for method in ("none", "int8"):
        with pytest.raises(
            (CheckpointError, CaptureError), match=r"tensor embedding.weight is not finite as torch.float32"
        ):
            export(model, tmp_path / "out", weights=loaded.weights, options=ExportOptions(quantize=method))
        assert [f.name for f in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks = {}
    for layers in (1, 6):
        path = tmp_path / f"{layers}"
        subprocess.run([sys.executable, "-c", MAKE, str(path), str(layers)], check=True)
        done = subprocess.run([sys.executable, "-c", EXPORT, str(path)], capture_output=True, text=True, check=True)
        peaks[layers] = float(done.stdout)
    megabytes = 5 * PER_LAYER * 4 / 2**20  # what five layers take in float32
    assert megabytes > 150
    assert peaks[6] - peaks[1] < megabytes / 2  # ONNX Runtime holds their codes, and the graph has more nodes


WIDTH, MLP = 768, 3072
PER_LAYER = 4 * WIDTH**2 + 3 * WIDTH * MLP
MAKE = textwrap.dedent(f"""
    import sys
    import torch
    from pathlib import Path
    from edgellm.checkpoints import save_checkpoint
    from edgellm.models.decoder import Decoder, DecoderConfig
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(
        vocab_size=512, width={WIDTH}, num_layers=int(sys.argv[2]), num_heads=12, num_kv_heads=12, head_dim=64,
        mlp_width={MLP}, max_context=128,
    ))
    save_checkpoint(Path(sys.argv[1]), model.half(), architecture="decoder", tokenizer_json=None)
""")
EXPORT = textwrap.dedent("""
    import sys
    from pathlib import Path
    from edgellm.checkpoints import open_checkpoint
    from edgellm_exporters.export import ExportOptions, export
    from edgellm_runtime.checks.memory import peak_rss_mb
    loaded = open_checkpoint(Path(sys.argv[1]))
    loose = {"kl": 100.0, "top1": 0.0, "split": 100.0, "batch": 100.0}  # random weights round badly
    export(loaded.model, Path(sys.argv[1] + ".bundle"), weights=loaded.weights,
           options=ExportOptions(quantize="int4", bounds=loose))
    print(peak_rss_mb())
""")
