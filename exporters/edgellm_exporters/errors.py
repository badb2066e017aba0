"""Every error that exporting raises on purpose.

ExportError
├── CaptureError      the module cannot be traced as one graph for every use
├── LoweringError     a node that the target has no form for
├── EngineError       no library that builds engines, or one that refuses a graph
├── QuantizeError     a weight that the method cannot quantize
└── ParityError       the finished bundle does not compute what PyTorch computes
"""

from __future__ import annotations

__all__ = ["CaptureError", "EngineError", "ExportError", "LoweringError", "ParityError", "QuantizeError"]


class ExportError(Exception):
    """Base of the exporter's errors; its text is one sentence with the thing, the value and the remedy."""


class CaptureError(ExportError):
    """The module cannot be traced as one graph for every use."""


class LoweringError(ExportError):
    """The target has no form for a node."""


class EngineError(ExportError):
    """No library that builds engines, or one that refuses a graph or makes something else of it."""


class QuantizeError(ExportError):
    """The method cannot quantize a weight."""


class ParityError(ExportError):
    """The finished bundle does not compute what PyTorch computes."""
