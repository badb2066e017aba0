"""Two real bundles that many tests share, exported once a process: attention with a tokenizer, and a recurrence."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generation_fakes import TEMPLATE, byte_level
from memory_model import MemoryConfig, MemoryModel
from tiny_files import copied, edit_manifest, sign  # noqa: F401  for those who spoil a bundle
from torch import nn

from edgellm.models.decoder import Decoder, DecoderConfig
from edgellm.models.hybrid import Hybrid, HybridConfig
from edgellm_exporters.engines.options import EngineOptions
from edgellm_exporters.export import ExportOptions, TextAssets, export
from edgellm_exporters.graph.targets import TARGETS
from edgellm_runtime.backends.ort_device import OrtDeviceBackend
from edgellm_runtime.bundle import GRAPH, Bundle
from edgellm_runtime.session import Session

CONTEXT = 96


@functools.cache
def text_assets() -> TextAssets:
    return TextAssets(tokenizer_json=byte_level().to_str(), chat_template=TEMPLATE, eos_token_ids=(2, 0))


def attention_model() -> nn.Module:
    torch.manual_seed(0)
    vocab = byte_level().get_vocab_size()
    return Decoder(
        DecoderConfig(
            vocab_size=vocab, width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32,
            max_context=CONTEXT,
        )
    ).eval()  # fmt: skip


def recurrent_model() -> nn.Module:
    torch.manual_seed(1)
    config = HybridConfig(
        vocab_size=61, width=32, pattern=("lstm",), num_heads=1, num_kv_heads=1, recurrent_width=32, max_context=CONTEXT
    )
    return Hybrid(config).eval()


def window_model() -> nn.Module:
    torch.manual_seed(2)
    config = HybridConfig(
        vocab_size=byte_level().get_vocab_size(), width=32, pattern=("local", "attention", "local"), num_heads=2,
        num_kv_heads=1, max_context=CONTEXT, window=12,
    )  # fmt: skip
    return Hybrid(config).eval()


@functools.cache
def window_bundle(target: str = "cpu", dtype: str = "") -> Path:
    """Two layers that see twelve tokens, and one that sees all; has a tokenizer and a chat template."""
    return _make(window_model, target, text_assets(), dtype)


def memory_model() -> nn.Module:
    torch.manual_seed(3)
    model = MemoryModel(MemoryConfig(61, CONTEXT, width=32, heads=2))
    nn.init.normal_(model.write.weight, std=0.5)  # so that what is remembered shows
    return model.eval()


@functools.cache
def memory_bundle(target: str = "cpu", dtype: str = "") -> Path:
    """A memory that a row's first token writes, beside a cache; token ids only."""
    return _make(memory_model, target, None, dtype)


@functools.cache
def attention_bundle(target: str = "cpu") -> Path:
    """Has a tokenizer and a chat template."""
    return _make(attention_model, target, text_assets())


@functools.cache
def half_bundle(quantize: str = "none") -> Path:
    """The same with keys and values in 16 bits."""
    return _make(attention_model, "cpu", text_assets(), kv_cache="float16", quantize=quantize)


@functools.cache
def recurrent_bundle(target: str = "cpu") -> Path:
    """Token ids only."""
    return _make(recurrent_model, target, None)


@functools.cache
def hidden_bundle(kind: str = "attention", target: str = "cpu", quantize: str = "none") -> Path:
    """``attention`` (with text), ``recurrent`` or ``window``, whose steps give hidden states."""
    model, text = HIDDEN_KINDS[kind]
    return _make(model, target, text(), hidden=True, quantize=quantize)


HIDDEN_KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], TextAssets | None]]] = {
    "attention": (attention_model, text_assets), "recurrent": (recurrent_model, lambda: None),
    "window": (window_model, text_assets),
}  # fmt: skip


def device_session(bundle: Bundle, **options: Any) -> Session:
    """A session whose state is on a device: the code of CUDA, run by the CPU's kernels."""
    manifest = bundle.manifest
    backend = OrtDeviceBackend(
        bundle.file(GRAPH), manifest.signature, max_context=manifest.max_context, device="cpu",
        encoder=None if manifest.encoder is None else bundle.file(manifest.encoder.file), **options,
    )  # fmt: skip
    return Session(
        backend, manifest.signature, max_context=manifest.max_context, ragged_chunks=manifest.ragged_chunks,
        vocab_size=manifest.vocab_size or None, encoder=manifest.encoder,
    )  # fmt: skip


CALL_TOKENS = ["<tool_call>", "</tool_call>"]
TELLS = (  # tools, thinking and calls, and opens thinking where it is asked to
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.reasoning_content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.n }}{{ c.id }}{% endfor %}"
    "{{ m.tool_call_id }}{% endfor %}"
) + TEMPLATE.replace("assistant\\n' }}", "assistant\\n' }}{{ '<think>' if enable_thinking }}")


@functools.cache
def talking_bundle() -> Path:
    """A context of 1,024, a template that tells of tools and thinking, and special tokens around calls."""
    library = byte_level()
    library.add_special_tokens(CALL_TOKENS)
    assets = TextAssets(tokenizer_json=library.to_str(), chat_template=TELLS, eos_token_ids=(2, 0))

    def model() -> nn.Module:
        torch.manual_seed(4)
        sizes = {"width": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "mlp_width": 32}
        return Decoder(DecoderConfig(vocab_size=library.get_vocab_size(), max_context=1024, **sizes)).eval()

    return _make(model, "cpu", assets)


def _make(model: Callable[[], Any], target: str, text: TextAssets | None, dtype: str = "", **options: Any) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    engine = EngineOptions(build=False) if TARGETS[target].roles else None
    dtype = dtype or TARGETS[target].dtypes[0]
    wanted = ExportOptions(target=target, dtype=dtype, engine=engine, **options)
    return export(model(), folder / "bundle", options=wanted, text=text).bundle.path
