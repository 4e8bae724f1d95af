"""The C++ CPU engine, compiled for this machine at first use; absent where there is no compiler.

It gives the bytes of `fp8repro.numerics.reference` for every layout and thread count.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.cpu import build
from fp8repro.engines.cpu.layout import plan
from fp8repro.engines.guards import address, check_rounding, plain
from fp8repro.numerics.formats import E4M3, E5M2, FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding

_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_ROUNDINGS = {"nearest": 0, "stochastic": 1, "toward_zero": 2}
# torch's own grain: smaller tensors are not worth waking a second thread.
_GRAIN = 32768


class _Format(ctypes.Structure):
    """Mirrors `Format` in quantize.cpp."""

    _fields_ = (
        ("rounding", ctypes.c_int32),
        ("subnormal_nearest", ctypes.c_int32),
        ("drop", ctypes.c_int32),
        ("smallest_normal", ctypes.c_uint32),
        ("largest", ctypes.c_uint32),
        ("beyond", ctypes.c_uint32),
        ("infinity", ctypes.c_uint32),
        ("nan_code", ctypes.c_uint32),
    )


@functools.cache
def library(march: str = "native") -> Any:
    """The compiled quantizer, or None."""
    found = build.load("quantize", march)
    if found is None:
        return None
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    uint64, int32 = ctypes.c_uint64, ctypes.c_int32
    common: list[Any] = [pointer, pointer, pointer, int32, pointer, uint64, uint64, pointer, int32]
    found.fp8repro_linear.argtypes = [*common, int64]
    found.fp8repro_runs.argtypes = [*common, int64, pointer]
    found.fp8repro_transposed.argtypes = [*common, int64, int64, int64]
    found.fp8repro_decode.argtypes = [pointer, pointer, int32, int32, int32, int64]
    found.fp8repro_add_relu.argtypes = [pointer, pointer, pointer, int32, int64]
    found.fp8repro_keep_where.argtypes = [pointer, pointer, pointer, int32, int64]
    found.fp8repro_words.argtypes = [uint64, uint64, uint64, pointer]
    return found


def available() -> bool:
    """True when the engine is compiled and loaded; the first call compiles it."""
    return library() is not None


def round_into(
    x: Tensor,
    how: Rounding,
    bits: RandomBits,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
    engine: Any = None,
    add: bool = False,
) -> None:
    """See `quantizer.round_into`; elements are counted row-major. `engine` is another build of the library.

    With `add`, what is rounded is added to `values`, an FP32 tensor that lies as `x` does.

    Raises:
        TypeError, ValueError: a tensor is not what the engine takes (`check_rounding`); nothing was written.
    """
    check_rounding(x, how.format, values, codes, stats)
    if not x.is_cpu:
        raise ValueError(f"x: got a tensor on {x.device}, expected one on the CPU")
    signed = x.is_neg()
    for out in (values, codes):
        if out is not None:
            signed = signed or out.is_neg()
            address(out)
    (_round_copies if signed else round_unchecked)(x, how, bits, values, codes, stats, engine, add=add)


def round_unchecked(
    x: Tensor,
    how: Rounding,
    bits: RandomBits,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
    engine: Any = None,
    add: bool = False,
) -> None:
    """`round_into` for an input that is checked (`check_input`, `plain`) and outputs that were made for it."""
    count = x.numel()
    if count == 0:
        return
    engine = engine or library()
    contiguous = x.is_contiguous() and (values is None or values.is_contiguous())
    if contiguous and (codes is None or codes.is_contiguous()):
        kernel, arguments = engine.fp8repro_linear, (count,)
    else:
        strides = tuple(out.stride() for out in (values, codes) if out is not None)
        name, arguments = plan(tuple(x.shape), x.stride(), strides, values is not None, how.is_stochastic)
        if name == "copy":
            _round_copies(x, how, bits, values, codes, stats, engine, add)
            return
        kernel = getattr(engine, "fp8repro_" + name)
    types = _TYPES[x.dtype]
    if values is not None:
        types |= _TYPES[values.dtype] << 4 | add << 12
    if codes is not None:
        types |= (4 if codes.element_size() == 1 else 5) << 8
    kernel(
        address(x),
        None if values is None else values.data_ptr(),
        None if codes is None else codes.data_ptr(),
        types,
        format_address(how),
        bits.seed,
        bits.stream,
        None if stats is None else stats.data_ptr(),
        _threads(count),
        *arguments,
    )


def decode(codes: Tensor, values: Tensor) -> None:
    """Write the values of FP8 bytes into an FP32 or BF16 tensor of the same shape and layout; exact.

    What else there is (other dtypes, layouts, devices; tensors that are traced) torch converts.

    Args:
        codes: float8_e5m2 or float8_e4m3fn tensor.
        values: float32 or bfloat16 tensor.
    """
    alike = codes.shape == values.shape and codes.stride() == values.stride() and codes.device == values.device
    typed = codes.dtype in (E5M2.dtype, E4M3.dtype) and values.dtype in (torch.float32, torch.bfloat16)
    if not (alike and typed and codes.is_cpu and plain(codes, values) and _dense(codes)):
        values.copy_(codes)
        return
    count = codes.numel()
    is_e4m3 = int(codes.dtype is E4M3.dtype)
    library().fp8repro_decode(address(codes), address(values), is_e4m3, _TYPES[values.dtype], _threads(count), count)


def add_relu(x: Tensor, residual: Tensor | None) -> Tensor:
    """ReLU of `x` (+ `residual`), in place; gives a bit a value that says which are over zero. Asks `walks` of them.

    Args:
        x: dense FP32 tensor.
        residual: FP32 tensor with the shape and strides of `x`, or None.

    Returns:
        Bytes of 8 bits each, the lowest first, in memory order; padded with zeros.
    """
    count = x.numel()
    bits = torch.empty((count + 7) // 8, dtype=torch.uint8, device="cpu")
    other = None if residual is None else address(residual)
    library().fp8repro_add_relu(address(x), other, address(bits), _threads(count), count)
    return bits


def keep_where(x: Tensor, bits: Tensor) -> Tensor:
    """The values of a dense FP32 tensor (`walks`) whose bit (in memory order, see `add_relu`) is set, else zero."""
    count = x.numel()
    out = torch.empty_like(x)
    library().fp8repro_keep_where(address(x), address(bits), address(out), _threads(count), count)
    return out


def walks(*tensors: Tensor) -> bool:
    """Whether the engine takes these: dense FP32 CPU tensors that lie in memory alike, and nobody traces."""
    first = tensors[0]
    place = (first.shape, first.stride())
    fit = all(t.is_cpu and t.dtype == torch.float32 and (t.shape, t.stride()) == place for t in tensors)
    return fit and available() and plain(*tensors) and _dense(first)


def _threads(count: int) -> int:
    return torch.get_num_threads() if count > _GRAIN else 1


def _round_copies(
    x: Tensor,
    how: Rounding,
    bits: RandomBits,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
    engine: Any,
    add: bool,
) -> None:
    """Layouts that no kernel walks, and signs that memory does not hold: round a copy in logical order."""
    inner = [None if out is None else torch.empty(out.shape, dtype=out.dtype, device="cpu") for out in (values, codes)]
    x = x.resolve_neg().contiguous()
    round_unchecked(x, how, bits, inner[0], inner[1], stats, engine)
    for out, copy in zip((values, codes), inner, strict=True):
        if out is not None and copy is not None:
            (out.add_ if add and out is values else out.copy_)(copy)


@functools.cache
def format_address(how: Rounding) -> int:
    """Where the kernels find a format and how to round to it."""
    return ctypes.addressof(_format(how))


@functools.cache
def _format(how: Rounding) -> _Format:
    """The kernels' view of a rounding; kept for ever, because its address is."""
    format = how.format
    unbounded = math.inf if format.has_infinity else math.nan
    stays_finite = how.rounding == "toward_zero" or how.overflow == "saturate"
    return _Format(
        rounding=_ROUNDINGS[how.rounding],
        subnormal_nearest=int(how.is_stochastic and how.subnormal_rounding == "nearest"),
        drop=23 - format.mantissa_bits,
        smallest_normal=_bits(format.smallest_normal),
        largest=_bits(format.max),
        beyond=_bits(format.max if stays_finite else unbounded),
        infinity=_bits(unbounded),
        nan_code=0x7F if format.is_fp8 else _nan_code(format),
    )


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) if value == value else 0x7FFFFFFF


def _nan_code(format: FloatFormat) -> int:
    """The quiet NaN with no payload."""
    return (2 ** (format.exponent_bits + 1) - 1) << (format.mantissa_bits - 1)


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or plan(tuple(tensor.shape), tensor.stride(), (), False, False)[0] == "linear"
