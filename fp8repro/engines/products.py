"""The products of a recipe: the one place where emulated and real FP8 differ.

A backend multiplies operands that are rounded already and accumulates in FP32; it must never round an operand, choose a
format, or round a result unless it is told how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8repro.engines.guards import plain
from fp8repro.numerics.formats import FP32, FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding


@dataclass
class Operand:
    """One rounded tensor on its way into products; its real values are `codes / scale`.

    Attributes:
        codes: the encoding, in the format's storage dtype (FP32 where the format has none).
        fmt: the format.
        scale: a power of two, or None for 1.
        values: the real values in the dtype that the backend computes with, where somebody needed them.
        transposed: the codes of the transposed matrix, contiguous, where somebody needed them; leading dimensions count
            as rows.
        packed: forms of a weight that a backend made for its own use; kept for the next product.
    """

    codes: Tensor
    fmt: FloatFormat = FP32
    scale: float | None = None
    values: Tensor | None = None
    transposed: Tensor | None = None
    packed: dict[object, Tensor] = field(default_factory=dict)

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The real values; kept for the next caller."""
        if self.values is None or self.values.dtype != dtype:
            values = decode(self.codes, dtype)
            # Exact: the scale is a power of two.
            self.values = values if self.scale is None else values / self.scale
        return self.values


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Encoded values as FP32 or BF16 numbers; exact for the 8-bit formats."""
    from fp8repro.engines.cpu import native

    fast = codes.is_cpu and codes.element_size() == 1 and native.available()
    # What is traced gets torch's cast, as exact: a graph holds nothing of ours.
    if fast and plain(codes):
        values = torch.empty_like(codes, dtype=dtype)
        native.decode(codes, values)
        return values
    return codes.to(dtype)


@dataclass(frozen=True)
class Conv2dGeometry:
    """Stride, padding and dilation (height, width) and groups of a two-dimensional convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Backend(Protocol):
    """What multiplies: three products for each kind of layer, all with FP32 results that are not rounded."""

    name: str

    def rounding(self, how: Rounding, bits: RandomBits, codes: bool = False) -> Backend | None:
        """The same products with results rounded as they are stored, to the bytes of a pass of its own.

        None where the backend knows no such products. With `codes`, results are codes of an 8-bit format, in its
        storage dtype; else FP32 values.
        """
        ...

    def value_dtype(self, fmt: FloatFormat) -> torch.dtype | None:
        """The dtype of `Operand.values` that spares the backend a conversion; None where codes are enough."""
        ...

    def wants_transposed(self, fmt: FloatFormat) -> bool:
        """True where matrices of two products are wanted in both layouts (`Operand.transposed`)."""
        ...

    def linear(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        """x [..., K], weight [N, K], bias [N] -> [..., N]."""
        ...

    def linear_error(self, error: Operand, weight: Operand) -> Tensor:
        """error [..., N], weight [N, K] -> [..., K]."""
        ...

    def linear_gradient(self, error: Operand, x: Operand) -> Tensor:
        """error [..., N], x [..., K] -> [N, K]."""
        ...

    def conv2d(self, x: Operand, weight: Operand, bias: Tensor | None, geometry: Conv2dGeometry) -> Tensor:
        """x [B, C, H, W], weight [O, C / groups, R, S], bias [O] -> [B, O, P, Q]."""
        ...

    def conv2d_error(self, error: Operand, weight: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """error [B, O, P, Q], weight -> [B, C, H, W], in shape and memory layout like the input `like`."""
        ...

    def conv2d_gradient(self, error: Operand, x: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """error [B, O, P, Q], x [B, C, H, W] -> [O, C / groups, R, S], in shape and layout like the weight `like`."""
        ...

    def matmul(self, a: Operand, b: Operand) -> Tensor:
        """a [..., M, K], b [..., K, N] with the same leading dimensions -> [..., M, N]."""
        ...

    def matmul_error_a(self, error: Operand, b: Operand) -> Tensor:
        """error [..., M, N], b [..., K, N] -> [..., M, K]."""
        ...

    def matmul_error_b(self, error: Operand, a: Operand) -> Tensor:
        """error [..., M, N], a [..., M, K] -> [..., K, N]."""
        ...


class EmulateBackend:
    """FP32 products of the operands' values: exact operands, FP32 accumulation, any device."""

    name = "emulate"

    def rounding(self, how: Rounding, bits: RandomBits, codes: bool = False) -> Backend | None:
        """None: results are rounded in a pass of their own."""
        return None

    def value_dtype(self, fmt: FloatFormat) -> torch.dtype | None:
        """FP32 for every format."""
        return torch.float32

    def wants_transposed(self, fmt: FloatFormat) -> bool:
        """False: torch multiplies in any layout."""
        return False

    def linear(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        """See `Backend`."""
        return F.linear(x.decoded(), weight.decoded(), bias)

    def linear_error(self, error: Operand, weight: Operand) -> Tensor:
        """See `Backend`."""
        values = error.decoded()
        # Rows that do not lie behind each other (errors of attention heads) would become a batch of small products.
        return (values.flatten(0, -2) @ weight.decoded()).unflatten(0, values.shape[:-1])

    def linear_gradient(self, error: Operand, x: Operand) -> Tensor:
        """See `Backend`."""
        return error.decoded().flatten(0, -2).t() @ x.decoded().flatten(0, -2)

    def conv2d(self, x: Operand, weight: Operand, bias: Tensor | None, geometry: Conv2dGeometry) -> Tensor:
        """See `Backend`."""
        g = geometry
        return F.conv2d(x.decoded(), weight.decoded(), bias, g.stride, g.padding, g.dilation, g.groups)

    def conv2d_error(self, error: Operand, weight: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """See `Backend`."""
        # Only the shape and the layout of the input count here, but both decide which algorithm torch takes.
        x = torch.empty_like(like, dtype=torch.float32)
        return _convolution_backward(error.decoded(), x, weight.decoded(), geometry, (True, False, False))[0]

    def conv2d_gradient(self, error: Operand, x: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """See `Backend`."""
        weight = torch.empty_like(like, dtype=torch.float32)
        return _convolution_backward(error.decoded(), x.decoded(), weight, geometry, (False, True, False))[1]

    def matmul(self, a: Operand, b: Operand) -> Tensor:
        """See `Backend`."""
        return torch.matmul(a.decoded(), b.decoded())

    def matmul_error_a(self, error: Operand, b: Operand) -> Tensor:
        """See `Backend`."""
        return torch.matmul(error.decoded(), b.decoded().transpose(-1, -2))

    def matmul_error_b(self, error: Operand, a: Operand) -> Tensor:
        """See `Backend`."""
        return torch.matmul(a.decoded().transpose(-1, -2), error.decoded())


def _convolution_backward(
    error: Tensor, x: Tensor, weight: Tensor, geometry: Conv2dGeometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    g = geometry
    result: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        error, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups, wanted
    )
    return result
