"""Device functions that encode and decode low-precision floats, and draw Philox bits.

Rounding works on bits and by FP32 additions, because the interpreter's cast to a float8 type is wrong. To nearest, GPUs
that have the instruction convert themselves; it saturates, which is corrected afterwards.
reference.py defines every rounding; nothing here may define its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fp8repro.numerics.formats import E4M3, E5M2, FloatFormat
from fp8repro.numerics.rounding import Rounding

NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)
TOWARD_ZERO = tl.constexpr(2)
NEAREST_IN_HARDWARE = tl.constexpr(3)  # E5M2 and E4M3 from sm_89 on; a NaN loses its sign

ROUNDING_CODES = {"nearest": 0, "stochastic": 1, "toward_zero": 2}


def rounding_code(format: FloatFormat, rounding: str, capability: tuple[int, int]) -> int:
    """How `encode` rounds to a format on a GPU of that compute capability; (0, 0): in the interpreter."""
    if rounding == "nearest" and format in (E5M2, E4M3) and capability >= (8, 9):
        return NEAREST_IN_HARDWARE.value
    return ROUNDING_CODES[rounding]


class Encoding(NamedTuple):
    """How kernels round to a format and read its codes: one compile-time argument, `ENCODING`.

    Attributes:
        max: largest finite value.
        exponent_bits, mantissa_bits, has_infinity, bias: as in `FloatFormat`.
        rounding: what `rounding_code` gives.
        saturate: overflow becomes the largest finite value.
        subnormal_nearest: magnitudes below the smallest normal value are rounded to nearest, whatever `rounding` says.
    """

    max: float
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool
    rounding: int
    saturate: bool
    subnormal_nearest: bool
    bias: int


def encoding(how: Rounding, capability: tuple[int, int]) -> Encoding:
    """What kernels for a GPU of that compute capability ((0, 0): the interpreter) get for a rounding."""
    format = how.format
    return Encoding(
        format.max,
        format.exponent_bits,
        format.mantissa_bits,
        format.has_infinity,
        rounding_code(format, how.rounding, capability),
        how.overflow == "saturate",
        how.subnormal_rounding == "nearest",
        format.bias,
    )


class RandomWords(NamedTuple):
    """Key and stream of Philox, as 32-bit words by value, or those of the stream as pointers to them.

    Kernels make it from four arguments (`RANDOM_WORDS`), not one: Triton (3.6 to 3.8) ignores `do_not_specialize` for
    elements of a tuple, and would compile a kernel anew for words that are 1 or multiples of 16.
    """

    seed0: Any
    seed1: Any
    stream0: Any
    stream1: Any


RANDOM_WORDS = list(RandomWords._fields)


@triton.constexpr_function
def e5m2() -> Encoding:
    """E5M2 to nearest, at compile time; kernels cannot read a NamedTuple that is a global variable."""
    return Encoding(57344.0, 5, 2, True, 0, False, False, 15)


@triton.constexpr_function
def e4m3() -> Encoding:
    """E4M3 to nearest, at compile time."""
    return Encoding(448.0, 4, 3, False, 0, False, False, 7)


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
def draws_of_words(w0, w1, w2, w3):
    """[..., n] x 4 -> [..., n, 2, 2, 2]: draws as `encode` takes them, in the row-major order of their elements."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words << 16, words & 0xFFFF0000)


@triton.jit
def interleave(a, b, c, d):
    """[M, N] x 4 -> [M, 4 N]: each thread that holds an element of all four holds four neighbours."""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(joined, [a.shape[0], 4 * a.shape[1]])


@triton.jit
def words_of_blocks(block, words):
    """The four random words of each Philox block of `RandomWords`; `block` is the int64 element index // 8.

    The stream's words come by value, or as pointers: a replayed CUDA graph finds those of its step in memory.
    """
    stream0 = words.stream0
    stream1 = words.stream1
    if stream0.dtype.is_ptr():
        stream0 = tl.load(stream0)
        stream1 = tl.load(stream1)
    return philox_4x32(
        (block & 0xFFFFFFFF).to(tl.uint32),
        (block >> 32).to(tl.uint32),
        stream0.to(tl.uint32, bitcast=True),
        stream1.to(tl.uint32, bitcast=True),
        words.seed0.to(tl.uint32, bitcast=True),
        words.seed1.to(tl.uint32, bitcast=True),
    )


@triton.jit
def draw_of_index(index, words):
    """The random draw of each element of any int64 `index`: eight times the work of whole blocks."""
    w0, w1, w2, w3 = words_of_blocks(index >> 3, words)
    lane = index & 7
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return tl.where((lane & 1) == 0, word << 16, word & 0xFFFF0000)


