"""The processes of a run under torchrun: exact sums, the same state on each. One process is a world too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from fp8repro.errors import UserError

# Elements of one reduced buffer; larger ones gain nothing.
BUCKET = 2**24
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process among all of a run.

    Attributes:
        rank, size: which of how many.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """True for the one process that writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in FP64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """One plain value of each process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Replace FP32 tensors by their sums over all processes; every process ends up with the same bits."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
                _sum_bucket(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            _sum_bucket(bucket)

    def average_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace FP32 tensors by their means over all processes."""
        if self.size > 1 and tensors:
            self.sum_tensors(tensors)
            torch._foreach_div_(list(tensors), float(self.size))

    def share_model(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, 0)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def _sum_bucket(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def join_world(device: str) -> World:
    """The world that torchrun describes in the environment, or a world of one.

    The process group lives as long as the process: the runs of a sweep share it.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: a device that this machine does not have.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device, local_rank)
    if size == 1:
        return World(device=chosen)
    if "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE: got {size} without RANK, expected a start by torchrun")
    if not dist.is_initialized():
        store, rank, size = next(iter(rendezvous("env://")))
        # torchrun's store outlives a restart, and with it the addresses of the processes that died. Over several nodes
        # the count differs between them: there, torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device of a setting.

    Raises:
        UserError: a CUDA device that is not there.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(f"device: got {device} for process {local_rank}, expected cpu (CUDA devices here: {found})")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
