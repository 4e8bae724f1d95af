"""The one quantizer: picks an engine (native C++, Triton, torch) and gives the reference's bytes on each.

Holds no generator state: random bits are a function of (seed, stream, element index) alone. What tracers, compilers
and the profiler have to see are its operators; everybody else gets the engines themselves (`guards.untraced`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fp8repro.engines.cpu import native
from fp8repro.engines.guards import check_format, check_input, check_rounding, read, spell, untraced
from fp8repro.numerics import reference
from fp8repro.numerics.formats import FloatFormat, get_format
from fp8repro.numerics.reference import counted
from fp8repro.numerics.rounding import ORDERS, RandomBits, Rounding, one_of
from fp8repro.numerics.streams import StreamSlot, signed64

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

    Values in FP32 are differentiated straight-through: the gradient of `x` is that of the result. Codes have none, and
    asking for one is an error.

    Args:
        x: FP32, FP16 or BF16 tensor of any shape and strides, empty included; FP64 is refused, not rounded twice.
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
        Tensor of x's shape; memory layout follows x where x is dense. On the meta device one without data.

    Raises:
        TypeError: `x` is no dense floating-point tensor of the three input types, or seed or stream is no integer.
        ValueError: an option is not one of those above, the format has no storage dtype, or codes of a tensor that
            requires a gradient are asked for.
    """
    check_input(x)
    how = _read_options(format, rounding, overflow, subnormal_rounding)
    if order != "row_major":
        one_of("order", order, ORDERS)
        if x.dim() > 2:
            # Engines count row-major; to them channels_last memory is contiguous.
            options = (how.format, rounding, overflow, seed, stream, out)
            return quantize(counted(x, order), *options, subnormal_rounding=subnormal_rounding).movedim(-1, 1)
    if type(seed) is not int or type(stream) is not int or not (-(2**63) <= seed < 2**64 > stream >= -(2**63)):
        seed, stream = _integer("seed", seed), _integer("stream", stream)
    dtype = _result_dtype(how.format, out)
    check_format(how.format)
    if _differentiated(x):
        if dtype != torch.float32:
            raise ValueError(_NO_GRADIENT)
        result: Tensor = _StraightThrough.apply(x, how, seed, stream, out)
        return result
    return _quantized(x, how, seed, stream, out)


@functools.cache
def _read_options(format: str | FloatFormat, rounding: str, overflow: str, subnormal_rounding: str) -> Rounding:
    return Rounding(get_format(format), rounding, overflow, subnormal_rounding)


def _differentiated(x: Tensor) -> bool:
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _quantized(x: Tensor, how: Rounding, seed: int, stream: int, out: str) -> Tensor:
    """`quantize` of checked arguments, without a derivative; an operator only where somebody traces."""
    if not untraced(x):
        traced: Tensor = rounded(x, spell(how), signed64(seed), signed64(stream), out)
        return traced
    result = torch.empty_like(x, dtype=torch.float32 if out == "float32" else how.format.dtype)
    values, codes = (result, None) if out == "float32" else (None, result)
    engine: Any = native.round_unchecked if _is_native(x, how) else _round
    engine(x, how, RandomBits(seed, stream), values, codes, None)
    return result


def _is_native(x: Tensor, how: Rounding) -> bool:
    """Whether the C++ engine rounds; the identity is a copy, and torch's."""
    return x.is_cpu and not how.is_identity and native.available()


class _StraightThrough(torch.autograd.Function):
    """Quantized values in FP32, differentiated as if they were the input."""

    @staticmethod
    def forward(x: Tensor, *options: Any) -> Tensor:
        return _quantized(x, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), *[None] * 4

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.to(torch.float32)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *options: Any) -> tuple[Tensor, int]:
        return _each_alone(lambda t: _StraightThrough.apply(t, *options), x.movedim(in_dims[0], 0), options[0])


def _each_alone(quantized: Callable[[Tensor], Tensor], batch: Tensor, how: Rounding) -> tuple[Tensor, int]:
    """Of a batch of tensors: every one draws the bits that it draws alone."""
    if not how.is_stochastic:
        return quantized(batch), 0
    return torch.stack([quantized(each) for each in batch.unbind()]), 0


