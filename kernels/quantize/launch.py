"""The Triton quantizer: reference.py's bytes for any shape and strides, with statistics in the same pass.

Checks arguments and picks the kernel. Must never keep generator state.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.guards import check_rounding
from fp8repro.kernels.quantize import device as kernels
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import block_size, capability, cdiv, check_device, launch, signed_words
from fp8repro.numerics.formats import FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding

FLAT_BLOCK = 2048
TILE_ROWS, TILE_COLUMNS = 32, 128  # where codes are written transposed, too
PER_CALL = 8  # elements that share a Philox block
MAX_DIMS = 4
GRID_LIMIT = 65535  # CUDA's, in the two outer directions


def round_into(
    x: Tensor,
    how: Rounding,
    bits: RandomBits,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Round `x` in one pass into preallocated outputs (see `quantizer.round_into`); elements are counted row-major.

    Raises:
        ValueError: an argument's device, dtype or shape is not what the kernel takes; nothing was launched.
    """
    _check(x, how.format, values, codes, stats)
    if x.numel() == 0:
        return
    if how.is_identity:
        # The identity; not worth a kernel.
        _copy_identity(x, values, codes, stats)
        return
    if any(t is not None and t.is_neg() for t in (x, values, codes)):
        _round_copies(x, how, bits, values, codes, stats)
        return
    options = {"ENCODING": codec.encoding(how, capability(x.device))}
    words = random_words(bits)
    outputs = (None if values is None else _raw(values), None if codes is None else raw_codes(codes))
    present = [_raw(x), *(t for t in outputs if t is not None)]
    sizes, strides = _collapse(tuple(x.shape), tuple(t.stride() for t in present), how.is_stochastic)
    count = x.numel()
    pointers = (_raw(x), *outputs, stats)

    if len(sizes) == 1 and all(s == (1,) for s in strides):
        # Where threads cannot load vectors, each mask takes a register.
        block = block_size(FLAT_BLOCK if count % 16 == 0 else FLAT_BLOCK // 2, count)
        blocks = cdiv(count, block)
        grid = min(blocks, _resident_programs(x.device)) if stats is not None else blocks
        launch(kernels.round_flat, (grid,), x.device, *pointers, count, *words, **options, BLOCK=block)
        return
    shape = _as_columns(sizes, strides)
    if shape is not None:
        outer, columns, rows, outer_stride, row_stride = shape
        block = block_size(64 if columns <= 64 else 128, columns, 1024)
        groups = block_size(512 // block if block <= 128 else 4, cdiv(rows, PER_CALL), 64)
        grid3 = (cdiv(columns, block), cdiv(rows, PER_CALL * groups), outer)
        arguments = (*pointers, columns, rows, outer_stride, row_stride, *words)
        launch(kernels.round_columns, grid3, x.device, *arguments, **options, GROUPS=groups, BLOCK=block)
        return
    if len(sizes) > MAX_DIMS:
        # Rare: five dimensions that do not merge. One copy makes them one.
        _round_copies(x, how, bits, values, codes, stats)
        return
    padding = MAX_DIMS - len(sizes)
    sizes = (1,) * padding + sizes
    padded = iter([(0,) * padding + s for s in strides])
    all_strides = [next(padded), *((next(padded) if t is not None else (0,) * MAX_DIMS) for t in outputs)]
    block = block_size(512, count)
    arguments = (*pointers, count, *sizes[1:], *all_strides, *words)
    launch(kernels.round_strided, (cdiv(count, block),), x.device, *arguments, **options, BLOCK=block)


def _round_copies(
    x: Tensor, how: Rounding, bits: RandomBits, values: Tensor | None, codes: Tensor | None, stats: Tensor | None
) -> None:
    """Round a contiguous copy, for tensors whose strides no kernel takes."""
    inner = _dense_like(values), _dense_like(codes)
    round_into(x.resolve_neg().contiguous(), how, bits, *inner, stats)
    for target, copy in zip((values, codes), inner, strict=True):
        if target is not None and copy is not None:
            target.copy_(copy)


def round_transpose(
    x: Tensor,
    how: Rounding,
    bits: RandomBits = RandomBits(),
    stats: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Round [..., M, K] once and write its codes in both layouts in the same pass.

    FP8 tensor-core instructions take both operands with the summed dimension contiguous, so a tensor
    that is an operand of two products is wanted as [..., M, K] and as [..., K, M].

    Args:
        x: rows of a matrix may lie apart; anything else is copied first.
        how, bits, stats: see `round_into`.
        out: where to write the results; new tensors by default.

    Returns:
        Codes [..., M, K] and [..., K, M], contiguous, in the format's storage dtype; the bytes are `round_into`'s.

    Raises:
        ValueError: `x` has under two dimensions, or is on the wrong device, or of the wrong dtype.
    """
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., M, K]")
    format = how.format
    if format.dtype is None or how.is_identity:
        raise ValueError(f"format: got {format.name}, expected a format of 8 or 16 bits with a storage dtype")
    if out is None:
        shapes = (x.shape, (*x.shape[:-2], x.shape[-1], x.shape[-2]))
        out = tuple(torch.empty(shape, dtype=format.dtype, device=x.device) for shape in shapes)  # type: ignore[assignment]
    codes, transposed = out  # type: ignore[misc]
    _check(x, format, None, codes, stats)
    _check_transposed(codes, transposed)
    if x.numel() == 0:
        return codes, transposed
    x = x.resolve_neg()
    rows, columns = x.shape[-2:]
    batch = x.numel() // (rows * columns)
    row_block, column_block = block_size(TILE_ROWS, rows, 256), block_size(TILE_COLUMNS, columns, 256)
    grid = (cdiv(rows, row_block), cdiv(columns, column_block), batch)
    if max(grid[1:]) > GRID_LIMIT:
        round_into(x, how, bits, None, codes, stats)
        transposed.copy_(codes.transpose(-1, -2))
        return codes, transposed
    dense = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()
    # Where rows divide, the codes of neighbouring rows are stored as one 32-bit integer.
    packed = 4 // codes.element_size()
    target = raw_codes(transposed).view(-1)
    if rows % packed == 0 and target.storage_offset() % packed == 0:
        target = target.view(torch.int32)
    else:
        packed = 1
    launch(
        kernels.round_transpose,
        grid,
        x.device,
        _raw(dense),
        raw_codes(codes),
        target,
        stats,
        rows,
        columns,
        dense.stride(-2),
        *random_words(bits),
        ENCODING=codec.encoding(how, capability(x.device)),
        WHOLE_GROUPS=columns % PER_CALL == 0,
        PACKED=packed,
        ROWS=row_block,
        COLUMNS=column_block,
    )
    return codes, transposed


def _check_transposed(codes: Tensor, transposed: Tensor) -> None:
    expected = (*codes.shape[:-2], codes.shape[-1], codes.shape[-2])
    if transposed.shape != expected or transposed.dtype != codes.dtype or transposed.device != codes.device:
        given = f"{transposed.dtype} of shape {tuple(transposed.shape)} on {transposed.device}"
        raise ValueError(f"transposed: got {given}, expected {codes.dtype} of shape {expected} on {codes.device}")
    for name, tensor in (("codes", codes), ("transposed", transposed)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tensor.stride()}, expected contiguous")


def random_words(bits: RandomBits) -> tuple[Any, ...]:
    """The words of seed and stream as kernels take them (`launch.signed_words`)."""
    return (*signed_words(bits.seed), *signed_words(bits.stream))


def _raw(t: Tensor) -> Tensor:
    """What a kernel takes for a tensor of values: BF16 as int16, because no cast may touch it."""
    return t.view(torch.int16) if t.dtype == torch.bfloat16 else t


def raw_codes(t: Tensor) -> Tensor:
    """What a kernel takes for a tensor of codes: integers of the same width."""
    return t.view(torch.uint8 if t.element_size() == 1 else torch.int16)


def _dense_like(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


def _copy_identity(x: Tensor, values: Tensor | None, codes: Tensor | None, stats: Tensor | None) -> None:
    if stats is not None:
        finite = torch.where(torch.isfinite(x), x, 0).abs()
        stats[0] += (finite != 0).sum()
        stats[3] = torch.maximum(stats[3], finite.max().to(torch.float64))
    for target in (values, codes):
        if target is not None:
            target.copy_(x)


# A network's tensors have few layouts, and this costs the host as much as a launch.
@lru_cache(maxsize=4096)
def _collapse(
    sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...], ordered: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Merge dimensions that are contiguous in every tensor; unless order counts, sort them by x's strides first."""
    dims = [d for d in range(len(sizes)) if sizes[d] != 1]
    if not ordered:
        dims.sort(key=lambda d: -strides[0][d])
    merged: list[tuple[int, list[int]]] = []
    for d in dims:
        step = [s[d] for s in strides]
        if merged and all(before == inner * sizes[d] for before, inner in zip(merged[-1][1], step, strict=True)):
            merged[-1] = (merged[-1][0] * sizes[d], step)
        else:
            merged.append((sizes[d], step))
    if not merged:
        merged = [(1, [1] * len(strides))]
    steps = tuple(tuple(step[i] for _, step in merged) for i in range(len(strides)))
    return tuple(size for size, _ in merged), steps


def _as_columns(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple[int, int, int, int, int] | None:
    """(outer, columns, rows, outer stride, row stride) when `round_columns` takes the tensors, else None."""
    if len(sizes) not in (2, 3) or len(set(strides)) != 1 or strides[0][-2] != 1 or sizes[-1] % PER_CALL:
        return None
    outer, outer_stride = (sizes[0], strides[0][0]) if len(sizes) == 3 else (1, 0)
    if outer > GRID_LIMIT or sizes[-1] // 16 >= GRID_LIMIT:
        return None
    return outer, sizes[-2], sizes[-1], outer_stride, strides[0][-1]


def _check(x: Tensor, format: FloatFormat, values: Tensor | None, codes: Tensor | None, stats: Tensor | None) -> None:
    check_device("x", x)
    value_dtypes = (torch.float32, torch.bfloat16) if format.mantissa_bits <= 7 else (torch.float32,)
    check_rounding(x, format, values, codes, stats, value_dtypes)
