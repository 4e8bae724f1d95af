"""Batch normalization + residual + ReLU + rounding, and layer normalization + rounding, forward and backward.

Inputs may be 8-bit tensors and results are rounded in the same pass; arithmetic is FP32. Training mode only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fp8repro.kernels.matmul.launch import Epilogue, raw_result
from fp8repro.kernels.norm import device as kernels
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import INTERPRETED, block_size, capability, cdiv, check_device, launch
from fp8repro.numerics.formats import FP32, FloatFormat
from fp8repro.numerics.rounding import Rounding

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn)
FLAT_BLOCK = 1024
NARROW = (1 << 31) - (1 << 17)  # elements whose offsets 32 bits hold, those of the last block's masked end included


@dataclass(frozen=True)
class BatchNormResult:
    """What `batch_norm` gives.

    Attributes:
        y: rounded result, channels_last.
        flags: uint8, one bit an element in memory order, set where the ReLU let it pass; None without ReLU.
        mean: FP32 [C].
        inverse_deviation: FP32 [C].
        variance: FP32 [C], biased.
        values: FP32, the result before rounding, where asked for.
        kept: codes of the input in the format that was asked for.
    """

    y: Tensor
    flags: Tensor | None
    mean: Tensor
    inverse_deviation: Tensor
    variance: Tensor
    values: Tensor | None = None
    kept: Tensor | None = None


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    eps: float = 1e-5,
    epilogue: Epilogue | None = None,
    values: bool = False,
    kept: FloatFormat | None = None,
) -> BatchNormResult:
    """Normalize over batch and pixels, add the residual, clamp, round: two reads of x, one write.

    Args:
        x: [B, C, H, W] of any floating-point dtype; what `batch_norm_backward` wants again, or its `kept` codes.
        weight: FP32 [C].
        bias: FP32 [C].
        residual: like x in shape, of any floating-point dtype.
        relu: clamp at zero.
        eps: added to the variance.
        epilogue: how the result is stored; FP32 by default.
        values: give the FP32 result too, before rounding.
        kept: format that holds every value of x; its codes are written in the same pass.

    Raises:
        ValueError: an argument does not fit, or there is nothing to take statistics of.
    """
    epilogue = epilogue or Epilogue()
    _check_image(x, "x")
    _check_vectors(x.shape[1], x.device, weight=weight, bias=bias)
    if residual is not None:
        _check_like("residual", residual, x)
    batch, channels, height, width = x.shape
    dense = _rows(x)
    rows = batch * height * width
    partial, counts = _sums(kernels.channel_statistics, (dense,), rows, channels)
    mean, variance = _combine(partial, counts)
    inverse = (variance + eps).rsqrt()
    shape = (batch, height, width, channels)
    y = epilogue.empty(shape, x.device).permute(0, 3, 1, 2)
    plain = Epilogue().empty(shape, x.device).permute(0, 3, 1, 2) if values else None
    codes = None if kept is None else Epilogue(Rounding(kept)).empty(shape, x.device).permute(0, 3, 1, 2)
    kept = kept or FP32
    flags = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device) if relu else None
    block = block_size(FLAT_BLOCK, x.numel())
    launch(
        kernels.batch_apply,
        (cdiv(x.numel(), block),),
        x.device,
        dense,
        mean,
        inverse,
        weight,
        bias,
        None if residual is None else _rows(residual),
        raw_result(y),
        plain,
        None if codes is None else raw_result(codes),
        flags,
        x.numel(),
        channels,
        *epilogue.words(),
        **epilogue.options(x.device),
        KEPT_EB=kept.exponent_bits,
        KEPT_MB=kept.mantissa_bits,
        KEPT_INF=kept.has_infinity,
        KEPT_ROUNDING=codec.rounding_code(kept, "nearest", capability(x.device)),
        RELU=relu,
        BLOCK=block,
        WIDE=x.numel() > NARROW,
    )
    return BatchNormResult(y, flags, mean, inverse, variance, plain, codes)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    forward: BatchNormResult,
    *,
    epilogue: Epilogue | None = None,
    needs_residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of input (rounded by the epilogue), weight, bias, and of the residual (FP32).

    Args:
        grad: gradient of the result, of any floating-point dtype.
        x: the forward pass's input.
        weight: FP32 [C].
        forward: what `batch_norm` gave; its `y` is not read.
        epilogue: how the input's gradient is stored; FP32 by default.
        needs_residual: give the residual's gradient too.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    epilogue = epilogue or Epilogue()
    _check_image(x, "x")
    _check_like("grad", grad, x)
    _check_vectors(x.shape[1], x.device, weight=weight)
    batch, channels, height, width = x.shape
    rows = batch * height * width
    dense, dense_grad = _rows(x), _rows(grad)
    mean, inverse = forward.mean, forward.inverse_deviation
    tensors = (dense_grad, forward.flags, dense, mean, inverse)
    partial, _ = _sums(kernels.batch_gradient_sums, tensors, rows, channels, WHOLE_BYTES=channels % 8 == 0)
    sums = partial.sum(0)
    grad_x = epilogue.empty((batch, height, width, channels), x.device).permute(0, 3, 1, 2)
    residual = torch.empty_like(grad_x, dtype=torch.float32) if needs_residual else None
    block = block_size(FLAT_BLOCK, x.numel())
    launch(
        kernels.batch_gradient_apply,
        (cdiv(x.numel(), block),),
        x.device,
        *tensors,
        weight,
        sums,
        raw_result(grad_x),
        residual,
        x.numel(),
        channels,
        1 / rows,
        *epilogue.words(),
        **epilogue.options(x.device),
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
    epilogue: Epilogue | None = None,
    values: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Normalize the last dimension and round in the same pass.

    Returns:
        Result [..., D], mean and inverse deviation (FP32, one a row); with `values` the FP32 result before rounding.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    epilogue = epilogue or Epilogue()
    width, rows = _check_rows(x, weight, bias)
    y = epilogue.empty(tuple(x.shape), x.device)
    plain = Epilogue().empty(tuple(x.shape), x.device) if values else None
    mean, inverse = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    height, block = _row_block(rows, width)
    launch(
        kernels.layer_forward,
        (cdiv(rows, height),),
        x.device,
        x.contiguous(),
        weight,
        bias,
        raw_result(y),
        plain,
        mean,
        inverse,
        rows,
        width,
        eps,
        *epilogue.words(),
        **epilogue.options(x.device),
        ROWS=height,
        BLOCK=block,
    )
    return y, mean, inverse, plain


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse_deviation: Tensor,
    *,
    epilogue: Epilogue | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input (rounded by the epilogue), weight and bias.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    epilogue = epilogue or Epilogue()
    width, rows = _check_rows(x, weight, weight)
    _check_like("grad", grad, x)
    grad_x = epilogue.empty(tuple(x.shape), x.device)
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
        inverse_deviation,
        raw_result(grad_x),
        partial,
        rows,
        width,
        *epilogue.words(),
        **epilogue.options(x.device),
        ROWS=height,
        BLOCK=block,
    )
    sums = partial.sum(0)
    return grad_x, sums[0], sums[1]


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