_NO_GRADIENT = (
    "out: got codes (float8) of a tensor that requires a gradient, expected float32 (straight-through), or x.detach()"
)


def _result_dtype(format: FloatFormat, out: str) -> torch.dtype:
    if out not in ("float8", "float32"):
        raise ValueError(f"out: got {out!r}, expected one of float8, float32")
    if out == "float32":
        return torch.float32
    if format.dtype is None:
        raise ValueError(f"out: format {format.name} has no storage dtype, expected out='float32'")
    return format.dtype


def round_into(
    x: Tensor,
    how: Rounding,
    bits: RandomBits = RandomBits(),
    *,
    values: Tensor | None = None,
    codes: Tensor | None = None,
    transposed: Tensor | None = None,
    stats: Tensor | None = None,
    add: bool = False,
    fresh: bool = False,
) -> None:
    """Round `x` in one pass into preallocated outputs, without a derivative and without a scale.

    Args:
        x: see `quantize`.
        how: to which format, and how.
        bits: where random bits come from; the stream may lie in device memory where Triton kernels round.
        values: FP32 or BF16 tensor of x's shape (it may be `x` itself) that receives the rounded values.
        codes: tensor of x's shape in the format's storage dtype that receives the encoding.
        transposed: for a matrix x, codes and no values: tensor that receives the codes of its transpose.
        stats: float64 tensor of 4 values (`STATISTICS`) that is added to (absmax: raised).
        add: add the rounded values to `values`, a tensor of its own.
        fresh: the caller made the outputs for this very input, which it has checked, and nobody else has seen them:
            they are not checked, and writing to them counts as no change.

    Raises:
        TypeError: `x` is no dense floating-point tensor of the three input types.
        ValueError: the dtype, shape or device of an output does not fit; nothing was written.
    """
    if bits.order != "row_major" and isinstance(x, Tensor):
        # Engines count row-major; to them channels_last memory is contiguous.
        x = counted(x, bits.order)
        values, codes = (None if out is None else counted(out, bits.order) for out in (values, codes))
        bits = RandomBits(bits.seed, bits.stream)
    if fresh and transposed is None and _is_native(x, how) and untraced(x):
        native.round_unchecked(x, how, bits, values, codes, stats, add=add)
        return
    x = x.detach() if isinstance(x, Tensor) and x.requires_grad else x
    if add and values is not None:
        _add_rounded(x, how, bits, values, codes, stats)
    elif transposed is not None and codes is not None:
        _round_both_layouts(x, how, bits, codes, transposed, stats)
    elif untraced(x) or isinstance(bits.stream, StreamSlot):
        # An operator's arguments are plain: they cannot name a place in device memory.
        _round(x, how, bits, values, codes, stats)
        _note_changes(values, codes)
    else:
        check_rounding(x, how.format, values, codes, stats)
        # An operator of ours may not be handed views with a sign of their own beside absent tensors.
        outputs = [torch.empty_like(t) if t is not None and t.is_neg() else t for t in (values, codes)]
        rounded_into(x.resolve_neg(), spell(how), signed64(bits.seed), signed64(bits.stream), *outputs, stats)
        for target, output in zip((values, codes), outputs, strict=True):
            if target is not None and output is not None and target is not output:
                target.copy_(output)


def _add_rounded(
    x: Tensor, how: Rounding, bits: RandomBits, values: Tensor, codes: Tensor | None, stats: Tensor | None
) -> None:
    check_rounding(x, how.format, values, codes, stats)
    alike = values.dtype == torch.float32 and x.is_contiguous() and values.is_contiguous()
    if alike and _is_native(x, how) and untraced(x, values, stats):
        native.round_into(x, how, bits, values, codes, stats, add=True)
        _note_changes(values, codes)
        return
    rounded = torch.empty_like(x, dtype=values.dtype)
    round_into(x, how, bits, values=rounded, codes=codes, stats=stats)
    values.add_(rounded)


