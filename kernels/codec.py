"""Device functions that encode and decode low-precision floats on integer bits, and draw Philox bits.

No hardware or interpreter cast to a float8 type is used: the GPU's saturates, the interpreter's rounds wrongly.
The meaning of every rounding is reference.py's; nothing here may define its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
TOWARD_ZERO = tl.constexpr(2)

ROUNDING_CODES = {"nearest": 0, "stochastic": 1, "toward_zero": 2}


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10: counter words (uint32 tensor c0, the others of its shape or scalars), key words k0 and k1."""
    c1 = c1 + tl.zeros_like(c0)
    c2 = c2 + tl.zeros_like(c0)
    c3 = c3 + tl.zeros_like(c0)
    for _ in tl.static_range(10):
        # One 32 x 32 -> 64 multiplication gives both words; separate high and low products cost twice as much.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def interleave4(w0, w1, w2, w3):
    """[..., n] x 4 -> [..., n, 2, 2], whose row-major order is w0[0], w1[0], w2[0], w3[0], w0[1], ..."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def words_of_blocks(block, seed0, seed1, stream0, stream1):
    """The four random words of each Philox block of a stream; `block` is the int64 element index // 4.

    The stream's words come by value, or as pointers: a replayed CUDA graph finds those of its step in memory.
    """
    if stream0.dtype.is_ptr():
        stream0 = tl.load(stream0)
        stream1 = tl.load(stream1)
    return philox_4x32(
        (block & 0xFFFFFFFF).to(tl.uint32),
        (block >> 32).to(tl.uint32),
        stream0.to(tl.uint32, bitcast=True),
        stream1.to(tl.uint32, bitcast=True),
        seed0.to(tl.uint32, bitcast=True),
        seed1.to(tl.uint32, bitcast=True),
    )


@triton.jit
def word_of_index(index, seed0, seed1, stream0, stream1):
    """The random word of each element of any int64 `index`: four times the work of whole blocks."""
    w0, w1, w2, w3 = words_of_blocks(index >> 2, seed0, seed1, stream0, stream1)
    lane = index & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def encode(
    x,
    draw,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    HAS_INFINITY: tl.constexpr,
    ROUNDING: tl.constexpr,
    SATURATE: tl.constexpr,
    SUBNORMAL_NEAREST: tl.constexpr,
):
    """Round FP32 values once to a format and return its codes (sign, exponent, significand) as uint32.

    `draw` holds one random uint32 word an element; it is not read unless ROUNDING is STOCHASTIC.
    """
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    MIN_EXPONENT: tl.constexpr = 2 - (1 << (EXPONENT_BITS - 1))
    # A code counts the values from zero up, so in every binade it is the FP32 code, shifted, less a constant.
    REBIAS: tl.constexpr = (126 + MIN_EXPONENT) << MANTISSA_BITS
    SMALLEST_NORMAL: tl.constexpr = (MIN_EXPONENT + 127) << 23
    TOP_CODE: tl.constexpr = (1 << (EXPONENT_BITS + MANTISSA_BITS)) - 1
    # The largest finite code; the one after it is infinity, and in a format without infinity NaN.
    MAX_CODE: tl.constexpr = (TOP_CODE >> MANTISSA_BITS << MANTISSA_BITS) - 1 if HAS_INFINITY else TOP_CODE - 1
    NAN_CODE: tl.constexpr = (
        TOP_CODE if EXPONENT_BITS + MANTISSA_BITS == 7 else MAX_CODE + 1 + (1 << (MANTISSA_BITS - 1))
    )

    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    nearest = magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    if ROUNDING == NEAREST:
        rounded = nearest
    elif ROUNDING == STOCHASTIC:
        # Carries exactly when draw < dropped bits * 2^(32 - DROPPED).
        rounded = magnitude + ((draw ^ 0xFFFFFFFF) >> (32 - DROPPED))
        if EXPONENT_BITS == 8 and SUBNORMAL_NEAREST:
            rounded = tl.where(magnitude < SMALLEST_NORMAL, nearest, rounded)
    else:
        rounded = magnitude
    code = (rounded >> DROPPED).to(tl.int32) - REBIAS

    # A format with FP32's exponents has FP32's subnormals, whose codes the lines above give already.
    if EXPONENT_BITS < 8:
        # Clamped, so that the discarded branch of large inputs converts no huge float to an integer.
        small = tl.minimum(magnitude, SMALLEST_NORMAL).to(tl.float32, bitcast=True)
        ALIGN: tl.constexpr = 2.0 ** (MIN_EXPONENT - MANTISSA_BITS + 23)
        ALIGN_BITS: tl.constexpr = (MIN_EXPONENT - MANTISSA_BITS + 23 + 127) << 23
        if ROUNDING == NEAREST or (ROUNDING == STOCHASTIC and SUBNORMAL_NEAREST):
            # FP32 addition rounds to nearest even at the last bit of ALIGN, which is the format's quantum.
            small_code = (small + ALIGN).to(tl.int32, bitcast=True) - ALIGN_BITS
        else:
            steps = small * (2.0 ** (MANTISSA_BITS - MIN_EXPONENT))
            lower = tl.floor(steps)
            small_code = lower.to(tl.int32)
            if ROUNDING == STOCHASTIC:
                # An integer draw is under a real threshold exactly when it is under the threshold's ceiling.
                threshold = tl.ceil((steps - lower) * 4294967296.0).to(tl.uint32)
                small_code += (draw < threshold).to(tl.int32)
        code = tl.where(magnitude < SMALLEST_NORMAL, small_code, code)

    if SATURATE or ROUNDING == TOWARD_ZERO:
        code = tl.minimum(code, MAX_CODE)
        code = tl.where(magnitude == 0x7F800000, MAX_CODE + 1, code)
    else:
        code = tl.minimum(code, MAX_CODE + 1)
    code = tl.where(magnitude > 0x7F800000, NAN_CODE, code)
    sign = (bits >> 31) << (EXPONENT_BITS + MANTISSA_BITS)
    return code.to(tl.uint32, bitcast=True) | sign


@triton.jit
def decode(code, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, HAS_INFINITY: tl.constexpr):
    """The FP32 values of a format's codes (uint32)."""
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    MIN_EXPONENT: tl.constexpr = 2 - (1 << (EXPONENT_BITS - 1))
    REBIAS: tl.constexpr = (126 + MIN_EXPONENT) << MANTISSA_BITS
    TOP_CODE: tl.constexpr = (1 << (EXPONENT_BITS + MANTISSA_BITS)) - 1
    MAX_CODE: tl.constexpr = (TOP_CODE >> MANTISSA_BITS << MANTISSA_BITS) - 1 if HAS_INFINITY else TOP_CODE - 1

    magnitude = code & TOP_CODE
    bits = (magnitude + REBIAS) << DROPPED
    if EXPONENT_BITS < 8:
        ALIGN: tl.constexpr = 2.0 ** (MIN_EXPONENT - MANTISSA_BITS + 23)
        ALIGN_BITS: tl.constexpr = (MIN_EXPONENT - MANTISSA_BITS + 23 + 127) << 23
        small = (magnitude + ALIGN_BITS).to(tl.float32, bitcast=True) - ALIGN
        bits = tl.where(magnitude < (1 << MANTISSA_BITS), small.to(tl.uint32, bitcast=True), bits)
        if HAS_INFINITY:
            bits = tl.where(magnitude == MAX_CODE + 1, 0x7F800000, bits)
            bits = tl.where(magnitude > MAX_CODE + 1, 0x7FC00000, bits)
        else:
            bits = tl.where(magnitude > MAX_CODE, 0x7FC00000, bits)
    sign = (code >> (EXPONENT_BITS + MANTISSA_BITS)) << 31
    return (bits | sign).to(tl.float32, bitcast=True)
