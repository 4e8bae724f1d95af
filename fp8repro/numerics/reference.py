"""The oracle: every rounding and every random bit, written to be read, in FP64 and int64 torch arithmetic.

Slow on purpose. All other engines are tested against this file; it must never call a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8repro.numerics.formats import FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding

# Which bits this code makes numbers with. 1 was 32 random bits a value, four values a Philox call, every tensor counted
# row-major; 2 is what stands below.
BITS_VERSION = 2

# A random draw decides in steps of 2^-16 whether a value rounds up.
DRAW_BITS = 16

_MASK32 = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85


def _multiply_high_low(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of the 64-bit product a * b, for 32-bit b held in int64."""
    # In 16-bit halves, because int64 has no unsigned 64-bit product.
    a_low, a_high = a & 0xFFFF, a >> 16
    b_low, b_high = b & 0xFFFF, b >> 16
    low = a_low * b_low
    middle = a_high * b_low + (low >> 16)
    middle2 = a_low * b_high + (middle & 0xFFFF)
    high = a_high * b_high + (middle >> 16) + (middle2 >> 16)
    return high & _MASK32, ((middle2 << 16) | (low & 0xFFFF)) & _MASK32


def philox_4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32 with 10 rounds (Salmon et al., SC 2011).

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(_PHILOX_M0, c0)
        high1, low1 = _multiply_high_low(_PHILOX_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return c0, c1, c2, c3


def random_draws(count: int, seed: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """The first `count` random draws of a stream, as int64 in [0, 2^16).

    Element i takes half a word of the Philox block with counter (i // 8, stream) and key `seed`: word i % 8 // 2, its
    low half if i is even; `seed` and `stream` are unsigned 64-bit integers.
    """
    block = torch.arange((count + 7) // 8, dtype=torch.int64, device=device)
    stream_low = torch.full_like(block, stream & _MASK32)
    stream_high = torch.full_like(block, (stream >> 32) & _MASK32)
    words = philox_4x32_10(
        (block & _MASK32, block >> 32, stream_low, stream_high), (seed & _MASK32, (seed >> 32) & _MASK32)
    )
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).reshape(-1)[:count]


def counted(x: Tensor, order: str) -> Tensor:
    """A view of `x` whose row-major order is the one in which its elements are counted, whatever its strides.

    Args:
        x: any tensor.
        order: "row_major", or "channels_last": dimension 1 counts last where there are at least three dimensions, so
            images [B, C, H, W] count as [B, H, W, C], sequences [B, C, L] as [B, L, C], volumes and kernels likewise.
            What has fewer dimensions counts row-major. An image without a batch dimension is `x.unsqueeze(0)`.
    """
    return x.movedim(1, -1) if order == "channels_last" and x.dim() > 2 else x


def threshold(fraction: Tensor) -> Tensor:
    """Draws under it round up: floor(f * 2^16 + 1/2) of the discarded fraction f in [0, 1), both FP64."""
    # Exact where it matters: f has at most 24 significant bits, and the sum of a tiny f and 1/2 rounds to under 1.
    return torch.floor(fraction * 2.0**DRAW_BITS + 0.5)


def _binade(magnitude: Tensor, format: FloatFormat) -> Tensor:
    """Exponent of each finite magnitude's binade, not under the format's smallest normal one."""
    # frexp: magnitude = m * 2^e with m in [0.5, 1), so the binade is 2^(e-1); it calls 0 = 0 * 2^0.
    exponent = torch.where(magnitude == 0, format.min_exponent, torch.frexp(magnitude).exponent - 1)
    return exponent.clamp(min=format.min_exponent)


def _quantum(magnitude: Tensor, exponent: Tensor, format: FloatFormat) -> Tensor:
    """Distance between neighbouring values of the format in each binade, FP64."""
    return torch.ldexp(torch.ones_like(magnitude), exponent - format.mantissa_bits)


def round_to_format(x: Tensor, how: Rounding, bits: RandomBits = RandomBits()) -> Tensor:
    """Round every element of `x` once.

    Args:
        x: FP32, FP16 or BF16 tensor of any shape and strides.
        how: to which format, and how; a scale is not applied.
        bits: where random draws come from (stochastic rounding only); the stream is a number.

    Returns:
        FP32 tensor of x's shape (contiguous) whose values all lie in the format's set.
    """
    format = how.format
    exact = x.detach().to(torch.float64).contiguous()
    magnitude = exact.abs()
    quantum = _quantum(magnitude, _binade(magnitude, format), format)
    steps = magnitude / quantum  # exact: a division by a power of two
    lower = torch.floor(steps)
    nearest = torch.round(steps)  # half to even
    if how.rounding == "nearest":
        rounded = nearest
    elif how.rounding == "toward_zero":
        rounded = lower
    else:
        draw = torch.empty_like(exact)
        in_order = counted(draw, bits.order)
        assert isinstance(bits.stream, int)
        in_order.copy_(random_draws(exact.numel(), bits.seed, bits.stream, exact.device).view(in_order.shape))
        rounded = torch.where(draw < threshold(steps - lower), lower + 1, lower)
        if how.subnormal_rounding == "nearest":
            rounded = torch.where(magnitude < format.smallest_normal, nearest, rounded)
    result = rounded * quantum
    if how.rounding == "toward_zero" or how.overflow == "saturate":
        beyond = format.max
    else:
        beyond = float("inf") if format.has_infinity else float("nan")
    result = torch.where(result > format.max, torch.full_like(result, beyond), result)
    unbounded = float("inf") if format.has_infinity else float("nan")
    result = torch.where(torch.isinf(exact), torch.full_like(result, unbounded), result)
    result = torch.where(torch.isnan(exact), exact, torch.copysign(result, exact))
    return result.to(torch.float32)


def encode(values: Tensor, format: FloatFormat) -> Tensor:
    """Encode FP32 values that already lie in an 8-bit format's set as its bytes (uint8)."""
    exact = values.to(torch.float64)
    magnitude = exact.abs()
    finite = torch.where(torch.isfinite(magnitude), magnitude, torch.zeros_like(magnitude))
    exponent = _binade(finite, format)
    steps = finite / _quantum(finite, exponent, format)
    # Subnormals have no implicit one: their `steps` alone are the code of the lowest binade.
    code = steps.to(torch.int64) + (exponent - format.min_exponent).to(torch.int64) * 2**format.mantissa_bits
    top = (2**format.exponent_bits - 1) << format.mantissa_bits
    code = torch.where(torch.isinf(exact), torch.full_like(code, top), code)
    code = torch.where(torch.isnan(exact), torch.full_like(code, 0x7F), code)
    return (code + torch.signbit(exact).to(torch.int64) * 0x80).to(torch.uint8)
