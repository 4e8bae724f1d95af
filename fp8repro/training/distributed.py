"""The processes of a run under torchrun: exact sums, the same state on each. A single process is a world of one."""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from fp8repro.errors import UserError

# Elements of one all-reduce; larger ones are no faster.
BUCKET = 2**24
CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process, and how many there are.

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
        """Wait for all processes."""
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

    WORLD_SIZE and RANK describe a world, both or neither; LOCAL_RANK is the GPU of the machine (default: the first);
    several processes need MASTER_ADDR and MASTER_PORT. Slurm's own variables are not read: scripts/slurm.sbatch sets
    these from them.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: inconsistent variables, no connection to the first process, or a device that this machine lacks.
    """
    rank, size = environment_rank()
    local_rank = _number("LOCAL_RANK", 0)
    if local_rank >= max(size, 1) and size > 1:
        raise UserError(f"LOCAL_RANK: got {local_rank} with WORLD_SIZE={size}, expected a number from 0 to {size - 1}")
    chosen = choose_device(device, local_rank)
    if size == 1:
        return World(device=chosen)
    if not dist.is_initialized():
        store = _store(rank)
        # torchrun's store outlives a restart, and with it the addresses of the processes that died. Over several nodes
        # the count differs between them: there, torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # Threads of a group that still runs when the interpreter ends abort the process now and then. This module,
        # which torch loads when it compiles something, keeps the group that it finds as a default argument.
        importlib.import_module("torch.distributed.nn.functional")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), chosen)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def environment_rank() -> tuple[int, int]:
    """Rank and size of the world that the environment describes; 0 and 1 where it describes none.

    Raises:
        UserError: RANK or WORLD_SIZE is no such number, or there is one without the other.
    """
    size = _number("WORLD_SIZE", 1, least=1)
    if "RANK" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"RANK: got {os.environ['RANK']!r} without WORLD_SIZE, expected both, as torchrun sets them, or neither"
        )
    if size > 1 and "RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE: got {size} without RANK, expected both, as torchrun sets them, or neither")
    rank = _number("RANK", 0)
    if rank >= size:
        raise UserError(f"RANK: got {rank} with WORLD_SIZE={size}, expected a number from 0 to {size - 1}")
    return rank, size


def _number(variable: str, default: int, least: int = 0) -> int:
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise UserError(f"{variable}: got {text!r}, expected a whole number from {least} on")
    return int(text)


def _store(rank: int) -> dist.Store:
    """The store through which the processes find each other."""
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise UserError("MASTER_ADDR: missing, expected the machine of rank 0, as torchrun sets it")
    if "MASTER_PORT" not in os.environ:
        raise UserError("MASTER_PORT: missing, expected a free port of the machine of rank 0, as torchrun sets it")
    port = _number("MASTER_PORT", 0)
    if port > 65535:
        raise UserError(f"MASTER_PORT: got {port}, expected a number from 0 to 65535")
    try:
        store: dist.Store = next(iter(rendezvous("env://")))[0]
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"MASTER_ADDR: process {rank} cannot use {address}:{port} ({reason:.200}), expected rank 0 to listen there"
        ) from None
    return store


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