@triton.jit
def _nearest_in_hardware(x, ENCODING: tl.constexpr):
    """The codes of E5M2 or E4M3 as uint8. The instruction saturates; the code after the largest is what overflow is."""
    EXPONENT_BITS: tl.constexpr = ENCODING.exponent_bits
    SATURATE: tl.constexpr = ENCODING.saturate
    CONVERT: tl.constexpr = "cvt.rn.satfinite.e5m2x2.f32" if EXPONENT_BITS == 5 else "cvt.rn.satfinite.e4m3x2.f32"
    # The least magnitude that rounds past the largest value: halfway to the next, a tie that E4M3 rounds down.
    OVERFLOW: tl.constexpr = "0f7F800000" if SATURATE else "0f47700000" if EXPONENT_BITS == 5 else "0f43E80001"
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b16 low, high; .reg .f32 m;"
        + CONVERT
        + " low, $2, $1;"
        + CONVERT
        + " high, $4, $3;"
        + " mov.b32 $0, {low, high};"
        + " abs.f32 m, $1; setp.ge.f32 p, m, "
        + OVERFLOW
        + "; @p add.u32 $0, $0, 0x1;"
        + " abs.f32 m, $2; setp.ge.f32 p, m, "
        + OVERFLOW
        + "; @p add.u32 $0, $0, 0x100;"
        + " abs.f32 m, $3; setp.ge.f32 p, m, "
        + OVERFLOW
        + "; @p add.u32 $0, $0, 0x10000;"
        + " abs.f32 m, $4; setp.ge.f32 p, m, "
        + OVERFLOW
        + "; @p add.u32 $0, $0, 0x1000000; }",
        "=&r,r,r,r,r",
        [x],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def encode(x, draw, ENCODING: tl.constexpr):
    """Round FP32 values once to a format and return its codes (sign, exponent, significand) as uint32.

    `draw` holds 16 random bits on top of a uint32 for each element; it is not read unless rounding is stochastic.
    """
    if ENCODING.rounding == NEAREST_IN_HARDWARE:
        code = _nearest_in_hardware(x, ENCODING).to(tl.uint32)
    else:
        code = _encode_bits(x, draw, ENCODING)
    return code


