"""How values are rounded and where their random bits come from, each in one piece that every engine is handed whole.

Nothing here rounds: `reference.py` defines what the words mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from fp8repro.errors import UserError
from fp8repro.numerics.formats import E5M2, FORMATS, FP32, FloatFormat
from fp8repro.numerics.streams import Stream

CHOICES: dict[str, tuple[str, ...]] = {
    "rounding": ("nearest", "stochastic", "toward_zero"),
    "overflow": ("inf", "saturate"),
    "subnormal_rounding": ("same", "nearest"),
    "scaling": ("none", "tensor"),
}
ORDERS = ("row_major", "channels_last")


def one_of(setting: str, given: Any, accepted: tuple[str, ...]) -> None:
    """Raise UserError unless `given` is one of the accepted words."""
    if not isinstance(given, str) or given not in accepted:
        raise UserError(f"{setting}: got {given!r}, expected one of {', '.join(accepted)}")


@dataclass(frozen=True)
class Rounding:
    """How tensors are rounded to a format (paper, section 3).

    Attributes:
        format: a `FloatFormat`, or the name of one; "fp32" leaves tensors as they are.
        rounding: "nearest" (ties to even), "stochastic" (16 random bits a value) or "toward_zero".
        overflow: "inf" (in a format without infinity: NaN) or "saturate".
        subnormal_rounding: "same", or "nearest" to round subnormal results to nearest in stochastic mode.
        scaling: "none", or "tensor": multiply by the power of two that brings the largest magnitude just under the
            format's maximum, and divide it out again after the product. Layers do that; engines know no scale.
    """

    format: FloatFormat = E5M2
    rounding: str = "nearest"
    overflow: str = "inf"
    subnormal_rounding: str = "same"
    scaling: str = "none"

    def __post_init__(self) -> None:
        """Look up a format that is given by its name.

        Raises:
            UserError: a value that is not among those above.
        """
        if not isinstance(self.format, FloatFormat):
            one_of("format", self.format, tuple(FORMATS))
            object.__setattr__(self, "format", FORMATS[self.format])
        for name, accepted in CHOICES.items():
            one_of(name, getattr(self, name), accepted)

    @cached_property
    def is_identity(self) -> bool:
        """True where FP32 tensors stay as they are."""
        return self.format.mantissa_bits == FP32.mantissa_bits and self.format.exponent_bits == FP32.exponent_bits

    @cached_property
    def is_stochastic(self) -> bool:
        """True where random bits are drawn."""
        return self.rounding == "stochastic"

    @cached_property
    def to_nearest(self) -> Rounding:
        """The same without random bits, which is how evaluation rounds."""
        return replace(self, rounding="nearest") if self.is_stochastic else self

    def __deepcopy__(self, memo: Any) -> Rounding:
        """Itself: nothing of it changes, and the copy of a model asks for the same formats."""
        return self

    def __str__(self) -> str:
        """In a report: `e5m2/stochastic`."""
        return f"{self.format.name}/{self.rounding}"


IDENTITY = Rounding(FP32)


class RandomBits(NamedTuple):
    """Where the random bits of one tensor come from; without random bits nothing of it is read.

    Attributes:
        seed: 64-bit key.
        stream: 64-bit stream, or where in device memory it lies; tensors that must not share bits need different ones.
        order: how elements are counted (`reference.counted`). Kernels of a product know it by the product.
    """

    seed: int = 0
    stream: Stream = 0
    order: str = "row_major"
