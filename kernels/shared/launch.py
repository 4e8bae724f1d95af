"""How every kernel starts: on its tensors' device, on a GPU or in Triton's interpreter.

Holds no numerics and no tuning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from fp8repro.numerics.streams import Stream, StreamSlot

# Those of the open blocks of `counted_launches`. Global, because autograd launches kernels from its own threads.
_COUNTERS: list[Counter[str]] = []


@triton.jit
def _probe() -> None:
    pass


# Decided by TRITON_INTERPRET when Triton is imported. Compiled kernels take CUDA tensors only, interpreted ones CPU
# tensors only.
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """Start `kernel` over `grid` on `device`; an empty grid starts nothing."""
    if 0 in grid:
        return
    for counter in _COUNTERS:
        counter[kernel.fn.__name__] += 1
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count the launches within a block by the kernels' names, those of all threads."""
    _COUNTERS.append(Counter())
    try:
        yield _COUNTERS[-1]
    finally:
        _COUNTERS.pop()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that kernels are compiled for on a device; (0, 0) where they are interpreted."""
    return (0, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


def check_device(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the kernels, as they were built, can reach the tensor.

    Raises:
        ValueError: the tensor is on the wrong device.
    """
    expected = "cpu (TRITON_INTERPRET is set)" if INTERPRETED else "cuda"
    if tensor.device.type != expected.split()[0]:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {expected}")


def signed_words(value: Stream) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """Low and high 32-bit words of a 64-bit integer, as int32 values, so that every launch has the same types.

    Of a stream in device memory, the int32 tensors that a kernel takes as pointers.
    """
    if isinstance(value, StreamSlot):
        return value.words()
    words = (value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF)
    low, high = (word - (1 << 32) if word >> 31 else word for word in words)
    return low, high


def cdiv(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`. Triton's own takes the host five microseconds."""
    return -(-count // size)


def block_size(largest: int, count: int, interpreted: int = 1 << 16) -> int:
    """Elements a program: `largest` on a GPU; in the interpreter, whose cost is per program, as many as there are."""
    if INTERPRETED:
        return min(interpreted, max(largest, triton.next_power_of_2(count)))
    return largest
