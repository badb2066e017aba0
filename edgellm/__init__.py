"""edgellm: define and train a language model in PyTorch, export it, run it anywhere without PyTorch.

Importing this package loads nothing heavy; ``edgellm.models`` and ``edgellm.training`` need PyTorch.
"""

__all__ = ["__version__"]
__version__ = "0.1.0"
