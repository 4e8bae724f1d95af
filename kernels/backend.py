"""Products in real FP8: operands in FP8 (or 16 bit) memory, multiplied by Triton kernels with FP32 accumulation.

What the kernels do not take (FP32 or mixed operands, grouped convolutions) is emulated. Must never round an operand.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fp8repro.engines.guards import spell, untraced
from fp8repro.engines.products import Conv2dGeometry, EmulateBackend, Operand
from fp8repro.engines.quantizer import round_into
from fp8repro.kernels import ops
from fp8repro.kernels.conv2d import launch as convolution
from fp8repro.kernels.matmul import launch as product
from fp8repro.kernels.matmul.launch import FP8_DTYPES, Epilogue
from fp8repro.kernels.shared.configs import Target
from fp8repro.kernels.shared.launch import INTERPRETED
from fp8repro.numerics.formats import FloatFormat
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.numerics.streams import StreamSlot, signed64


def available(device: torch.device | str) -> str | None:
    """Why Triton products cannot run on a device, in one line; None when they can.

    A CPU can when Triton interprets (TRITON_INTERPRET=1), which is meant for tests.
    """
    device = torch.device(device)
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET is set: kernels run on the CPU only"
    if device.type != "cuda":
        return f"the model is on {device.type}, and the kernels need a CUDA GPU"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "this build of torch has no CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no FP8 tensor cores"
    return None


class TritonBackend:
    """Triton products of operands that are both FP8, both FP16 or both BF16.

    Attributes:
        accumulate: "promoted" or "fp16_mma" (see `Recipe.accumulate`).
        how, bits, codes: how results are rounded, or None, and whether they are codes.
        target: the GPU to plan for; None: the one that holds the operands, which operators always take.
    """

    name = "triton"

    def __init__(
        self,
        accumulate: str = "promoted",
        how: Rounding | None = None,
        bits: RandomBits = RandomBits(),
        target: Target | None = None,
        codes: bool = False,
    ) -> None:
        """Nothing is launched or compiled yet."""
        self.accumulate, self.how, self.bits, self.target, self.codes = accumulate, how, bits, target, codes
        self.emulated = EmulateBackend()

    def rounding(self, how: Rounding, bits: RandomBits, codes: bool = False) -> TritonBackend:
        """See `products.Backend`."""
        return TritonBackend(self.accumulate, how, bits, self.target, codes)

    def value_dtype(self, fmt: FloatFormat) -> torch.dtype | None:
        """None: codes are enough; FP32 for formats that the kernels cannot read."""
        return None if fmt.dtype not in (None, torch.float32) else torch.float32

    def wants_transposed(self, fmt: FloatFormat) -> bool:
        """True in FP8, whose instructions want the summed dimension contiguous in both operands."""
        return fmt.is_fp8

    def linear(self, x: Operand, weight: Operand, bias: Tensor | None) -> Tensor:
        """See `products.Backend`."""
        if not _native(x, weight):
            return self._rounded(self.emulated.linear(x, weight, bias))
        result = self._matmul(x.codes.flatten(0, -2), weight.codes.t(), bias, _inverse_scale(x, weight))
        return result.view(*x.codes.shape[:-1], result.shape[-1])

    def linear_error(self, error: Operand, weight: Operand) -> Tensor:
        """See `products.Backend`."""
        if not _native(error, weight):
            return self._rounded(self.emulated.linear_error(error, weight))
        codes = weight.codes if weight.transposed is None else weight.transposed.t()
        result = self._matmul(error.codes.flatten(0, -2), codes, None, _inverse_scale(error, weight))
        return result.view(*error.codes.shape[:-1], result.shape[-1])

    def linear_error_parts(self, error: Operand, weight: Operand) -> Tensor:
        """`linear_error` of a matrix, not rounded, as FP32 [parts, rows, K] that add up to it."""
        if not _native(error, weight):
            return self.emulated.linear_error(error, weight).unsqueeze(0)
        codes = weight.codes if weight.transposed is None else weight.transposed.t()
        options = self._plain_options(_inverse_scale(error, weight))
        return product.matmul(error.codes, codes, parts_apart=True, **options)

    def linear_gradient(self, error: Operand, x: Operand) -> Tensor:
        """See `products.Backend`."""
        if not _native(error, x):
            return self._rounded(self.emulated.linear_gradient(error, x))
        transposed = error.codes.flatten(0, -2).t() if error.transposed is None else error.transposed
        codes = x.codes.flatten(0, -2) if x.transposed is None else x.transposed.t()
        return self._matmul(transposed, codes, None, _inverse_scale(error, x))

    def linear_gradient_parts(self, error: Operand, x: Operand) -> Tensor:
        """`linear_gradient` of matrices, not rounded, as FP32 [parts, N, K] that add up to it."""
        if not _native(error, x):
            return self.emulated.linear_gradient(error, x).unsqueeze(0)
        transposed = error.codes.t() if error.transposed is None else error.transposed
        codes = x.codes if x.transposed is None else x.transposed.t()
        options = self._plain_options(_inverse_scale(error, x))
        return product.matmul(transposed, codes, parts_apart=True, **options)

    def conv2d(self, x: Operand, weight: Operand, bias: Tensor | None, geometry: Conv2dGeometry) -> Tensor:
        """See `products.Backend`."""
        if not _native(x, weight, geometry):
            return self._rounded(self.emulated.conv2d(x, weight, bias, geometry))
        scale = _inverse_scale(x, weight)
        if self._plain(x.codes, weight.codes, bias):
            options = self._plain_options(scale)
            return convolution.conv2d(x.codes, weight.codes, bias, geometry, epilogue=self._epilogue(), **options)
        return ops.conv2d(x.codes, weight.codes, bias, *_lists(geometry), scale, self.accumulate, *self._options())

    def conv2d_error(self, error: Operand, weight: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """See `products.Backend`."""
        if not _native(error, weight, geometry):
            return self._rounded(self.emulated.conv2d_error(error, weight, geometry, like))
        shape, scale = list(like.shape), _inverse_scale(error, weight)
        if self._plain(error.codes, weight.codes):
            options = self._plain_options(scale)
            result = convolution.conv2d_error(
                error.codes, weight.codes, tuple(shape), geometry, epilogue=self._epilogue(), **options
            )
        else:
            result = ops.conv2d_error(
                error.codes, weight.codes, shape, *_lists(geometry), scale, self.accumulate, *self._options()
            )
        return _laid_out_like(result, like)

    def conv2d_gradient(self, error: Operand, x: Operand, geometry: Conv2dGeometry, like: Tensor) -> Tensor:
        """See `products.Backend`."""
        if not _native(error, x, geometry):
            return self._rounded(self.emulated.conv2d_gradient(error, x, geometry, like))
        shape, scale = list(like.shape), _inverse_scale(error, x)
        if self._plain(error.codes, x.codes):
            options = self._plain_options(scale)
            result = convolution.conv2d_gradient(
                error.codes, x.codes, tuple(shape), geometry, epilogue=self._epilogue(), **options
            )
            return _laid_out_like(result, like)
        result = ops.conv2d_gradient(error.codes, x.codes, shape, *_lists(geometry), scale, self.accumulate)
        return self._rounded(_laid_out_like(result, like))

    def matmul(self, a: Operand, b: Operand) -> Tensor:
        """See `products.Backend`."""
        if not _native(a, b):
            return self._rounded(self.emulated.matmul(a, b))
        return self._matmul(a.codes, b.codes, None, _inverse_scale(a, b))

    def matmul_error_a(self, error: Operand, b: Operand) -> Tensor:
        """See `products.Backend`."""
        if not _native(error, b):
            return self._rounded(self.emulated.matmul_error_a(error, b))
        return self._matmul(error.codes, b.codes.transpose(-1, -2), None, _inverse_scale(error, b))

    def matmul_error_b(self, error: Operand, a: Operand) -> Tensor:
        """See `products.Backend`."""
        if not _native(error, a):
            return self._rounded(self.emulated.matmul_error_b(error, a))
        return self._matmul(a.codes.transpose(-1, -2), error.codes, None, _inverse_scale(error, a))

    def _matmul(self, a: Tensor, b: Tensor, bias: Tensor | None, inverse_scale: float) -> Tensor:
        if self._plain(a, b, bias):
            return product.matmul(a, b, bias, epilogue=self._epilogue(), **self._plain_options(inverse_scale))
        return ops.matmul(a, b, bias, inverse_scale, self.accumulate, *self._options())

    def _plain(self, *operands: Tensor | None) -> bool:
        """True where kernels are called without their operators."""
        return untraced(*operands) or (self.how is not None and isinstance(self.bits.stream, StreamSlot))

    def _plain_options(self, inverse_scale: float) -> dict[str, Any]:
        return {"inverse_scale": inverse_scale, "accumulate": self.accumulate, "target": self.target}

    def _epilogue(self) -> Epilogue | None:
        """How a plain function is to round its result."""
        return None if self.how is None else Epilogue(self.how, self.bits, self.codes)

    def _options(self) -> tuple[str, int, int, bool]:
        """How an operator is to round its result."""
        if self.how is None:
            return ops.AS_IT_IS, 0, 0, False
        assert isinstance(self.bits.stream, int)
        return spell(self.how), signed64(self.bits.seed), signed64(self.bits.stream), self.codes

    def _rounded(self, result: Tensor) -> Tensor:
        """A result that no kernel of ours has rounded, rounded in place unless it becomes codes."""
        if self.how is None:
            return result
        if not self.codes:
            round_into(result, self.how, self.bits, values=result)
            return result
        codes = torch.empty_like(result, dtype=self.how.format.dtype)
        round_into(result, self.how, self.bits, codes=codes)
        return codes


def _native(a: Operand, b: Operand, geometry: Conv2dGeometry | None = None) -> bool:
    """True where a kernel takes the operands as they are."""
    if geometry is not None and geometry.groups != 1:
        warnings.warn("backend=triton: grouped convolutions are emulated in FP32", stacklevel=3)
        return False
    both_fp8 = a.codes.dtype in FP8_DTYPES and b.codes.dtype in FP8_DTYPES
    return both_fp8 or (a.codes.dtype == b.codes.dtype and a.codes.dtype in (torch.float16, torch.bfloat16))


def _inverse_scale(a: Operand, b: Operand) -> float:
    return 1.0 / ((a.scale or 1.0) * (b.scale or 1.0))


def _lists(g: Conv2dGeometry) -> tuple[list[int], list[int], list[int]]:
    return list(g.stride), list(g.padding), list(g.dilation)


def _laid_out_like(result: Tensor, like: Tensor) -> Tensor:
    if result.stride() == like.stride():
        return result
    return torch.empty_like(like, dtype=result.dtype).copy_(result)