@triton.jit
def _encode_bits(x, draw, ENCODING: tl.constexpr):
    EXPONENT_BITS: tl.constexpr = ENCODING.exponent_bits
    MANTISSA_BITS: tl.constexpr = ENCODING.mantissa_bits
    HAS_INFINITY: tl.constexpr = ENCODING.has_infinity
    ROUNDING: tl.constexpr = ENCODING.rounding
    SATURATE: tl.constexpr = ENCODING.saturate
    SUBNORMAL_NEAREST: tl.constexpr = ENCODING.subnormal_nearest
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    MIN_EXPONENT: tl.constexpr = 1 - ENCODING.bias
    # A code counts the values from zero up, so in every binade it is the FP32 code, shifted, less a constant.
    REBIAS: tl.constexpr = (126 + MIN_EXPONENT) << MANTISSA_BITS
    SMALLEST_NORMAL: tl.constexpr = (MIN_EXPONENT + 127) << 23
    TOP_CODE: tl.constexpr = (1 << (EXPONENT_BITS + MANTISSA_BITS)) - 1
    # The largest finite code; the one after it is infinity, and in a format without infinity NaN.
    MAX_CODE: tl.constexpr = (TOP_CODE >> MANTISSA_BITS << MANTISSA_BITS) - 1 if HAS_INFINITY else TOP_CODE - 1
    NAN_CODE: tl.constexpr = (
        TOP_CODE
        if EXPONENT_BITS + MANTISSA_BITS == 7 or not HAS_INFINITY
        else MAX_CODE + 1 + (1 << (MANTISSA_BITS - 1))
    )

    # One minimum then settles overflow and NaN: larger magnitudes become the value after the largest, which overflow
    # gives anyway, and NaN, whose bits are those of a still larger magnitude, stays NaN.
    BOUNDED: tl.constexpr = EXPONENT_BITS < 8 and not SATURATE and ROUNDING != TOWARD_ZERO

    bits = x.to(tl.uint32, bitcast=True)
    absolute = tl.abs(x)
    if BOUNDED and HAS_INFINITY:
        # The power of two after the largest value.
        PAST: tl.constexpr = 2.0 ** ((1 << EXPONENT_BITS) - 1 - ENCODING.bias)
        absolute = tl.minimum(absolute, PAST, propagate_nan=tl.PropagateNan.ALL)
    magnitude = absolute.to(tl.uint32, bitcast=True)
    nearest = magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)
    if ROUNDING == NEAREST:
        rounded = nearest
    elif ROUNDING == STOCHASTIC:
        # Carries exactly when draw < floor(dropped bits * 2^(16 - DROPPED) + 1/2).
        rest = 0xFFFF8000 - draw
        rounded = magnitude + (rest >> (32 - DROPPED))
        if EXPONENT_BITS == 8 and SUBNORMAL_NEAREST:
            rounded = tl.where(magnitude < SMALLEST_NORMAL, nearest, rounded)
    else:
        rounded = magnitude
    code = (rounded >> DROPPED) - REBIAS

    if BOUNDED:
        code = tl.minimum(code, NAN_CODE)
    else:
        if SATURATE or ROUNDING == TOWARD_ZERO:
            code = tl.minimum(code, MAX_CODE)
            code = tl.where(magnitude == 0x7F800000, MAX_CODE + 1, code)
        else:
            code = tl.minimum(code, MAX_CODE + 1)
        code = tl.where(magnitude > 0x7F800000, NAN_CODE, code)

    # A format with FP32's exponents has FP32's subnormals, whose codes the lines above give already.
    if EXPONENT_BITS < 8:
        if ROUNDING == NEAREST or (ROUNDING == STOCHASTIC and SUBNORMAL_NEAREST):
            # FP32 addition rounds to nearest even at the last bit of ALIGN, which is the format's quantum.
            ALIGN: tl.constexpr = 2.0 ** (MIN_EXPONENT - MANTISSA_BITS + 23)
            small_code = (absolute + ALIGN).to(tl.uint32, bitcast=True)
        elif ROUNDING == STOCHASTIC and MANTISSA_BITS <= 6:
            # 128 quanta, in which FP32 has steps of 2^-16 quanta: the sum rounds to the nearest step, of two the even
            # one, and the one that carries into the quanta is even.
            STEPS: tl.constexpr = (MIN_EXPONENT - MANTISSA_BITS + 7 + 127) << 23
            sum = absolute + ((rest >> 16) + STEPS).to(tl.float32, bitcast=True)
            small_code = (sum.to(tl.uint32, bitcast=True) >> 16) - (STEPS >> 16)
        else:
            # More quanta than such a sum can count. Clamped, so that the discarded branch of large inputs converts no
            # huge float to an integer.
            small = tl.minimum(magnitude, SMALLEST_NORMAL).to(tl.float32, bitcast=True)
            # In halves of the draw's steps, rounded down: with half a step in `rest`, that rounds whole ones half up.
            FRACTION: tl.constexpr = 17 if ROUNDING == STOCHASTIC else 0
            scaled = small * (2.0 ** (MANTISSA_BITS - MIN_EXPONENT + FRACTION))
            steps = scaled.to(tl.int32).to(tl.uint32, bitcast=True)
            if ROUNDING == STOCHASTIC:
                steps += rest >> (32 - FRACTION)
            small_code = steps >> FRACTION
        code = tl.where(magnitude < SMALLEST_NORMAL, small_code, code)
    # One mask, at the end, clears all bits above those that are stored.
    sign = (bits >> (31 - EXPONENT_BITS - MANTISSA_BITS)) & (1 << (EXPONENT_BITS + MANTISSA_BITS))
    return (code | sign) & ((2 << (EXPONENT_BITS + MANTISSA_BITS)) - 1)


@triton.jit
def decode(code, ENCODING: tl.constexpr):
    """The FP32 values of a format's codes (uint32)."""
    EXPONENT_BITS: tl.constexpr = ENCODING.exponent_bits
    MANTISSA_BITS: tl.constexpr = ENCODING.mantissa_bits
    HAS_INFINITY: tl.constexpr = ENCODING.has_infinity
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    MIN_EXPONENT: tl.constexpr = 1 - ENCODING.bias
    REBIAS: tl.constexpr = (126 + MIN_EXPONENT) << MANTISSA_BITS
    TOP_CODE: tl.constexpr = (1 << (EXPONENT_BITS + MANTISSA_BITS)) - 1
    MAX_CODE: tl.constexpr = (TOP_CODE >> MANTISSA_BITS << MANTISSA_BITS) - 1 if HAS_INFINITY else TOP_CODE - 1

    if EXPONENT_BITS == 5 and HAS_INFINITY and ENCODING.bias == 15:
        # The upper bits of an FP16 value, which converts exactly.
        half = (code << (10 - MANTISSA_BITS)).to(tl.uint16).to(tl.float16, bitcast=True)
        value = half.to(tl.float32)
    else:
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
        value = (bits | sign).to(tl.float32, bitcast=True)
    return value