def _round(
    x: Tensor,
    how: Rounding,
    bits: RandomBits,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
) -> None:
    """`round_into` by the engine of the tensor's device, which checks its arguments; no tracer sees it."""
    engine: Any = _torch_round_into
    if x.is_cuda:
        # Imported here, because Triton is only needed on a GPU and is missing on many laptops.
        from fp8repro.kernels.quantize import launch as kernels

        engine = kernels.round_into
    elif _is_native(x, how):
        engine = native.round_into
    engine(x, how, bits, values, codes, stats)


def _note_changes(*tensors: Tensor | None) -> None:
    """Count an engine's writes as changes, as torch does for an operator."""
    increment_version([tensor for tensor in tensors if tensor is not None])


@torch.library.custom_op("fp8repro::round_into", mutates_args=("values", "codes", "stats"))
def rounded_into(
    x: Tensor,
    how: str,
    seed: int,
    stream: int,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
) -> None:
    """`round_into` as an operator: the rounding as `spell` gives it, seed and stream signed, with the same bits.

    No fake: it makes no tensor.
    """
    _round(x, read(how), RandomBits(seed, stream), values, codes, stats)


@torch.library.custom_op("fp8repro::quantize", mutates_args=())
def rounded(x: Tensor, how: str, seed: int, stream: int, out: str = "float32") -> Tensor:
    """`quantize` as an operator, with arguments as those of `rounded_into`; differentiated as the identity."""
    rounding = read(how)
    result = torch.empty_like(x, dtype=_result_dtype(rounding.format, out))
    values, codes = (result, None) if out == "float32" else (None, result)
    _round(x, rounding, RandomBits(seed, stream), values, codes, None)
    return result


@rounded.register_fake
def _(x: Tensor, how: str, seed: int, stream: int, out: str = "float32") -> Tensor:
    return torch.empty_like(x, dtype=_result_dtype(read(how).format, out))


def _keep_dtype(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if output.dtype != torch.float32:
        raise ValueError(_NO_GRADIENT)
    ctx.dtype = inputs[0].dtype


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad.to(ctx.dtype), None, None, None, None


rounded.register_autograd(_straight_through, setup_context=_keep_dtype)


@rounded.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, how: str, *options: Any) -> tuple[Tensor, int]:
    return _each_alone(lambda t: rounded(t, how, *options), x.movedim(in_dims[0], 0), read(how))


def _round_both_layouts(
    x: Tensor, how: Rounding, bits: RandomBits, codes: Tensor, transposed: Tensor, stats: Tensor | None
) -> None:
    if x.is_cuda:
        from fp8repro.kernels.ops import transpose_engine

        transpose_engine(x, how, bits, codes, transposed, stats)
        return
    round_into(x, how, bits, codes=codes, stats=stats)
    transposed.copy_(codes.t())


def _torch_round_into(
    x: Tensor,
    how: Rounding,
    bits: RandomBits,
    values: Tensor | None,
    codes: Tensor | None,
    stats: Tensor | None,
) -> None:
    """The engine for machines without a compiler: torch's own casts where they are right, else the reference."""
    format = how.format
    check_rounding(x, format, values, codes, stats)
    if x.numel() == 0 or x.is_meta:
        return
    to_infinity = how.rounding == "nearest" and how.overflow == "inf"
    cast_is_right = to_infinity and format.dtype is not None and format.has_infinity
    if cast_is_right and format.dtype is not None:
        # torch rounds once, to nearest even, to infinity; its E4M3 cast saturates and is not used.
        encoded = x.to(format.dtype)
        rounded = encoded.to(torch.float32)
    else:
        rounded = reference.round_to_format(x, how, bits)
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


def _integer(name: str, word: Any) -> int:
    """Other libraries' integers as Python's."""
    if isinstance(word, Tensor) or not hasattr(word, "__index__"):
        raise TypeError(f"{name}: got {word!r}, expected an integer of 64 bits")
    number = operator.index(word)
    if not -(2**63) <= number < 2**64:
        # It would draw the bits of a smaller one.
        raise ValueError(f"{name}: got {number}, expected an integer of 64 bits")
    return number
