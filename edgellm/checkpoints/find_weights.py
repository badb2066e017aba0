"""Finding the weights in a folder: safetensors, or the files of torch.save; whole or in parts, wrapped or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgellm.checkpoints.files import read_json
from edgellm.checkpoints.pickle_source import PickleSource
from edgellm.checkpoints.safetensors_source import SafetensorsSource
from edgellm.checkpoints.weights import TensorSource
from edgellm.errors import CheckpointError

__all__ = ["StoredTensors", "find_weights"]

_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_NO_WEIGHTS = ("adapter", "training_args", "optimizer", "scheduler", "scaler", "rng_state")  # what trainers put beside
_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and of data parallelism, when the wrapper was saved


class StoredTensors:
    """A source's tensors without what wrappers put before their names; ``dtype`` is what most are stored in.

    Args:
        source: the tensors.
    """

    def __init__(self, source: SafetensorsSource | PickleSource) -> None:
        self._source, self.dtype, cut = source, source.dtype, 0
        names = list(source.shapes)
        while found := [p for p in _PREFIXES if names and all(name[cut:].startswith(p) for name in names)]:
            cut += len(found[0])
        self._stored = {name[cut:]: name for name in names}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        return {name: self._source.shapes[stored] for name, stored in self._stored.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """As the source's."""
        return self._source.read(self._stored[name], rows)

    def raw(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """As the source's."""
        return self._source.raw(self._stored[name], rows)

    def dtype_of(self, name: str) -> str:
        """As the source's."""
        return self._source.dtype_of(self._stored[name])


def find_weights(directory: Path, stem: str = "model") -> StoredTensors:
    """The tensors in a folder.

    Args:
        directory: the folder.
        stem: of the files' names: ``model`` or ``adapter_model``; safetensors take precedence, and where there is no
            file of that name, the only file of ``torch.save`` is taken.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    old = "pytorch_model" if stem == "model" else stem
    index, single = directory / f"{old}.bin.index.json", directory / f"{old}.bin"
    if not any(file.name.startswith("adapter") is (stem != "model") for file in directory.glob("*.safetensors")):
        if index.exists():
            return StoredTensors(PickleSource(_parts(index)))
        if single.exists():
            return StoredTensors(PickleSource([single]))
        if stem == "model" and (named := _named_otherwise(directory)):
            return StoredTensors(PickleSource([named]))
    return StoredTensors(SafetensorsSource.in_directory(directory, stem))


def _named_otherwise(directory: Path) -> Path | None:
    """The one file of torch.save in a folder that has no weights of a usual name, whatever it is called."""
    files = [p for p in directory.iterdir() if p.suffix in _SUFFIXES and not p.name.startswith(_NO_WEIGHTS)]
    if len(files) > 1 and not (directory / "model.safetensors.index.json").exists():
        names = ", ".join(sorted(p.name for p in files))
        raise CheckpointError(f"{directory} has several files of weights ({names}); name one pytorch_model.bin")
    return files[0] if len(files) == 1 else None


def _parts(index: Path) -> list[Path]:
    where = read_json(index).get("weight_map")
    files = sorted(set(where.values()), key=str) if isinstance(where, dict) else []
    if not files or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise CheckpointError(f"{index} does not say which files beside it hold the tensors; copy the checkpoint again")
    return [index.parent / file for file in files]


_: type[TensorSource] = StoredTensors
