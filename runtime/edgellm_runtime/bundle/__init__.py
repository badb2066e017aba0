"""A bundle on disk: its manifest, and files that are what the manifest says they are."""

from edgellm_runtime.bundle.bundle import Bundle, sha256_of
from edgellm_runtime.bundle.manifest import FORMAT, GRAPH, MANIFEST, FileInfo, Manifest, TokenizerInfo

__all__ = ["FORMAT", "GRAPH", "MANIFEST", "Bundle", "FileInfo", "Manifest", "TokenizerInfo", "sha256_of"]
