"""Adapters that a bundle switches: each computes what PEFT's merged model computes, and none what the base does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from served import serving
from test_checkpoints_huggingface import TOKENS, transformers_model

from edgellm.checkpoints import open_checkpoint, switchable
from edgellm.cli.export import export
from edgellm.errors import CheckpointError
from edgellm_runtime import Model, OptionError, StateError, load
from edgellm_runtime.generation.prefix_cache import PrefixCache

pytestmark = pytest.mark.filterwarnings("default")  # the warnings here are transformers' and PEFT's own
ADAPTERS = {
    "fr": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "de.2": {"r": 2, "target_modules": ["q_proj", "o_proj", "down_proj", "lm_head"], "use_rslora": True},
}
CLOSE = 2e-5


def llama() -> Any:
    """The base, always the same."""
    return transformers_model("Llama", hidden_size=64, head_dim=16, intermediate_size=96, initializer_range=0.15)


def near(model: Model, found: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether logits are those of PEFT, as far as the bundle's own bounds ask it of quantized weights."""
    bounds = model.bundle.manifest.bounds
    if "logits" in bounds:
        return bool(np.abs(found - wanted).max() < CLOSE * np.abs(wanted).max())
    p, q = (torch.from_numpy(np.array(x)).double().log_softmax(-1) for x in (wanted, found))
    return bool((p.exp() * (p - q)).sum(-1).mean() < bounds["kl"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str | None, np.ndarray]]:
    """A checkpoint with two adapters beside it, and the logits that PEFT gives each."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("switchable")
    llama().save_pretrained(folder / "base")
    expected: dict[str | None, np.ndarray] = {}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        model = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
        torch.manual_seed(seed)
        for parameter, tensor in model.named_parameters():
            if "lora_" in parameter:
                torch.nn.init.normal_(tensor, std=0.2)
        model.save_pretrained(folder / name)
        with torch.inference_mode():
            expected[name] = model.merge_and_unload().eval()(TOKENS).logits.numpy()
    with torch.inference_mode():
        expected[None] = llama()(TOKENS).logits.numpy()
    return folder, expected


@pytest.fixture(scope="module", params=[("cpu", "none"), ("onnx", "none"), ("cpu", "int8")])
def bundle(
    request: pytest.FixtureRequest, made: tuple[Path, dict[str | None, np.ndarray]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:  # fmt: skip
    """A bundle with both adapters; one more where pytest comes back to the parameters, as in another order it does."""
    (folder, _), (target, quantize) = made, request.param
    there = tmp_path_factory.mktemp("bundles") / f"{target}-{quantize}"
    given = [option for name in ADAPTERS for option in ("--adapter", f"{name}={folder / name}")]
    result = CliRunner().invoke(
        export, [str(folder / "base"), "-o", str(there), "--target", target, "--quantize", quantize, "--json", *given]
    )
    assert result.exit_code == 0, result.output
    names = {check["name"] for check in json.loads(result.stdout)["checks"]}
    assert {"adapters.fr", "adapters.de.2"} <= names
    return there, quantize


def test_each_adapter_equals_peft_and_none_the_base(
    bundle: tuple[Path, str], made: tuple[Path, dict[str | None, np.ndarray]]
) -> None:
    model, expected = load(bundle[0]), made[1]
    assert model.adapters == tuple(ADAPTERS)
    for name, wanted in expected.items():
        session = model.with_adapter(name).session
        whole = session.step(TOKENS.numpy(), session.new_state(2), logits="all")
        assert near(model, whole, wanted)
        state, parts = session.new_state(2), []
        for token in TOKENS.numpy().T:
            parts.append(session.step(token[:, None], state, logits="all").copy())
        assert near(model, np.concatenate(parts, axis=1), wanted)
        others = [other for key, other in expected.items() if key != name]
        assert min(np.abs(whole - other).max() for other in others) > 0.1 * np.abs(wanted).max()  # it does matter


def test_rows_of_one_batch_have_adapters_of_their_own(
    bundle: tuple[Path, str], made: tuple[Path, dict[str | None, np.ndarray]]
) -> None:
    model, expected = load(bundle[0]), made[1]
    session = model.session
    together = session.new_state(2)
    together.put(1, model.with_adapter("fr").session.new_state(1))
    found = session.step(TOKENS.numpy(), together, logits="all")
    assert near(model, found[0], expected[None][0])
    assert near(model, found[1], expected["fr"][1])


def test_answers_streams_batches_and_caches_keep_adapters_apart(bundle: tuple[Path, str]) -> None:
    model, prompt = load(bundle[0]), list(range(1, 41))
    cached = load(bundle[0], prefix_cache=PrefixCache(1 << 20))
    said = {name: model.with_adapter(name).generate(prompt, max_new_tokens=8).tokens for name in (None, *ADAPTERS)}
    assert len({*map(tuple, said.values())}) == 3
    with model.scheduler(rows=3) as scheduler:
        tickets = {name: scheduler.submit(prompt, max_new_tokens=8, adapter=name) for name in said}
        assert {name: ticket.results()[0].tokens for name, ticket in tickets.items()} == said
    for name, tokens in said.items():
        assert model.generate(prompt, adapter=name, max_new_tokens=8).tokens == tokens
        assert cached.generate(prompt, adapter=name, max_new_tokens=8).tokens == tokens
        stream = model.stream(prompt, adapter=name, max_new_tokens=8)
        assert [token for chunk in stream for token in chunk.token_ids] == list(tokens)


def test_a_state_of_one_adapter_is_refused_by_another(bundle: tuple[Path, str], tmp_path: Path) -> None:
    model = load(bundle[0])
    french = model.with_adapter("fr")
    state = french.read([1, 2, 3])
    assert french.generate([4], state=state, max_new_tokens=2).tokens
    for other in (model, model.with_adapter("de.2")):
        with pytest.raises(StateError, match="the state is of adapter fr"):
            other.generate([4], state=state, max_new_tokens=2)
    state.save(tmp_path / "state")
    assert french.load_state(tmp_path / "state").tokens == (1, 2, 3)
    with pytest.raises(StateError, match="the state of another adapter than no adapter"):
        model.load_state(tmp_path / "state")


def test_what_is_no_adapter_is_refused_by_name(bundle: tuple[Path, str], made: tuple, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no adapter 'it'; this one has fr, de\.2"):
        load(bundle[0]).generate([1], adapter="it")
    folder = made[0]
    opened = open_checkpoint(folder / "base")
    with pytest.raises(CheckpointError, match="'a b' is no name of an adapter"):
        switchable(opened, {"a b": folder / "fr"})
    shutil.copytree(folder / "fr", tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"3 of 6 modules that it changes, such as .*layers\.7"):
        switchable(opened, {"fr": tmp_path / "other"})


def test_a_server_has_each_adapter_as_a_model(bundle: tuple[Path, str]) -> None:
    model, prompt = load(bundle[0]), list(range(1, 20))
    with serving({"tiny": bundle[0]}) as served:
        names = [entry["id"] for entry in httpx.get(f"{served.address}/v1/models").json()["data"]]
        assert names == ["tiny", "tiny:fr", "tiny:de.2"]
        assert len({id(hosted.scheduler) for hosted in served.host}) == 1
        for hosted in served.host:
            found = hosted.scheduler.submit(prompt, max_new_tokens=6, adapter=hosted.model.adapter).results()[0]
            assert found.tokens == model.generate(prompt, max_new_tokens=6, adapter=hosted.model.adapter).tokens
