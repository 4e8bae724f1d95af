"""Which kernel walks a set of tensors: one pass over memory where order is free, else in logical order.

Knows shapes and strides only; it never touches data.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch

from fp8repro.numerics.reference import counted

Strides = tuple[int, ...]
# Runs shorter than this cost more to find than a copy of the whole tensor, and so do narrower matrices.
SHORTEST_RUN = 16
# Elements of a Philox call: as many rows of a matrix are walked at once.
PER_CALL = 8


@functools.lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...], x: Strides, outputs: tuple[Strides, ...], has_values: bool, ordered: bool
) -> tuple[str, tuple[Any, ...]]:
    """Name and arguments of the kernel for these strides.

    Args:
        shape: the common shape.
        x: strides of the input.
        outputs: strides of values and codes, those that are there.
        has_values: whether the first output is the values.
        ordered: elements must be visited with their logical index.

    Returns:
        ("linear", (count,)), ("transposed", (matrices, rows, columns)), ("runs", (dimensions, layout)) or
        ("copy", ()) when a contiguous copy is the way.
    """
    sizes, strides = _collapse(shape, (x, *outputs))
    first = strides[0]
    if all(other == first for other in strides):
        in_memory = sorted(zip(first, sizes, strict=True))
        dense = all(stride == math.prod(size for _, size in in_memory[:i]) for i, (stride, _) in enumerate(in_memory))
        if dense and (not ordered or len(sizes) <= 1):
            return "linear", (math.prod(sizes),)
        matrices = _transposed(sizes, first)
        if matrices is not None and matrices[1] % PER_CALL == 0 and matrices[2] >= SHORTEST_RUN:
            return "transposed", matrices
    if all(each[-1] == 1 for each in strides) and sizes[-1] >= SHORTEST_RUN:
        return "runs", _runs(sizes, strides, has_values)
    return "copy", ()


@functools.lru_cache(maxsize=4096)
def counted_matrices(shape: tuple[int, ...], strides: Strides, order: str) -> tuple[int, int, int] | None:
    """(matrices, rows, columns) of a dense tensor whose matrices lie as [rows, columns] and count as [columns, rows].

    `order` is how its elements count (`reference.counted`). No rows where that is how they lie; None for other tensors.
    """
    in_order = counted(torch.empty_strided(shape, strides, device="meta"), order)
    if in_order.is_contiguous():
        return 1, 0, in_order.numel()
    sizes, (steps,) = _collapse(tuple(in_order.shape), (in_order.stride(),))
    if len(sizes) == 1 and steps[0] == 1:
        return 1, 0, sizes[0]
    return _transposed(sizes, steps)


def _transposed(sizes: list[int], strides: list[int]) -> tuple[int, int, int] | None:
    whole = len(sizes) in (2, 3) and strides[-2] == 1 and strides[-1] == sizes[-2]
    if not whole or (len(sizes) == 3 and strides[0] != sizes[1] * sizes[2]):
        return None
    return math.prod(sizes[:-2]), sizes[-1], sizes[-2]


def _collapse(shape: tuple[int, ...], strides: tuple[Strides, ...]) -> tuple[list[int], list[list[int]]]:
    """Drop dimensions of one element and join neighbours that lie as one in every tensor."""
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for dimension, size in enumerate(shape):
        if size == 1:
            continue
        steps = [each[dimension] for each in strides]
        if sizes and all(outer[-1] == step * size for outer, step in zip(kept, steps, strict=True)):
            sizes[-1] *= size
            for outer, step in zip(kept, steps, strict=True):
                outer[-1] = step
        else:
            sizes.append(size)
            for outer, step in zip(kept, steps, strict=True):
                outer.append(step)
    if not sizes:
        return [1], [[1] for _ in strides]
    return sizes, kept


def _runs(sizes: list[int], strides: list[list[int]], has_values: bool) -> tuple[int, Any]:
    outer = len(sizes) - 1
    absent = [0] * outer
    x, *outputs = [each[:-1] for each in strides]
    values = outputs.pop(0) if has_values else absent
    codes = outputs.pop(0) if outputs else absent
    logical = [math.prod(sizes[dimension + 1 :]) for dimension in range(outer)]
    # As they lie in memory: runs that are pages apart (attention heads) would miss every cache.
    order = sorted(range(outer), key=lambda dimension: -x[dimension])
    layout = [each[d] for each in (sizes, x, values, codes, logical) for d in order] + sizes[-1:]
    return outer, (ctypes.c_int64 * len(layout))(*layout)
