"""Batch normalization + residual + ReLU, and layer normalization, forward and backward; codes of results beside them.

Inputs may be 8-bit tensors; arithmetic and results are FP32. Training mode only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fp8repro.kernels.matmul.launch import raw_result
from fp8repro.kernels.norm import device as kernels
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import INTERPRETED, block_size, capability, cdiv, check_device, launch
from fp8repro.numerics.formats import FP32, FloatFormat
from fp8repro.numerics.rounding import Rounding

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
FLAT_BLOCK = 1024
NARROW = (1 << 31) - (1 << 17)  # so many elements have 32-bit offsets, with the masked ones of the last block


@dataclass(frozen=True)
class BatchNormResult:
    """What `batch_norm` gives.

    Attributes:
        y: FP32 [B, C, H, W], channels_last.
        flags: uint8, one bit an element in memory order, set where the ReLU let it pass; None without ReLU.
        mean, rstd: FP32 [C]; rstd is 1 / sqrt(variance + eps).
        variance: FP32 [C], biased.
        codes: of the rounded result, where asked for.
        kept: codes of the input in the format that was asked for.
    """

    y: Tensor
    flags: Tensor | None
    mean: Tensor
    rstd: Tensor
    variance: Tensor
    codes: Tensor | None = None
    kept: Tensor | None = None


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
    how: Rounding | None = None,
    kept: FloatFormat | None = None,
) -> BatchNormResult:
    """Normalize over batch and pixels, add the residual, clamp: two reads of x, one write.

    Args:
        x: [B, C, H, W] of any floating-point dtype; what `batch_norm_backward` wants again, or its `kept` codes.
        weight: FP32 [C].
        bias: FP32 [C].
        residual: like x in shape, of any floating-point dtype.
        relu: clamp at zero.
        eps: added to the variance.
        how: rounding, without random bits, whose codes of the result are written in the same pass.
        kept: format that holds every value of x; its codes are written in the same pass.

    Raises:
        ValueError: an argument does not fit, or there is nothing to take statistics of.
    """
    _check_rounding(how)
    _check_image(x, "x")
    _check_vectors(x.shape[1], x.device, weight=weight, bias=bias)
    if residual is not None:
        _check_like("residual", residual, x)
    batch, channels, height, width = x.shape
    dense = _rows(x)
    rows = batch * height * width
    partial, counts = _sums(kernels.channel_statistics, (dense,), rows, channels)
    mean, variance = _combine(partial, counts)
    rstd = (variance + eps).rsqrt()

    def empty(format: FloatFormat) -> Tensor:
        return torch.empty((batch, height, width, channels), dtype=format.dtype, device=x.device).permute(0, 3, 1, 2)

    y = empty(FP32)
    codes = None if how is None else empty(how.format)
    stored = None if kept is None else empty(kept)
    flags = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device) if relu else None
    block = block_size(FLAT_BLOCK, x.numel())
    launch(
        kernels.batch_apply,
        (cdiv(x.numel(), block),),
        x.device,
        dense,
        mean,
        rstd,
        weight,
        bias,
        None if residual is None else _rows(residual),
        y,
        None if codes is None else raw_result(codes),
        None if stored is None else raw_result(stored),
        flags,
        x.numel(),
        channels,
        ENCODING=_encoding(how, x.device),
        KEPT=_encoding(None if kept is None else Rounding(kept), x.device),
        RELU=relu,
        BLOCK=block,
        WIDE=x.numel() > NARROW,
    )
    return BatchNormResult(y, flags, mean, rstd, variance, codes, stored)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    forward: BatchNormResult,
    *,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """FP32 gradients of input, weight, bias, and of the residual.

    Args:
        grad: gradient of the result, of any floating-point dtype.
        x: the forward pass's input.
        weight: FP32 [C].
        forward: what `batch_norm` gave; its `y` is not read.
        needs_residual: give the residual's gradient too.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    _check_image(x, "x")
    _check_like("grad", grad, x)
    _check_vectors(x.shape[1], x.device, weight=weight)
    batch, channels, height, width = x.shape
    rows = batch * height * width
    dense, dense_grad = _rows(x), _rows(grad)
    mean, rstd = forward.mean, forward.rstd
    tensors = (dense_grad, forward.flags, dense, mean, rstd)
    partial, _ = _sums(kernels.batch_gradient_sums, tensors, rows, channels, WHOLE_BYTES=channels % 8 == 0)
    sums = partial.sum(0)
    grad_x = torch.empty((batch, height, width, channels), device=x.device).permute(0, 3, 1, 2)
    residual = torch.empty_like(grad_x) if needs_residual else None
    block = block_size(FLAT_BLOCK, x.numel())
    launch(
        kernels.batch_gradient_apply,
        (cdiv(x.numel(), block),),
        x.device,
        *tensors,
        weight,
        sums,
        grad_x,
        residual,
        x.numel(),
        channels,
        1 / rows,
        BLOCK=block,
        WIDE=x.numel() > NARROW,
    )
    return grad_x, sums[1], sums[0], residual


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
        None if codes is None else raw_result(codes),
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


def _encoding(how: Rounding | None, device: torch.device) -> codec.Encoding | None:
    return None if how is None else codec.encoding(how, capability(device))


def _check_rounding(how: Rounding | None) -> None:
    if how is not None and (how.is_stochastic or how.format.dtype is None):
        raise ValueError(f"how: got {how}, expected a rounding without random bits to a format with a storage dtype")


def _rows(t: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous [B, H, W, C]; a view where it is channels_last already."""
    return t.permute(0, 2, 3, 1).contiguous()


def _sums(
    kernel: object, tensors: tuple[Tensor | None, ...], rows: int, channels: int, **options: bool
) -> tuple[Tensor, Tensor]:
    """Partial sums [chunks, 2, channels] over chunks of rows, and the number of rows of each chunk."""
    device = next(t for t in tensors if t is not None).device
    block = block_size(64, channels, 512)
    height = block_size(32, rows, 512)
    # About two thousand programs: enough for any GPU, few enough to combine cheaply.
    chunks = max(1, min(cdiv(rows, 4 * height), cdiv(2048, cdiv(channels, block))))
    chunk = cdiv(cdiv(rows, chunks), height) * height
    chunks = cdiv(rows, chunk)
    partial = torch.empty((chunks, 2, channels), dtype=torch.float32, device=device)
    grid = (cdiv(channels, block), chunks)
    launch(kernel, grid, device, *tensors, partial, rows, channels, chunk, **options, ROWS=height, BLOCK=block)
    counts = (rows - torch.arange(chunks, device=device) * chunk).clamp(max=chunk)
    return partial, counts


def _combine(partial: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance from each chunk's (Chan et al.)."""
    means, squares = partial.double().unbind(1)
    weights = (counts / counts.sum()).double()[:, None]
    mean = (means * weights).sum(0)
    variance = squares.sum(0) / counts.sum() + ((means - mean).square() * weights).sum(0)
    return mean.float(), variance.float()


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
        if vector.shape != (size,) or vector.dtype != torch.float32 or vector.device != device:
            given = f"{vector.dtype} of shape {tuple(vector.shape)} on {vector.device}"
            raise ValueError(f"{name}: got {given}, expected torch.float32 of shape ({size},) on {device}")


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.shape != x.shape or tensor.device != x.device or tensor.dtype not in DTYPES:
        given = f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: got {given}, expected floating-point of shape {tuple(x.shape)} on {x.device}")
