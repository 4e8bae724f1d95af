"""Max pooling by Triton kernels, which keep a byte an output for backward, where torch keeps input and int64 indices.

Values and gradients are torch's. Must never round a value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8repro.numerics.rounding import Rounding
from fp8repro.precision.become import become
from fp8repro.precision.context import StepContext
from fp8repro.precision.offers import offered


class ByteMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` by one Triton kernel each way for channels_last images, as torch does it for everything else.

    Attributes:
        consumers: how the layers behind round what they get.
        context: where the result's codes are offered.
    """

    consumers: Rounding
    context: StepContext

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, P, Q]."""
        images = input.dim() == 4 and input.dtype == torch.float32
        if not (images and self.training and torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        if not input.is_contiguous(memory_format=torch.channels_last):
            return super().forward(input)
        from fp8repro.kernels.pool.max_pool import pool_largest

        rounding = offered(self.consumers)
        window = (_pair(self.kernel_size), _pair(self.stride), _pair(self.padding))
        y, _, codes = pool_largest(input, *window, rounding)
        if rounding:
            self.context.offers.make(y, self.consumers, codes.detach())
        return y


def pool_by_kernels(module: nn.Module, consumers: Rounding, context: StepContext) -> bool:
    """Let Triton kernels do a module's pooling, in place; False, with nothing changed, where they cannot."""
    if type(module) is not nn.MaxPool2d or module.ceil_mode or module.return_indices:
        return False
    from fp8repro.kernels.pool.launch import TAPS

    height, width = _pair(module.kernel_size)
    if _pair(module.dilation) != [1, 1] or height * width > TAPS:
        return False
    become(module, ByteMaxPool2d, consumers=consumers, context=context)
    return True


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
