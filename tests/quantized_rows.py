"""Every way of storing quantized weights that the tests try: settings, and what writes a matrix so."""

from __future__ import annotations

from functools import partial

import quantized_files as files

__all__ = ["EVERY", "GPTQ", "scheme"]


def scheme(**weights):
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **weights}}}}  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
EVERY = {
    "gptq": (files.gptq, GPTQ),
    "gptq, asymmetric": (partial(files.gptq, symmetric=False), GPTQ | {"sym": False}),
    "gptq, groups of 128": (partial(files.gptq, group=128), GPTQ | {"group_size": 128}),
    "gptq, a row": (partial(files.gptq, group=-1, symmetric=False), GPTQ | {"group_size": -1}),
    "gptq, 8 bits": (partial(files.gptq, bits=8, group=64, symmetric=False), GPTQ | {"bits": 8, "group_size": 64}),
    "gptq, 3 bits": (partial(files.gptq, bits=3, symmetric=False), GPTQ | {"bits": 3}),
    "gptq, 2 bits, groups of 16": (partial(files.gptq, bits=2, group=16), GPTQ | {"bits": 2, "group_size": 16}),
    "gptq, second format": (
        partial(files.gptq, symmetric=False, v2=True, g_idx=False), GPTQ | {"checkpoint_format": "gptq_v2"},
    ),
    "gptq, act-order": (partial(files.gptq, symmetric=False, shuffled=True), GPTQ | {"desc_act": True}),
    "auto-round": (files.gptq, GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}),
    "awq": (files.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "compressed-tensors": (files.compressed, scheme(num_bits=4, group_size=32, strategy="group")),
    "compressed-tensors, asymmetric, groups of 64": (
        partial(files.compressed, symmetric=False, group=64), scheme(num_bits=4, group_size=64, symmetric=False),
    ),
    "compressed-tensors, 8 bits, rows": (
        partial(files.compressed, bits=8, group=-1), scheme(num_bits=8, group_size=None, strategy="channel"),
    ),
    "compressed-tensors, 8 bits, asymmetric": (
        partial(files.compressed, bits=8, group=128, symmetric=False), scheme(num_bits=8, group_size=128),
    ),
    "compressed-tensors, whole numbers": (
        files.eight_bits, scheme(num_bits=8, strategy="channel") | {"format": "int-quantized"},
    ),
    "compressed-tensors, floats": (
        partial(files.floats8, block=None, name="weight_scale"),
        scheme(num_bits=8, type="float", strategy="channel") | {"format": "float-quantized"},
    ),
    "fp8": (
        partial(files.floats8, block=(96, 96), name="weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [96, 96], "activation_scheme": "dynamic", "fmt": "e4m3"},
    ),
    "bitsandbytes, NF4": (
        partial(files.four_bits, nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "bitsandbytes, NF4, nested": (
        partial(files.four_bits, nested=True),
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "bitsandbytes, 8 bits": (
        partial(files.eight_bits, name="SCB", over=127.0), {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ),
    "MLX": (files.mlx, {"group_size": 64, "bits": 4}),
    "MLX, 6 bits": (partial(files.mlx, bits=6, group=32), {"group_size": 32, "bits": 6, "mode": "affine"}),
}  # fmt: skip
