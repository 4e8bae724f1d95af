"""Batch normalization with residual and ReLU in one autograd node that keeps bytes for backward, not FP32 tensors.

A convolution's rounded output is exact in its 8-bit (or 16-bit) format, so nothing is rounded here that was not before:
normalization itself stays in FP32 (paper, section 3).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from fp8repro.engines.cpu import native
from fp8repro.engines.products import decode
from fp8repro.engines.quantizer import round_into
from fp8repro.errors import UserError
from fp8repro.numerics.formats import BF16, FP32, FloatFormat
from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.become import become
from fp8repro.precision.context import StepContext
from fp8repro.precision.offers import offered
from fp8repro.precision.pooling import pool_by_kernels
from fp8repro.precision.site import Site

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def storage_format(site: Site) -> FloatFormat:
    """The smallest format that holds a layer's rounded outputs exactly; FP32 where they are not rounded."""
    spec = site.roles["activation"]
    if spec.is_identity or not site.round_outputs or spec.format.dtype is None:
        return FP32
    # A scaled format's values are a power of two away from its codes; BF16 has the exponents for any of them.
    return BF16 if spec.scaling == "tensor" else spec.format


def pack_bits(mask: Tensor) -> Tensor:
    """Bool tensor (dense, of any layout) to bytes of 8 flags each, in memory order; padded with zeros."""
    flat = mask.as_strided((mask.numel(),), (1,)).view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded * _BITS.to(mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """The bool tensor that `pack_bits` packed, in the shape and layout of `like`."""
    flags = packed[:, None].bitwise_and(_BITS.to(packed.device)).ne(0).view(-1)
    return torch.empty_like(like, dtype=torch.bool).set_(flags.untyped_storage(), 0, like.shape, like.stride())


class _NormalizeAddRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, norm: FusedBatchNorm2d, relu: bool
    ) -> Tensor:
        result, mean, inverse_deviation = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum or 0.0, norm.eps
        )
        mask = None
        if relu and native.walks(result, *([] if residual is None else [residual])):
            mask = native.add_relu(result, residual)
        else:
            if residual is not None:
                result += residual
            if relu:
                mask = pack_bits(result > 0)
                result.relu_()
        stored = x
        if norm.input_format.name != "fp32":
            stored = torch.empty_like(x, dtype=norm.input_format.dtype)
            round_into(x, Rounding(norm.input_format), codes=stored)
        ctx.save_for_backward(stored, mask, weight, mean, inverse_deviation)
        ctx.eps, ctx.has_residual = norm.eps, residual is not None
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored, mask, weight, mean, inverse_deviation = ctx.saved_tensors
        if mask is not None:
            if grad.stride() == stored.stride() and native.walks(grad):
                grad = native.keep_where(grad, mask)
            else:
                zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
                grad = torch.where(unpack_bits(mask, stored), grad, zero, out=torch.empty_like(grad))
            if grad.is_contiguous():
                # One pixel an image is contiguous either way. Torch's own ReLU then calls it contiguous, and the
                # strides decide the order of the sums that follow.
                grad = grad.as_strided(grad.shape, torch.empty(grad.shape, device="meta").stride())
        x = stored if stored.dtype == torch.float32 else decode(stored)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse_deviation, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return grad_x, grad_weight, grad_bias, grad if ctx.has_residual else None, None, None


class FusedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that takes residual and ReLU along, after a convolution whose outputs lie in a format's set.

    Attributes:
        input_format: that format; what the input is kept in for backward.
        context: where the result's codes are offered.
        consumers: set where Triton kernels normalize: how the layers behind round what they get.
    """

    input_format: FloatFormat
    context: StepContext
    consumers: Rounding | None = None

    # A compiler finds no graph in an engine.
    @_disable_dynamo
    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """[B, C, H, W] FP32 -> the same shape: normalize, add `residual`, clamp at zero."""
        if not (self.training and torch.is_grad_enabled()):
            result = super().forward(input)
            result = result if residual is None else result + residual
            return torch.relu(result) if relu else result
        check_size(self, input)
        if self.consumers is not None:
            return self._by_kernels(input, residual, relu, self.consumers)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        fused: Tensor = _NormalizeAddRelu.apply(input, self.weight, self.bias, residual, self, relu)
        return fused

    def _by_kernels(self, input: Tensor, residual: Tensor | None, relu: bool, consumers: Rounding) -> Tensor:
        from fp8repro.kernels.norm.operators import normalize_batch

        # A result before its ReLU goes into a sum, not into a layer.
        rounding = offered(consumers) if relu else ""
        kept = "" if self.input_format is FP32 else self.input_format.name
        running = (self.running_mean, self.running_var, self.num_batches_tracked)
        y, codes, *_ = normalize_batch(
            input,
            self.weight,
            self.bias,
            residual,
            running,  # type: ignore[arg-type]
            self.momentum or 0.0,
            self.eps,
            relu,
            kept,
            rounding,
        )
        if rounding:
            self.context.offers.make(y, consumers, codes.detach())
        return y


def check_size(norm: nn.BatchNorm2d, input: Tensor) -> None:
    """Refuse one value a channel, as torch's own layer does: its unbiased variance is 0 / 0.

    Raises:
        UserError: the input has no more.
    """
    if input.numel() == norm.num_features:
        raise UserError(f"batch normalization: got size {tuple(input.shape)}, expected more than one value a channel")


class FusedLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` by one Triton kernel each way, which also rounds the result for the layers behind.

    Attributes:
        consumers: how those layers round what they get.
        context: where the result's codes are offered.
    """

    consumers: Rounding
    context: StepContext

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] FP32 -> the same shape."""
        from fp8repro.kernels.norm.operators import normalize_rows

        rounding = offered(self.consumers)
        y, codes, _, _ = normalize_rows(input, self.weight, self.bias, self.eps, rounding)
        if rounding:
            self.context.offers.make(y, self.consumers, codes.detach())
        return y


def fuse_normalizations(model: nn.Module, context: StepContext) -> list[str]:
    """Fuse the normalizations of torchvision's ResNets, in place; gives the names of those that were.

    Blocks with other normalizations, or convolutions that no recipe converted, stay as they are.
    """
    # Nobody has one of its networks who has not imported it.
    if "torchvision" not in sys.modules:
        return []
    from fp8repro.models.fused_resnet import FUSED, normalizations

    fused = []
    for name, module in model.named_modules():
        if type(module) not in FUSED:
            continue
        pairs = [(key, module.get_submodule(key), module.get_submodule(conv)) for key, conv in normalizations(module)]
        if not all(_fusible(norm) and hasattr(conv, "site") for _, norm, conv in pairs):
            continue
        for key, norm, conv in pairs:
            become(norm, FusedBatchNorm2d, input_format=storage_format(conv.site), context=context)
            fused.append(f"{name}.{key}" if name else key)
        become(module, FUSED[type(module)])
    return fused


def _fusible(norm: nn.Module) -> bool:
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None


def use_kernels(model: nn.Module, consumers: Rounding, context: StepContext) -> None:
    """Let Triton kernels do the fused batch normalizations, the layer normalizations and max pooling, in place.

    Args:
        model: after `fuse_normalizations`.
        consumers: the recipe's activation role.
        context: the model's.
    """
    for module in model.modules():
        plain = type(module) is nn.LayerNorm and module.weight is not None and module.bias is not None
        if plain and len(module.normalized_shape) == 1:  # type: ignore[arg-type]
            become(module, FusedLayerNorm, consumers=consumers, context=context)
        elif isinstance(module, FusedBatchNorm2d):
            module.consumers = consumers
        else:
            pool_by_kernels(module, consumers, context)
