"""Streams of random bits in device memory, so that a replayed CUDA graph draws the bits of its own step.

Nothing here draws a bit, or decides what a stream is called (context.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Half a megabyte; a ResNet-50 takes 200 slots, a recurrent network some for every time step.
CAPACITY = 1 << 16


@dataclass(frozen=True)
class StreamSlot:
    """A stream whose value lies in device memory when a kernel reads it.

    Attributes:
        table: int32 [slots, 2], low and high words.
        index: the stream's row.
    """

    table: Tensor
    index: int

    def words(self) -> tuple[Tensor, Tensor]:
        """Views of both words, which kernels take as pointers."""
        low, high = self.table[self.index].split(1)
        return low, high


# What a kernel's random bits are named by: the 64-bit number itself, or where it will lie.
Stream = int | StreamSlot
# Module, call, operand and role; with a step, a micro-step and a rank these make a stream's number.
Name = tuple[str, int, str, str]


def signed64(word: int) -> int:
    """A 64-bit word as the signed integer of the same bits, which tensors and operators take."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


class StreamTable:
    """Gives every operand of a step a slot, in order of first use, and fills all slots for a step in one copy."""

    def __init__(self, device: torch.device, capacity: int = CAPACITY) -> None:
        """`capacity` is the largest number of slots: the memory must stay where it is once a graph reads it."""
        self._words = torch.zeros((capacity, 2), dtype=torch.int32, device=device)
        self._slots: dict[Name, int] = {}

    def __len__(self) -> int:
        """Slots given so far."""
        return len(self._slots)

    def slot(self, name: Name) -> StreamSlot:
        """The slot of an operand.

        Raises:
            ValueError: all slots are given.
        """
        index = self._slots.setdefault(name, len(self._slots))
        if index >= len(self._words):
            raise ValueError(f"capacity: got {len(self._words)} slots, expected one for each random operand of a step")
        return StreamSlot(self._words, index)

    def span(self, names: Sequence[Name]) -> Tensor:
        """The streams of operands that have no slot yet, side by side: int64 [names].

        Raises:
            ValueError: an operand has a slot, or all slots are given.
        """
        first = len(self._slots)
        for expected, name in enumerate(names, first):
            if self.slot(name).index != expected:
                raise ValueError(f"names: got {name}, which has a slot, expected operands without one")
        return self._words[first : first + len(names)].view(torch.int64).squeeze(1)

    def refresh(self, number: Callable[[str, int, str, str], int]) -> None:
        """Write the number of every slot's stream, without waiting for the device."""
        if not self._slots:
            return
        # An unsigned 64-bit number is its low and its high word in this order on every machine with a GPU.
        words = torch.frombuffer(array("Q", (number(*name) for name in self._slots)), dtype=torch.int32).view(-1, 2)
        if self._words.is_cuda:
            # Fresh pinned memory each time: the allocator reuses it when the copy has read it, and not before.
            words = words.pin_memory()
        self._words[: len(words)].copy_(words, non_blocking=True)
