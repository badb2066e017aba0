"""What each format's product takes on the processor that searches, measured; or as another export has recorded it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_exporters.errors import QuantizeError
from edgellm_exporters.quantize.plan import ROW, Scheme
from edgellm_runtime.backends.kernel_test import KernelForm
from edgellm_runtime.backends.ort import library
from edgellm_runtime.backends.own_kernels import OwnKernels, Unusable, find, tell
from edgellm_runtime.backends.product_rates import product_rates
from edgellm_runtime.kernel_choice import chosen_kernels

__all__ = ["Rates", "measured_rates", "read_rates"]

_LEVEL = 4  # of accuracy: what lowering asks for
_SLOWEST = 1e3  # nanoseconds a weight that nothing takes


@dataclass(frozen=True)
class Rates:
    """Nanoseconds that a weight takes in a product with one token, by format.

    Args:
        decode: by the format's name; a shifted one is not in it, for what it adds is beside the product.
        kernels: whose were measured, such as ``onnxruntime 1.32.0``.
    """

    decode: Mapping[str, float]
    kernels: str

    def of(self, scheme: Scheme) -> float | None:
        """Of one format; None where it was not measured."""
        return self.decode.get(_name(scheme))


def _name(scheme: Scheme) -> str:
    return f"{scheme.kernel_bits}:{scheme.block}"


def measured_rates(schemes: Sequence[Scheme]) -> Rates:
    """Measure formats in under a second: with edgellm's own kernels where they are chosen and run, else ONNX Runtime's.

    Args:
        schemes: those of one scale a row, which are for prompts, are left out.
    """
    kernels = _own()
    forms = {
        _name(s): KernelForm("MatMulNBits", s.kernel_bits, s.block, _LEVEL, zeros=not s.symmetric)
        for s in schemes if s.block != ROW
    }  # fmt: skip
    found = product_rates(list(forms.values()), kernels=kernels)
    whose = f"onnxruntime {library().__version__}" if kernels is None else f"own ({kernels.form})"
    return Rates({name: float(f"{found[form]:.4g}") for name, form in forms.items()}, whose)


def _own() -> OwnKernels | None:
    if chosen_kernels() != "own":
        return None
    try:
        return find(library())
    except Unusable as reason:
        tell(str(reason))
        return None


def read_rates(file: Path) -> Rates:
    """The rates that an export recorded.

    Args:
        file: a bundle's ``manifest.json``, or its ``quantization.budget.rates`` alone.

    Raises:
        QuantizeError: there are none in it.
    """
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        for key in ("quantization", "budget", "rates"):
            data = data.get(key, data) if isinstance(data, dict) else data
        decode = {str(name): float(rate) for name, rate in data["decode"].items()}
        whose = str(data["kernels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QuantizeError(
            f"{file}: holds no rates of formats ({type(error).__name__}); give the manifest.json of a bundle that was "
            "exported with --quantize auto and measured them"
        ) from error
    if not decode or not all(0 < rate < _SLOWEST and math.isfinite(rate) for rate in decode.values()):
        raise QuantizeError(f"{file}: rates of {sorted(decode.values())[:4]} nanoseconds a weight; measure them again")
    return Rates(decode, whose)
