"""Training in several processes, as torchrun starts them; in one process everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from edgellm.errors import ModelError, TrainingError

__all__ = ["World", "open_world"]


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Args:
        rank: this process's number, from 0.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes."""
        if self.size == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it must be called so that gradients are averaged over the processes."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def first(self, work: Callable[[], None]) -> None:
        """Do ``work`` in the first process while the others wait; if it fails, all fail alike."""
        failure: list[str | None] = [None]
        if self.is_first:
            try:
                work()
            except ModelError as error:
                if self.size == 1:
                    raise
                failure = [str(error)]
        if self.size > 1:
            dist.broadcast_object_list(failure)
            if failure[0] is not None:
                raise TrainingError(failure[0])


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, for as long as the context lasts; inside another one, share it.

    Args:
        device: as in ``TrainOptions``.

    Raises:
        TrainingError: a device that is not there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    mine = size > 1 and not dist.is_initialized()
    if mine and chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", device_id=chosen)
    elif mine:
        dist.init_process_group("gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        if mine:
            dist.destroy_process_group()


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainingError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if local_rank is not None:
            device = torch.device("cuda", local_rank)
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise TrainingError(f"device {name} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs")
    return device
