"""The one quantizer: picks an engine (native C++, Triton, torch) and gives the reference's bytes on each.

Holds no generator state: random bits are a function of (seed, stream, element index) alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8repro import native, reference
from fp8repro.formats import FP32, FloatFormat, get_format
from fp8repro.reference import ORDERS, OVERFLOWS, ROUNDINGS, SUBNORMAL_ROUNDINGS, counted
from fp8repro.streams import Stream

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STATISTICS = ("nonzero", "underflow", "overflow", "absmax")


def quantize(
    x: Tensor,
    format: str | FloatFormat = "e5m2",
    rounding: str = "nearest",
    overflow: str = "inf",
    seed: int = 0,
    stream: int = 0,
    out: str = "float8",
    *,
    subnormal_rounding: str = "same",
    order: str = "row_major",
) -> Tensor:
    """Round each element of `x` once to a low-precision format (paper, section 3).

    Args:
        x: FP32, FP16 or BF16 tensor of any shape and strides, empty included.
        format: "e5m2", "e4m3", "fp16", "bf16", "fp16_1_6_9" or a `FloatFormat`.
        rounding: "nearest" (ties to even), "stochastic" (16 Philox bits a value) or "toward_zero".
        overflow: "inf" (E4M3, which has no infinity: NaN) or "saturate".
        seed: 64-bit key of the random bits; used by stochastic rounding only.
        stream: 64-bit stream of the random bits; tensors that must not share bits need different streams.
        out: "float8" for the format's storage dtype, "float32" for the same values in FP32.
        subnormal_rounding: "same", or "nearest" to round subnormal results to nearest in stochastic mode.
        order: how elements are counted for their random bits, whatever the layout in memory: "row_major", or
            "channels_last", in which dimension 1 counts last where there are at least three (a batch is one of them:
            an image [C, H, W] counts so as `x.unsqueeze(0)`). The layers' convolutions count channels last.

    Returns:
        Tensor of x's shape; memory layout follows x where x is dense.

    Raises:
        TypeError: `x` is no floating-point tensor of the three input types.
        ValueError: an option is not one of those above, or the format has no storage dtype.
    """
    fmt = get_format(format)
    _check_options(x, rounding, overflow, subnormal_rounding, order)
    if out not in ("float8", "float32"):
        raise ValueError(f"out: got {out!r}, expected one of float8, float32")
    if out == "float32":
        result = torch.empty_like(x, dtype=torch.float32)
        values, codes = result, None
    else:
        if fmt.dtype is None:
            raise ValueError(f"out: format {fmt.name} has no storage dtype, expected out='float32'")
        result = torch.empty_like(x, dtype=fmt.dtype)
        values, codes = None, result
    round_into(
        x,
        fmt,
        rounding,
        overflow,
        seed=seed,
        stream=stream,
        subnormal_rounding=subnormal_rounding,
        values=values,
        codes=codes,
        order=order,
    )
    return result


def round_into(
    x: Tensor,
    format: FloatFormat,
    rounding: str,
    overflow: str,
    *,
    seed: int = 0,
    stream: Stream = 0,
    subnormal_rounding: str = "same",
    values: Tensor | None = None,
    codes: Tensor | None = None,
    turned: Tensor | None = None,
    stats: Tensor | None = None,
    add: bool = False,
    order: str = "row_major",
) -> None:
    """Round `x` in one pass into preallocated outputs; the arguments are those of `quantize`.

    Args:
        values: FP32 or BF16 tensor of x's shape (it may be `x` itself) that receives the rounded values.
        codes: tensor of x's shape in the format's storage dtype that receives the encoding.
        turned: for a matrix x, codes and no values: tensor that receives the codes of its transpose.
        stats: float64 tensor of 4 values (`STATISTICS`) that is added to (absmax: raised).
        stream: may lie in device memory where Triton kernels round (`fp8repro.streams`).
        add: add the rounded values to `values`, a tensor of its own.
    """
    if x.numel() == 0:
        return
    if order != "row_major":
        # Engines count row-major; to them channels_last memory is contiguous.
        x = counted(x, order)
        values, codes = (None if out is None else counted(out, order) for out in (values, codes))
    engine: Any
    options = (format, rounding, overflow, seed, stream, subnormal_rounding)
    if add and values is not None:
        fast = x.device.type == "cpu" and native.available() and x.is_contiguous() and values.is_contiguous()
        if fast and values.dtype == torch.float32 and format.mantissa_bits < FP32.mantissa_bits:
            engine = native.round_into
            engine(x, *options, values, codes, stats, add=True)
            return
        total, values = values, torch.empty_like(x, dtype=values.dtype)
    if turned is not None and codes is not None:
        _round_turned(x, format, rounding, overflow, seed, stream, subnormal_rounding, codes, turned, stats)
        return
    if x.device.type == "cuda":
        # Imported here, because Triton is only needed on a GPU and is missing on many laptops.
        from fp8repro.kernels.ops import round_engine

        engine = round_engine
    elif format.mantissa_bits < FP32.mantissa_bits and native.available():
        engine = native.round_into
    else:
        engine = _torch_round_into
    engine(x, *options, values, codes, stats)
    if add and values is not None:
        total.add_(values)


def _round_turned(
    x: Tensor,
    format: FloatFormat,
    rounding: str,
    overflow: str,
    seed: int,
    stream: Stream,
    subnormal_rounding: str,
    codes: Tensor,
    turned: Tensor,
    stats: Tensor | None,
) -> None:
    if x.device.type == "cuda":
        from fp8repro.kernels.ops import transpose_engine

        transpose_engine(x, format, rounding, overflow, seed, stream, subnormal_rounding, codes, turned, stats)
        return
    options = {"seed": seed, "stream": stream, "subnormal_rounding": subnormal_rounding}
    round_into(x, format, rounding, overflow, **options, codes=codes, stats=stats)  # type: ignore[arg-type]
    turned.copy_(codes.t())


def _torch_round_into(
    x: Tensor,
    format: FloatFormat,
    rounding: str,
    overflow: str,
    seed: int,
    stream: int,
    subnormal_rounding: str,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
) -> None:
    """The engine for machines without a compiler: torch's own casts where they are right, else the reference."""
    cast_is_right = rounding == "nearest" and overflow == "inf" and format.dtype is not None and format.has_infinity
    if cast_is_right and format.dtype is not None:
        # torch rounds once, to nearest even, to infinity; its E4M3 cast saturates and is not used.
        encoded = x.to(format.dtype)
        rounded = encoded.to(torch.float32)
    else:
        rounded = reference.round_to_format(x, format, rounding, overflow, seed, stream, subnormal_rounding)
        encoded = None
    if stats is not None:
        _add_statistics(stats, x, rounded, format)
    if codes is not None:
        # Exact: every value lies in the format's set already.
        codes.copy_(rounded.to(format.dtype) if encoded is None else encoded)
    if values is not None:
        values.copy_(rounded)


def _add_statistics(stats: Tensor, x: Tensor, rounded: Tensor, format: FloatFormat) -> None:
    finite = torch.isfinite(x)
    nonzero = finite & (x != 0)
    magnitude = torch.where(finite, x, torch.zeros_like(x)).abs()
    stats[0] += nonzero.sum()
    stats[1] += (nonzero & (rounded == 0)).sum()
    stats[2] += (magnitude.to(torch.float64) > format.max).sum()
    stats[3] = torch.maximum(stats[3], magnitude.max().to(torch.float64))


def _check_options(x: Tensor, rounding: str, overflow: str, subnormal_rounding: str, order: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in INPUT_DTYPES:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {given}, expected a torch.float32, torch.float16 or torch.bfloat16 tensor")
    for name, value, accepted in (
        ("rounding", rounding, ROUNDINGS),
        ("overflow", overflow, OVERFLOWS),
        ("subnormal_rounding", subnormal_rounding, SUBNORMAL_ROUNDINGS),
        ("order", order, ORDERS),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(accepted)}")
