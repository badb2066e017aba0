"""Folders as Marian and the Bergamot project write them, of tiny models."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import nn

from edgellm.models.bergamot import ARCHITECTURE, Bergamot, BergamotConfig

LISTED, COMMONEST = 5, 9
SENTENCES = [
    f"{who} {what} the {thing} {where}."
    for who in ("Mary", "The old man", "My sister", "Nobody") for what in ("saw", "bought", "will find", "never liked")
    for thing in ("red house", "little boat", "dog", "book on music") for where in ("yesterday", "in town", "at night")
]  # fmt: skip
OTHERS = [s.replace("the ", "el ").replace("saw", "vio").replace("ni", "ñí").replace("o", "ó") for s in SENTENCES]
SETTINGS = {
    "type": "transformer", "dec-cell": "ssru", "transformer-decoder-autoreg": "rnn", "dec-cell-base-depth": "2",
    "dec-cell-high-depth": "1", "tied-embeddings-all": "true", "transformer-ffn-activation": "relu",
    "transformer-preprocess": '""', "transformer-postprocess": "dan", "layer-normalization": "false",
}  # fmt: skip


def pieces(folder: Path, name: str, texts: Sequence[str], size: int, **options: Any) -> Path:
    """A sentencepiece model that was trained on texts."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / name), vocab_size=size, minloglevel=2,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    (folder / f"{name}.vocab").unlink()
    return (folder / f"{name}.model").rename(folder / f"{name}.spm")


def bergamot(vocab: int = 101, listed: int = 0) -> nn.Module:
    torch.manual_seed(3)
    config = BergamotConfig(
        vocab_size=vocab, width=32, encoder_layers=2, decoder_layers=2, num_heads=4, mlp_width=48, listed=listed,
        commonest=COMMONEST if listed else 0,
    )  # fmt: skip
    model = Bergamot(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embedding" not in name:
                parameter.mul_(1.5)
        if listed:
            model.words.copy_(torch.randint(0, vocab, model.words.shape).float())
    return model


def write_folder(folder: Path, model: Any, *, coded: bool = False, settings: Mapping[str, str] = SETTINGS) -> Path:
    """A model as a Bergamot folder: in floats, or matrices in 8 bits; gives what was written to the model, too."""
    folder.mkdir(exist_ok=True)
    config, tensors = model.config, dict[str, tuple[int, tuple[int, ...], bytes]]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = _named(name)
            array = parameter.numpy()
            turned = array.ndim == 2 and stored != "Wemb"
            shape = array.shape[::-1] if turned else array.shape if array.ndim == 2 else (1, *array.shape)
            if coded and array.ndim == 2:
                scale = np.float32(127 / np.abs(array).max())
                codes = np.rint(array * scale).astype(np.int8)
                parameter.copy_(torch.from_numpy(codes.astype(np.float32) / scale))
                tensors[stored] = (0x4101, shape, codes.tobytes() + struct.pack("<f", scale))
                tensors[f"{stored}_QuantMultA"] = (0x404, (1, 1), struct.pack("<f", 1.0))
            else:
                tensors[stored] = (0x404, shape, np.ascontiguousarray(array.T if turned else array).tobytes())
    said = {
        **settings, "dim-emb": config.width, "enc-depth": config.encoder_layers, "dec-depth": config.decoder_layers,
        "transformer-heads": config.num_heads, "transformer-dim-ffn": config.mlp_width,
    }  # fmt: skip
    text = "".join(f"{key}: {value}\n" for key, value in said.items()).encode() + b"dim-vocabs:\n  - 101\n\0"
    tensors["special:model.yml"] = (0x101, (len(text),), text)
    (folder / "model.bin").write_bytes(_binary(tensors))
    (folder / "config.yml").write_text(
        "relative-paths: true\nmodels:\n  - model.bin\nvocabs:\n  - vocab.spm\n  - vocab.spm\n"
        + ("shortlist:\n    - lex.bin\n    - false\n" if config.listed else "")
    )
    if config.listed:
        (folder / "lex.bin").write_bytes(shortlist(model.words.int().numpy()))
    return folder


def _named(name: str) -> str:
    assert ARCHITECTURE.marian is not None
    return ARCHITECTURE.marian.name(name)


def _binary(tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    padded = {name: data + bytes(-len(data) % 256) for name, (_, _, data) in tensors.items()}
    head = struct.pack("<2Q", 1, len(tensors))
    for name, (kind, shape, _) in tensors.items():
        head += struct.pack("<4Q", len(name.encode()) + 1, kind, len(shape), len(padded[name]))
    head += b"".join(name.encode() + b"\0" for name in tensors)
    head += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, shape, _ in tensors.values())
    padding = -(len(head) + 8) % 256
    return head + struct.pack("<Q", padding) + bytes(padding) + b"".join(padded.values())


def shortlist(words: Any) -> bytes:
    """Lists of the same length."""
    rows, length = words.shape
    offsets = np.arange(rows + 1, dtype=np.uint64) * np.uint64(length)
    head = struct.pack("<6Q", 0xF11A48D5013417F5, 0, COMMONEST, length, rows + 1, words.size)
    return head + offsets.tobytes() + words.astype("<u4").tobytes()
