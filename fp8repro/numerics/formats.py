"""Floating-point formats: bits, bias, range and overflow rule.

Pure numbers: this module must never touch a tensor's data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format with a sign bit and subnormals.

    All engines take one of your own: 2 to 7 exponent and 1 to 13 stored significand bits, values from 2^-100 to under
    2^100 (docs/formats.md).

    Attributes:
        name: the name by which configurations refer to it.
        exponent_bits: width of the exponent field.
        mantissa_bits: stored significand bits, without the implicit one.
        has_infinity: False for "finite only" formats (E4M3 of OCP/NVIDIA), whose top binade holds
            numbers and whose only special encoding is NaN with all magnitude bits set.
        dtype: the torch dtype that stores it, or None (then values are carried in FP32).
        exponent_bias: what the stored exponent exceeds the real one by; None for IEEE's 2^(exponent_bits - 1) - 1.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_infinity: bool = True
    dtype: torch.dtype | None = None
    exponent_bias: int | None = None

    @property
    def bias(self) -> int:
        """Exponent bias."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bias is None else self.exponent_bias

    @property
    def max_exponent(self) -> int:
        """Unbiased exponent of the largest finite value."""
        top_code = 2**self.exponent_bits - 1
        return (top_code - 1 if self.has_infinity else top_code) - self.bias

    @property
    def min_exponent(self) -> int:
        """Unbiased exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def max(self) -> float:
        """Largest finite value (57344 for E5M2, 448 for E4M3)."""
        ulps = 2 ** (self.mantissa_bits + 1) - (1 if self.has_infinity else 2)
        return ulps * 2.0 ** (self.max_exponent - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """Smallest positive normal value (2^-14 for E5M2)."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value, the quantum of all subnormals (2^-16 for E5M2)."""
        return 2.0 ** (self.min_exponent - self.mantissa_bits)

    @property
    def bits(self) -> int:
        """Storage width in bits, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def is_fp8(self) -> bool:
        """True for the 8-bit formats."""
        return self.bits == 8


E5M2 = FloatFormat("e5m2", 5, 2, dtype=torch.float8_e5m2)
E4M3 = FloatFormat("e4m3", 4, 3, has_infinity=False, dtype=torch.float8_e4m3fn)
FP16 = FloatFormat("fp16", 5, 10, dtype=torch.float16)
BF16 = FloatFormat("bf16", 8, 7, dtype=torch.bfloat16)
FP16_169 = FloatFormat("fp16_1_6_9", 6, 9)
FP32 = FloatFormat("fp32", 8, 23, dtype=torch.float32)

FORMATS: dict[str, FloatFormat] = {f.name: f for f in (E5M2, E4M3, FP16, BF16, FP16_169, FP32)}


def get_format(format: str | FloatFormat) -> FloatFormat:
    """Return the format of that name.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if isinstance(format, FloatFormat):
        return format
    try:
        return FORMATS[format]
    except KeyError:
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}") from None
