"""GGUF files: metadata, and tensors dequantized one by one.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from edgellm.checkpoints.assemble import Layout, assemble
from edgellm.checkpoints.checkpoint import Checkpoint
from edgellm.checkpoints.files import token_ids
from edgellm.checkpoints.gguf_tokenizer import adds_bos, build_tokenizer
from edgellm.errors import CheckpointError, ModelError
from edgellm.models.registry import Architecture, find_foreign

__all__ = ["GGUFSource", "load_gguf"]


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """gguf's reader, which by itself reads past the end of a damaged file as if nothing were there."""

    data: Any

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if isinstance(self.data, np.memmap):
            self.data = np.asarray(self.data)  # the same mapping; slicing it costs half, and strings are many
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, override_order)


class GGUFSource:
    """The tensors and metadata of a GGUF file.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is not a whole GGUF file of this machine's byte order.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            reader = _Reader(path)
            self.metadata: Mapping[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except (ValueError, LookupError, OverflowError, OSError, MemoryError) as error:
            raise CheckpointError(f"{path} is not a whole GGUF file ({error}); copy it again") from error
        if reader.byte_order == "S":
            raise CheckpointError(f"{path} has the other byte order; convert it with gguf-convert-endian")
        if self.metadata.get("split.count", 1) > 1:
            raise CheckpointError(f"{path} is one of several parts; merge them with llama-gguf-split --merge")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape, outermost dimension first."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    @property
    def quantization(self) -> str:
        """The type that most weights are stored in."""
        sizes: Counter[str] = Counter()
        for tensor in self._tensors.values():
            sizes[tensor.tensor_type.name] += tensor.n_elements
        return sizes.most_common(1)[0][0] if sizes else "empty"

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized to float32.

        Raises:
            CheckpointError: its type has no known dequantization.
        """
        tensor = self._tensors[name]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{self._path}: tensor {name} of type {kind} cannot be read ({error})") from error
        array = np.asarray(array, dtype=np.float32).reshape(self.shapes[name])
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def load_gguf(path: Path, *, dtype: torch.dtype) -> Checkpoint:
    """Read a GGUF file; arguments and errors as :func:`load_checkpoint`."""
    source = GGUFSource(path)
    metadata = source.metadata
    architecture, config = _translate(source, path)
    assert architecture.gguf_name is not None
    convert = architecture.gguf_tensor

    def tensor(name: str, stored: Tensor) -> Tensor:
        return stored if convert is None else convert(config, metadata, name, stored)

    layout = Layout(name=architecture.gguf_name, tensor=tensor)
    model = assemble(architecture, config, source, layout, dtype=dtype, path=path)
    bos = token_ids(metadata, "tokenizer.ggml.bos_token_id", path)
    ends = [token_ids(metadata, f"tokenizer.ggml.{kind}_token_id", path) for kind in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    return Checkpoint(
        architecture=architecture.name,
        model=model,
        tokenizer_json=build_tokenizer(metadata, path),
        chat_template=template if isinstance(template, str) else None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(i for ids in ends for i in ids)),
        add_bos=bool(bos) and adds_bos(metadata),
        source=f"GGUF {source.quantization}, {metadata['general.architecture']}",
    )


def _translate(source: GGUFSource, path: Path) -> tuple[Architecture, Any]:
    try:
        architecture = find_foreign("gguf", source.metadata.get("general.architecture", ""))
        assert architecture.config_from_gguf is not None
        return architecture, architecture.config_from_gguf(source.metadata, source.shapes)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, AttributeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path}: its metadata is malformed ({error}); convert it again") from error
