"""Checkpoints that others quantized, written in the layouts that their tools document, one code at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]  # stored tensors by their last names, and the float weight


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Each row of codes as one stream of bits in 32-bit words, written bit by bit."""
    count = -(-codes.shape[1] * bits // 32)
    packed = np.zeros((len(codes), count), dtype=np.uint64)
    for column in range(codes.shape[1]):
        for bit in range(bits):
            place = column * bits + bit
            packed[:, place // 32] |= ((codes[:, column].astype(np.uint64) >> bit) & 1) << (place % 32)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def drawn(shape: tuple[int, int], bits: int, group: int, symmetric: bool, seed: int) -> tuple[np.ndarray, ...]:
    """Random codes, scales, zeros and the group of each column."""
    random, groups = np.random.default_rng(seed), -(-shape[1] // group)
    codes = random.integers(0, 2**bits, shape)
    scales = (random.uniform(0.5, 1.5, (shape[0], groups)) * 0.3 / 2**bits).astype(np.float16)
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if not symmetric:
        zeros = random.integers(96, 161, scales.shape) if bits == 8 else random.integers(1, 2**bits, scales.shape)
    return codes, scales, zeros, np.arange(shape[1]) // group


def weight_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, of: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(((codes - zeros[:, of]) * scales.astype(np.float32)[:, of]).astype(np.float32))


def gptq(
    shape: tuple[int, int], seed: int, *, bits: int = 4, group: int = 32, symmetric: bool = True, v2: bool = False,
    shuffled: bool = False, alike: bool = True, g_idx: bool = True,
) -> Packed:  # fmt: skip
    codes, scales, zeros, of = drawn(shape, bits, group if group > 0 else shape[1], symmetric, seed)
    if shuffled:  # alike for all weights that read one input, as GPTQ does, unless they are to be told apart
        of = np.random.default_rng(shape[1] if alike else seed).permutation(of)
    stored = {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words((zeros if v2 else zeros - 1).T, bits),
        "scales": torch.from_numpy(np.ascontiguousarray(scales.T)),
    }
    if g_idx:
        stored["g_idx"] = torch.from_numpy(of.astype(np.int32))
    return stored, weight_of(codes, scales, zeros, of)


def awq(shape: tuple[int, int], seed: int, *, group: int = 32) -> Packed:
    codes, scales, zeros, of = drawn(shape, 4, group, False, seed)

    def interleaved(numbers: np.ndarray) -> torch.Tensor:
        """(columns, rows): the even rows of each eight first."""
        order = [8 * word + i for word in range(numbers.shape[1] // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        return words(numbers[:, order], 4)

    stored = {"qweight": interleaved(codes.T), "qzeros": interleaved(zeros.T)}
    stored["scales"] = torch.from_numpy(np.ascontiguousarray(scales.T))
    return stored, weight_of(codes, scales, zeros, of)


def compressed(
    shape: tuple[int, int], seed: int, *, bits: int = 4, group: int = 32, symmetric: bool = True
) -> Packed:  # fmt: skip
    codes, scales, zeros, of = drawn(shape, bits, group if group > 0 else shape[1], symmetric, seed)
    stored = {
        "weight_packed": words(codes, bits),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor(shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return stored, weight_of(codes, scales, zeros, of)


def eight_bits(shape: tuple[int, int], seed: int, *, name: str = "weight_scale", over: float = 1.0) -> Packed:
    """Plain whole numbers with a scale for each row."""
    codes, scales, _, of = drawn(shape, 8, shape[1], True, seed)
    codes = np.maximum(codes, 1)
    stored = {
        "weight": torch.from_numpy((codes - 128).astype(np.int8)),
        name: torch.from_numpy(scales.astype(np.float32) * np.float32(over)),
    }
    if name == "SCB":
        stored |= {"SCB": stored["SCB"].flatten(), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, weight_of(codes, scales, np.full(scales.shape, 128), of)


def floats8(shape: tuple[int, int], seed: int, *, block: tuple[int, int] | None, name: str) -> Packed:
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.normal(size=shape).astype(np.float32)).to(torch.float8_e4m3fn)
    rows, columns = block or (1, shape[1])
    scale = torch.from_numpy(random.uniform(0.02, 0.05, (-(-shape[0] // rows), -(-shape[1] // columns)))).float()
    spread = scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
    return {"weight": weight, name: scale}, weight.float() * spread


NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip


def four_bits(shape: tuple[int, int], seed: int, *, nested: bool, block: int = 64) -> Packed:
    """bitsandbytes' NF4."""
    random, size = np.random.default_rng(seed), shape[0] * shape[1]
    codes = random.integers(0, 16, size)
    packed = torch.tensor([int(a) * 16 + int(b) for a, b in zip(codes[::2], codes[1::2], strict=True)])
    blocks = -(-size // block)
    about: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": list(shape)}
    stored = {"weight": packed.to(torch.uint8)[:, None], "weight.quant_map": torch.tensor(NF4)}
    if nested:
        table, outer = np.linspace(-1, 1, 256, dtype=np.float32), random.uniform(0.01, 0.02, -(-blocks // 256))
        inner = random.integers(0, 256, blocks)
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.08}
        stored |= {
            "weight.absmax": torch.from_numpy(inner.astype(np.uint8)),
            "weight.nested_absmax": torch.from_numpy(outer).float(), "weight.nested_quant_map": torch.from_numpy(table),
        }  # fmt: skip
        absmax = table[inner] * np.repeat(outer, 256)[:blocks].astype(np.float32) + np.float32(0.08)
    else:
        absmax = random.uniform(0.05, 0.2, blocks).astype(np.float32)
        stored["weight.absmax"] = torch.from_numpy(absmax)
    text = json.dumps(about).encode()
    stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    wide = np.array(NF4, dtype=np.float32)[codes] * np.repeat(absmax, block)[:size]
    return stored, torch.from_numpy(wide.astype(np.float32).reshape(shape))


def mlx(shape: tuple[int, int], seed: int, *, bits: int = 4, group: int = 64) -> Packed:
    codes, scales, zeros, of = drawn(shape, bits, group, False, seed)
    bias = (-zeros * scales * np.random.default_rng(seed).uniform(0.9, 1.1)).astype(np.float16)
    stored = {"weight": words(codes, bits), "scales": torch.from_numpy(scales), "biases": torch.from_numpy(bias)}
    stored["weight"] = stored["weight"].view(torch.uint32)
    return stored, torch.from_numpy(
        (codes * scales.astype(np.float32)[:, of] + bias.astype(np.float32)[:, of]).astype(np.float32)
    )


def write(
    folder: Path, plain: Path, pack: Callable[[tuple[int, int], int], Packed], settings: dict[str, Any], *,
    key: str = "quantization_config", which: Callable[[str], bool] = lambda name: "_proj" in name,
) -> None:  # fmt: skip
    """Quantize a float folder in place, and write beside it what its weights then stand for.

    Args:
        folder: of a float model; its matrices are replaced.
        plain: the folder of the float model that the quantized one stands for; made here.
        pack: from a matrix's shape and a seed to what is stored.
        settings: for ``config.json``.
        key: where they stand there.
        which: of the matrices.
    """
    tensors = load_file(folder / "model.safetensors")
    stored, floats = {}, {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if tensor.dim() == 2 and name.endswith(".weight") and which(name):
            parts, floats[name] = pack(tuple(tensor.shape), seed)
            stored |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
        else:
            stored[name] = floats[name] = tensor
    shutil.copytree(folder, plain)
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: settings}))
