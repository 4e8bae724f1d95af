"""What stands between a tensor and code that reads memory by address: C++ engines and Triton kernels.

Says whether an engine may be called as a plain function, and checks what it gets. It must never touch a tensor's data.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]

from fp8repro.numerics.formats import FORMATS, FloatFormat, get_format
from fp8repro.numerics.rounding import Rounding

# Bound once: these are asked before every rounding.
_PLAIN_TYPES = (Tensor, nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = _functorch.peek_interpreter_stack
_profiled = torch._C._autograd._profiler_enabled

INPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def addressable(*tensors: Tensor | None) -> bool:
    """True where memory holds the tensors' values.

    It does not for meta and fake tensors, those of functorch and of other classes, and views with a sign of their own.
    """
    for t in tensors:  # noqa: SIM110 (a generator costs as much as what it asks)
        if t is not None and (type(t) not in _PLAIN_TYPES or t.is_meta or t.is_neg()):
            return False
    return True


def plain(*tensors: Tensor | None) -> bool:
    """True where an engine may be handed the tensors' addresses: they are `addressable`, and nobody traces."""
    # `is_compiling` first: a compiler follows nothing of what comes after.
    if _is_compiling() or _tracing_state() is not None or _dispatch_modes() or _transform() is not None:
        return False
    return addressable(*tensors)


def untraced(*tensors: Tensor | None) -> bool:
    """True where nobody traces or profiles, and an engine may be called without its operator.

    An operator takes the host some 9 microseconds more (12.5, not 3.1, to round 64 values on an AMD EPYC), 5 ms of a
    Transformer's step, and it cannot carry a `StreamSlot`.
    """
    return plain(*tensors) and not _profiled()


def address(t: Tensor) -> int:
    """Where a tensor's values lie.

    Raises:
        ValueError: its memory was given back, or never was.
    """
    where = t.data_ptr()
    if not where and t.numel():
        raise ValueError(f"tensor: got one of shape {tuple(t.shape)} on {t.device} without memory, expected its values")
    return where


def check_rounding(
    x: Tensor,
    format: FloatFormat,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
    value_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> None:
    """Refuse what an engine would read or write wrongly; see `quantizer.round_into`.

    Raises:
        TypeError: `x` is no dense tensor of the input types.
        ValueError: the format is not one that FP32 holds, or an output does not fit `x`.
    """
    check_input(x)
    check_format(format)
    if values is not None and (
        values.dtype not in value_dtypes or values.shape != x.shape or values.device != x.device
    ):
        _refuse("values", values, value_dtypes, x)
    if codes is not None and (
        codes.dtype != format.dtype or codes.dtype is None or codes.shape != x.shape or codes.device != x.device
    ):
        _refuse("codes", codes, (format.dtype,), x)
    if stats is not None and (stats.device != x.device or stats.dtype != torch.float64 or stats.shape != (4,)):
        given = f"{stats.dtype} of shape {tuple(stats.shape)} on {stats.device}"
        raise ValueError(f"stats: got {given}, expected torch.float64 of shape (4,) on {x.device}")


def check_input(x: Tensor) -> None:
    """Refuse what no engine rounds; FP64 too, because a way through FP32 would round twice.

    Raises:
        TypeError: `x` is no dense tensor of the input types.
    """
    if not isinstance(x, Tensor):
        given = type(x).__name__
    elif x.dtype not in INPUT_DTYPES:
        given = str(x.dtype)
    elif x.is_nested or x.layout != torch.strided:
        given = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
    else:
        return
    raise TypeError(f"x: got {given}, expected a torch.float32, torch.float16 or torch.bfloat16 tensor, strided")


def check_format(format: FloatFormat) -> None:
    """Refuse a format whose values FP32 does not hold, or whose codes are not those of its storage dtype.

    Raises:
        ValueError: it is such a format.
    """
    if FORMATS.get(format.name) is not format:
        _check_own_format(format)


def _check_own_format(format: FloatFormat) -> None:
    bits = (format.exponent_bits, format.mantissa_bits, format.has_infinity, format.bias)
    known = {(f.exponent_bits, f.mantissa_bits, f.has_infinity, f.bias) for f in FORMATS.values()}
    fits = 2 <= format.exponent_bits <= 7 and 1 <= format.mantissa_bits <= 13
    # Engines round by FP32 additions of numbers up to 2^23 times as large, and count subnormals in 2^-17 quanta.
    fits = fits and format.min_exponent - format.mantissa_bits >= -100 and format.max_exponent < 100
    if not fits and bits not in known:
        given = f"{format.name} with {bits[0]} exponent and {bits[1]} mantissa bits and a bias of {bits[3]}"
        raise ValueError(f"format: got {given}, expected 2 to 7, 1 to 13, and values from 2^-100 to under 2^100")
    stored = {f.dtype: (f.exponent_bits, f.mantissa_bits, f.has_infinity, f.bias) for f in FORMATS.values() if f.dtype}
    if format.dtype is not None and stored.get(format.dtype) != bits:
        raise ValueError(
            f"format: got {format.name} stored in {format.dtype}, expected a dtype of the same bits or None"
        )


def spell_format(format: FloatFormat) -> str:
    """A format as an operator's plain argument: its name, or all of it where it is the caller's own."""
    if FORMATS.get(format.name) == format:
        return format.name
    dtype = "" if format.dtype is None else str(format.dtype).removeprefix("torch.")
    numbers = (format.exponent_bits, format.mantissa_bits, int(format.has_infinity), format.bias)
    return "/".join((format.name, *map(str, numbers), dtype))


def read_format(spelled: str) -> FloatFormat:
    """The format that `spell_format` spelled.

    Raises:
        ValueError: nobody spelled it so.
    """
    name, *fields = spelled.rsplit("/", 5)
    if len(fields) != 5:
        return get_format(spelled)
    dtype = getattr(torch, fields[4]) if fields[4] else None
    exponent_bits, mantissa_bits, bias = (int(fields[i]) for i in (0, 1, 3))
    usual = bias == 2 ** (exponent_bits - 1) - 1
    return FloatFormat(name, exponent_bits, mantissa_bits, fields[2] == "1", dtype, None if usual else bias)


@functools.cache
def spell(how: Rounding) -> str:
    """A rounding as an operator's plain argument."""
    return ";".join((spell_format(how.format), how.rounding, how.overflow, how.subnormal_rounding))


@functools.cache
def read(spelled: str) -> Rounding:
    """The rounding that `spell` spelled.

    Raises:
        ValueError: nobody spelled it so.
    """
    format, *words = spelled.split(";")
    return Rounding(read_format(format), *words)


def _refuse(name: str, given: Tensor, dtypes: tuple[torch.dtype | None, ...], x: Tensor) -> None:
    got = f"{given.dtype} of shape {tuple(given.shape)} on {given.device}"
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(f"{name}: got {got}, expected {wanted} of shape {tuple(x.shape)} on {x.device}")
