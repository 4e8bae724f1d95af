"""Batch normalization + residual + ReLU, and layer normalization, forward and backward; codes of results beside them.

Inputs may be 8-bit tensors; arithmetic and results are FP32. Training mode only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fp8repro.kernels.norm import device as kernels
from fp8repro.kernels.quantize.launch import PER_CALL, random_words, raw_codes
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import INTERPRETED, block_size, capability, cdiv, check_device, launch
from fp8repro.numerics.formats import FP32, FloatFormat
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
TILE = 4096  # elements of a program's tile of rows and channels
TILE_CHANNELS = 64
SUMMED_ROWS = 32  # of a tile whose columns are summed
# Few channels a program, 32 bytes of each row of partial sums: many multiprocessors share what one would wait for.
COMBINE_BLOCK, COMBINE_CHUNKS, COMBINE_WARPS = 8, 256, 8


@dataclass(frozen=True)
class BatchNormResult:
    """What `batch_norm` gives.

    Attributes:
        y: FP32 [B, C, H, W], channels_last; None where only codes are wanted.
        flags: uint8 [B * H * W, ceil(C / 8)], a bit a channel, set where the ReLU let it pass; None without ReLU.
        codes: of the rounded result, where asked for.
        kept: codes of the input in the format that was asked for.
    """

    y: Tensor | None
    flags: Tensor | None
    codes: Tensor | None = None
    kept: Tensor | None = None


def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor, momentum: float, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Statistics over batch and pixels; the running ones move, in place.

    Args:
        x: [B, C, H, W] of any floating-point dtype.
        running_mean, running_var: FP32 [C]; the latter is of unbiased variances.
        batches: int64 scalar, counts one more.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        FP32 [C]: mean, and rstd, which is 1 / sqrt(biased variance + eps).

    Raises:
        ValueError: an argument does not fit, or there is nothing to take statistics of; nothing was launched.
    """
    _check_image(x, "x")
    channels = x.shape[1]
    _check_vectors(channels, x.device, running_mean=running_mean, running_var=running_var)
    if batches.numel() != 1 or batches.dtype != torch.int64 or batches.device != x.device:
        given = f"{batches.dtype} of shape {tuple(batches.shape)} on {batches.device}"
        raise ValueError(f"batches: got {given}, expected one torch.int64 on {x.device}")
    partial, chunk = _sums(kernels.channel_statistics, (_rows(x),), x.numel() // channels, channels)
    mean, rstd = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    running = (running_mean, running_var, batches)
    sizes = (x.numel() // channels, channels, chunk)
    _combine(kernels.combine_statistics, partial, mean, rstd, *running, *sizes, momentum, eps)
    return mean, rstd


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    how: Rounding | None = None,
    kept: FloatFormat | None = None,
    codes_only: bool = False,
) -> BatchNormResult:
    """Normalize, add the residual, clamp: one read of x, one write.

    Args:
        x: [B, C, H, W] of any floating-point dtype; what `batch_norm_backward` wants again, or its `kept` codes.
        weight: FP32 [C].
        bias: FP32 [C].
        mean, rstd: what `batch_statistics` gave for x.
        residual: like x in shape, of any floating-point dtype.
        relu: clamp at zero.
        how: rounding, without random bits, whose codes of the result are written in the same pass.
        kept: format that holds every value of x; its codes are written in the same pass.
        codes_only: the FP32 result is not wanted.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    _check_rounding(how)
    _check_image(x, "x")
    channels = x.shape[1]
    _check_vectors(channels, x.device, weight=weight, bias=bias, mean=mean, rstd=rstd)
    if residual is not None:
        _check_like("residual", residual, x)
    y = None if codes_only else _empty(x, FP32)
    codes = None if how is None else _empty(x, how.format)
    stored = None if kept is None else _empty(x, kept)
    rows = x.numel() // channels
    flags = torch.empty((rows, cdiv(channels, 8)), dtype=torch.uint8, device=x.device) if relu else None
    grid, sides = _tiles(rows, channels)
    launch(
        kernels.batch_apply,
        grid,
        x.device,
        _rows(x),
        mean,
        rstd,
        weight,
        bias,
        None if residual is None else _rows(residual),
        y,
        None if codes is None else _raw(codes),
        None if stored is None else _raw(stored),
        flags,
        rows,
        channels,
        ENCODING=_encoding(how, x.device),
        KEPT=_encoding(None if kept is None else Rounding(kept), x.device),
        RELU=relu,
        **sides,
    )
    return BatchNormResult(y, flags, codes, stored)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    flags: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    more: Tensor | None = None,
    needs_residual: bool = False,
    how: Rounding = IDENTITY,
    bits: RandomBits = RandomBits(),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """FP32 gradients of input, weight, bias, and of the residual; that of the input may be wanted as codes.

    Args:
        grad: gradient of the result, of any floating-point dtype.
        x: the forward pass's input.
        weight: FP32 [C].
        flags: those that `batch_norm` gave.
        mean, rstd: those of x, whose dependence on x the gradient accounts for.
        more: a second term of the result's gradient, or None.
        needs_residual: give the residual's gradient too.
        how, bits: rounding to an 8-bit format whose codes are the input's gradient; elements are counted channels last.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    _check_image(x, "x")
    _check_like("grad", grad, x)
    channels = x.shape[1]
    _check_vectors(channels, x.device, weight=weight, mean=mean, rstd=rstd)
    rows = x.numel() // channels
    if more is not None:
        _check_like("more", more, x)
    if flags is not None and (flags.shape != (rows, cdiv(channels, 8)) or flags.dtype != torch.uint8):
        expected = f"torch.uint8 of shape {(rows, cdiv(channels, 8))}"
        raise ValueError(f"flags: got {flags.dtype} of shape {tuple(flags.shape)}, expected {expected}")
    tensors = (_rows(grad), None if more is None else _rows(more), flags, _rows(x), mean, rstd)
    partial, _ = _sums(kernels.batch_gradient_sums, tensors, rows, channels)
    grad_weight, grad_bias = (torch.empty(channels, dtype=torch.float32, device=x.device) for _ in range(2))
    _combine(kernels.combine_gradient_sums, partial, grad_weight, grad_bias, channels, partial.shape[0])
    grad_x = _empty(x, FP32 if how.is_identity else how.format)
    residual = _empty(x, FP32) if needs_residual else None
    grid, sides = _tiles(rows, channels)
    launch(
        kernels.batch_gradient_apply,
        grid,
        x.device,
        *tensors,
        weight,
        grad_weight,
        grad_bias,
        _raw(grad_x),
        residual,
        rows,
        channels,
        1 / rows,
        *random_words(bits),
        ENCODING=_encoding(how, x.device),
        WHOLE_GROUPS=channels % PER_CALL == 0,
        **sides,
    )
    return grad_x, grad_weight, grad_bias, residual


def add(a: Tensor, b: Tensor) -> Tensor:
    """FP32 sum of two tensors of one shape and layout, of any floating-point dtypes.

    Raises:
        ValueError: they do not fit each other; nothing was launched.
    """
    check_device("a", a)
    _check_like("b", b, a)
    if a.stride() != b.stride():
        raise ValueError(f"b: got strides {b.stride()}, expected {a.stride()}")
    total = torch.empty_like(a, dtype=torch.float32)
    block = block_size(1024, a.numel())
    launch(kernels.add, (cdiv(a.numel(), block),), a.device, a, b, total, a.numel(), BLOCK=block)
    return total


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    how: Rounding | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalize the last dimension of x [..., D].

    Returns:
        Result (FP32 [..., D]), mean and rstd (FP32, one a row), and the codes that `how`, a rounding without random
        bits, gives of the result.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    _check_rounding(how)
    width, rows = _check_rows(x, weight, bias)
    y = torch.empty(x.shape, device=x.device)
    codes = None if how is None else torch.empty(x.shape, dtype=how.format.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    height, block = _row_block(rows, width)
    launch(
        kernels.layer_forward,
        (cdiv(rows, height),),
        x.device,
        x.contiguous(),
        weight,
        bias,
        y,
        None if codes is None else _raw(codes),
        mean,
        rstd,
        rows,
        width,
        eps,
        ENCODING=_encoding(how, x.device),
        ROWS=height,
        BLOCK=block,
    )
    return y, mean, rstd, codes


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """FP32 gradients of input, weight and bias.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    width, rows = _check_rows(x, weight, weight)
    _check_like("grad", grad, x)
    grad_x = torch.empty(x.shape, device=x.device)
    height, block = _row_block(rows, width)
    programs = min(cdiv(rows, height), 4 if INTERPRETED else 512)
    partial = torch.zeros((max(programs, 1), 2, width), dtype=torch.float32, device=x.device)
    launch(
        kernels.layer_backward,
        (programs,),
        x.device,
        grad.contiguous(),
        x.contiguous(),
        weight,
        mean,
        rstd,
        grad_x,
        partial,
        rows,
        width,
        ROWS=height,
        BLOCK=block,
    )
    sums = partial.sum(0)
    return grad_x, sums[0], sums[1]


def _raw(codes: Tensor) -> Tensor:
    return codes if codes.dtype == torch.float32 else raw_codes(codes)


def _encoding(how: Rounding | None, device: torch.device) -> codec.Encoding | None:
    return None if how is None else codec.encoding(how, capability(device))


def _check_rounding(how: Rounding | None) -> None:
    if how is not None and (how.is_stochastic or how.format.dtype is None):
        raise ValueError(f"how: got {how}, expected a rounding without random bits to a format with a storage dtype")


def _rows(t: Tensor) -> Tensor:
    """[B, C, H, W] with the memory of contiguous [B, H, W, C]; a copy unless it is channels_last already."""
    return t.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, format: FloatFormat) -> Tensor:
    return torch.empty(x.shape, dtype=format.dtype, device=x.device, memory_format=torch.channels_last)


def _tiles(rows: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and sides of the tiles that cover [rows, channels]."""
    block = block_size(TILE_CHANNELS, channels, 512)
    height = block_size(TILE // TILE_CHANNELS, rows, 512)
    whole = rows % height == 0 and channels % block == 0
    return (cdiv(rows, height) * cdiv(channels, block),), {"ROWS": height, "BLOCK": block, "WHOLE": whole}


def _sums(kernel: object, tensors: tuple[Tensor | None, ...], rows: int, channels: int) -> tuple[Tensor, int]:
    """Partial sums [chunks, 2, channels] over chunks of rows, and the number of rows of each chunk but the last."""
    device = next(t for t in tensors if t is not None).device
    block = block_size(TILE_CHANNELS, channels, 512)
    height = block_size(SUMMED_ROWS, rows, 512)
    # About two thousand programs: enough for any GPU, few enough to combine cheaply.
    chunks = max(1, min(cdiv(rows, 4 * height), cdiv(2048, cdiv(channels, block))))
    chunk = cdiv(cdiv(rows, chunks), height) * height
    chunks = cdiv(rows, chunk)
    whole = rows % height == 0 and channels % block == 0
    partial = torch.empty((chunks, 2, channels), dtype=torch.float32, device=device)
    grid = (cdiv(channels, block), chunks)
    launch(kernel, grid, device, *tensors, partial, rows, channels, chunk, WHOLE=whole, ROWS=height, BLOCK=block)
    return partial, chunk


def _combine(kernel: object, partial: Tensor, *arguments: Any) -> None:
    """Add the partial sums of `_sums`, and let `kernel` write what follows from them."""
    chunks, _, channels = partial.shape
    block = block_size(COMBINE_BLOCK, channels, 512)
    options = {"CHUNKS": block_size(COMBINE_CHUNKS, chunks, 512), "BLOCK": block, "num_warps": COMBINE_WARPS}
    launch(kernel, (cdiv(channels, block),), partial.device, partial, *arguments, **options)


def _row_block(rows: int, width: int) -> tuple[int, int]:
    block = triton.next_power_of_2(width)
    return block_size(max(1, 2048 // block), rows, max(1, (1 << 16) // block)), block


def _check_image(x: Tensor, name: str) -> None:
    check_device(name, x)
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(f"{name}: got {x.dtype} of shape {tuple(x.shape)}, expected floating-point [B, C, H, W]")
    if x.numel() // max(1, x.shape[1]) < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected more than one value per channel")


def _check_rows(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[int, int]:
    check_device("x", x)
    if x.dim() < 1 or x.dtype not in DTYPES or not 0 < x.shape[-1] <= 32768:
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected floating-point [..., D], D up to 32768")
    _check_vectors(x.shape[-1], x.device, weight=weight, bias=bias)
    return x.shape[-1], x.numel() // x.shape[-1]


def _check_vectors(size: int, device: torch.device, **vectors: Tensor) -> None:
    for name, vector in vectors.items():
        fits = vector.shape == (size,) and vector.dtype == torch.float32 and vector.is_contiguous()
        if not fits or vector.device != device:
            given = f"{vector.dtype} of shape {tuple(vector.shape)} and strides {vector.stride()} on {vector.device}"
            raise ValueError(f"{name}: got {given}, expected contiguous torch.float32 of shape ({size},) on {device}")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape or tensor.device != x.device or tensor.dtype not in DTYPES:
        given = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: got {given}, expected floating-point of shape {tuple(x.shape)} on {x.device}")
