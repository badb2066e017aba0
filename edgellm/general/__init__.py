"""The general road: any causal language model of transformers, unpatched, as a model that edgellm can export.

It goes through transformers' public interfaces alone (attention, masks, caches, experts) and knows no architecture:
what a layer keeps, which window and which soft cap it has, what is a norm and what a rotation, is found by looking at
what the modules compute. transformers itself is imported by the functions here, never by the package.
"""

from edgellm.general.open import has_transformers, load_general, open_general

__all__ = ["has_transformers", "load_general", "open_general"]
