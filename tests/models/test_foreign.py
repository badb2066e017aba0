"""The registry's entries are what the modules say, and the words of foreign tables mean what they say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm.errors import CheckpointError, ConfigError
from edgellm.models import registry
from edgellm.models.foreign import (
    GGUF,
    METADATA,
    Names,
    Variant,
    choice,
    flag,
    neutral,
    read_keys,
    rows_of,
    usual_keys,
    whole,
)

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_an_entry_says_what_the_module_says(name: str) -> None:
    entry, architecture = registry.ENTRIES[name], registry.find(name)
    assert architecture.name == name
    assert sorted(architecture.presets) == sorted(entry.presets)
    assert list(entry.huggingface) == list(architecture.huggingface.types if architecture.huggingface else ())
    assert list(entry.gguf) == list(architecture.gguf.types if architecture.gguf else ())
    assert list(entry.tensors) == ([architecture.tensors.mark] if architecture.tensors else [])


def test_no_two_architectures_load_the_same_foreign_one() -> None:
    for kind in ("huggingface", "gguf"):
        names = [name for entry in registry.ENTRIES.values() for name in getattr(entry, kind)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_every_field_that_a_table_fixes_is_one_of_the_configuration(name: str) -> None:
    architecture = registry.find(name)
    fields = {field.name for field in dataclasses.fields(architecture.config)}
    for reader in filter(None, (architecture.huggingface, architecture.gguf)):
        assert {field for variant in reader.types.values() for field in variant.fields} <= fields


def test_help_texts_know_the_architectures_without_pytorch() -> None:
    code = (
        "import sys, click\nfrom edgellm.cli import main\nfrom edgellm.cli.train import train\n"
        "from edgellm.cli.export import export\nfrom edgellm.models import registry\n"
        "text = ' '.join(c.get_help(click.Context(c)) for c in (train, export))\n"
        "text = ' '.join(text.split())\n"
        "print(all(n in text for e in registry.ENTRIES.values() for n in (*e.huggingface, *e.gguf, *e.presets)),\n"
        "      all(f'{n} ({e.about})' in text for n, e in registry.ENTRIES.items()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]


KEYS = {
    "hidden": whole("width", limit=100),
    "heads": whole("num_heads", default=4),
    "head_dim": whole("head_dim", default=lambda fields: fields["width"] // fields["num_heads"]),
    "tie": flag("tied", default=True),
    "act": choice("activation", {"swish": "silu"}, default="silu"),
    "clip": neutral(None, 0),
    "dropout": METADATA,
}


def test_keys_are_read_in_order_with_defaults_that_depend_on_the_ones_before() -> None:
    fields, unknown = read_keys(
        KEYS, {"head_dim": None, "hidden": 32, "dropout": 0.5, "clip": 0, "new": 1, "act": None}
    )
    assert fields == {"width": 32, "num_heads": 4, "head_dim": 8, "tied": True, "activation": "silu"}
    assert unknown == ["new"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "hidden is None; it must be a positive whole number of at most 100"),
        ({"hidden": 101}, "hidden is 101"),
        ({"hidden": True}, "hidden is True"),
        ({"hidden": 32.0}, "hidden is 32.0"),
        ({"hidden": 32, "tie": 1}, "tie is 1; it must be true or false"),
        ({"hidden": 32, "act": "gelu"}, "act is 'gelu', which"),
        ({"hidden": 32, "act": ["swish"]}, r"act is \['swish'\], which"),
        ({"hidden": 32, "clip": 3}, "clip is 3, which"),
    ],
)
def test_values_that_cannot_be_are_refused_by_the_files_own_name(values: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_keys(KEYS, values)


def test_names_follow_the_layer_and_parts_of_their_own() -> None:
    names = Names({"head": "lm_head", "mixer.in_proj": "conv.in", "mixer.decay": "conv.A_log"}, layers="backbone.h")
    assert names("head.weight") == "lm_head.weight"
    assert names("layers.12.mixer.in_proj.bias") == "backbone.h.12.conv.in.bias"
    assert names("layers.0.mixer.decay") == "backbone.h.0.conv.A_log"


def test_a_gguf_key_that_no_table_has_is_refused() -> None:
    reader = GGUF(
        types={"new": Variant(fields={"tied": False})}, keys={"width": whole("width")}, names=Names({}, layers="blk"),
        tensors={"vocab_size": rows_of("token_embd.weight")},
    )  # fmt: skip
    shapes = {"token_embd.weight": (7, 3)}
    values = {"general.architecture": "new", "new.width": 3, "other.key": 1, "new.rope.scaling.type": "none"}
    assert reader.read(values | {"new.rope.scaling.factor": 8}, shapes, list) == {
        "width": 3,
        "vocab_size": 7,
        "tied": False,
    }
    with pytest.raises(CheckpointError, match="logit_scale is"):
        reader.read(values | {"new.logit_scale": 0.5}, shapes, list)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, "activation is 'swish'; it must be one of silu, gelu"),
        ({"rope_factors": [1.0]}, "rope_factors has 1 numbers; 32 features"),
        ({"rotated": 34}, "rotated is 34; it must be even and at most head_dim 32"),
        ({"windows": [4]}, r"windows is \(4,\)"),
        ({"unturned": [4]}, r"unturned is \(4,\); it must name layers from 0 to 3"),
        ({"residual_scale": 0}, "residual_scale has 0"),
        ({"rope_factors": [0.0] * 16}, "rope_factors has 0.0"),
        ({"rope_amplitude": -1.0}, "rope_amplitude has -1.0"),
        ({"attention_scale": float("inf")}, "attention_scale has inf"),
    ],
)
def test_a_decoders_numbers_are_checked(changes: dict, message: str) -> None:
    config = registry.find("decoder").presets["tiny"]
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)


def test_a_decoders_configuration_survives_json() -> None:
    architecture = registry.find("decoder")
    config = dataclasses.replace(architecture.presets["tiny"], rope_factors=[0.1 * i + 1 for i in range(16)])
    assert architecture.config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads is 4; it must be a multiple of num_kv_heads 3"),
        ({"width": 130}, "width is 130; it must be a multiple of num_heads 4"),
        ({"width": 132}, "head_dim is 33, of width 132 and num_heads 4; where positions turn, it must be even"),
    ],
)
def test_a_hybrids_heads_are_checked(changes: dict, message: str) -> None:
    config = registry.find("hybrid").presets["tiny"]
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)
    assert dataclasses.replace(config, width=132, rotary=False).head_dim == 33


def test_a_field_that_no_usual_key_gives_is_no_usual_field() -> None:
    with pytest.raises(AssertionError, match=r"not among the usual keys: \['head_dims'\]"):
        usual_keys(width=8, head_dims=4)


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_configurations_have_the_names_that_older_checkpoints_hold(name: str) -> None:
    architecture = registry.find(name)
    known = json.loads((DATA / "presets.json").read_text(encoding="utf-8"))[name]
    assert {key: json.loads(json.dumps(preset.to_json())) for key, preset in architecture.presets.items()} == known
    assert {key: architecture.config.from_json(data) for key, data in known.items()} == architecture.presets
