"""Many tensors in one launch: a table of addresses in device memory, and which block of which tensor a program takes.

Knows neither what other columns mean nor what is done with a block.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import RandomWords
from fp8repro.kernels.shared.launch import cdiv


@triton.jit
def tensor_at(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a column of a table's row."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    # Loads are vectors only where the compiler knows the alignment.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def words_of(stream, seed0, seed1):
    """Random words of a stream that was loaded as one int64."""
    low, high = (stream & 0xFFFFFFFF).to(tl.uint32), (stream >> 32).to(tl.uint32)
    return RandomWords(seed0, seed1, low, high)


@triton.jit
def draws_of_block(words, first, offset, matrix_ptr, PERMUTED: tl.constexpr, BLOCK: tl.constexpr):
    """Random draws of a block's elements, in the order in which they count.

    PERMUTED: matrices that are [rows, columns] (int64, at `matrix_ptr`) in memory and count as [columns, rows].
    """
    if PERMUTED:
        rows = tl.load(matrix_ptr)
        columns = tl.load(matrix_ptr + 1)
        inner = offset % (rows * columns)
        index = offset - inner + inner % columns * rows + inner // columns
        draw = codec.draw_of_index(index, words)
    else:
        group = first // 8 + tl.arange(0, BLOCK // 8)
        w0, w1, w2, w3 = codec.words_of_blocks(group, words)
        draw = tl.reshape(codec.draws_of_words(w0, w1, w2, w3), [BLOCK])
    return draw


# Training has the same tensors at every step; a table that is made anew costs the host more than its launch.
@lru_cache(maxsize=64)
def table_of(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Rows of signed 64-bit integers in device memory; the same tensor for the same rows, so nobody may write to it."""
    return to_device(torch.tensor(rows, dtype=torch.int64), device)


@lru_cache(maxsize=64)
def blocks_of(counts: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """int64 [programs, 2]: tensor and block of a program, for tensors of so many elements. Nobody may write to it."""
    blocks = torch.tensor([cdiv(count, block) for count in counts])
    tensor = torch.repeat_interleave(torch.arange(len(counts)), blocks)
    first = blocks.cumsum(0) - blocks
    pairs = torch.stack([tensor, torch.arange(len(tensor)) - first[tensor]], 1)
    return to_device(pairs.contiguous(), device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values from the host, without waiting for the device."""
    # From pinned memory, which the allocator reuses when the copy has read it, and not before.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
