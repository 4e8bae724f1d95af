"""Running statistics of batch normalization: restored after non-finite passes, synchronized over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8repro.training.distributed import World


class NormalizationStatistics:
    """The running statistics of a model and a copy of them.

    Attributes:
        tensors: running means and variances, FP32.
    """

    def __init__(self, model: nn.Module) -> None:
        """Finds every batch normalization."""
        modules = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._all = [buffer for module in modules for buffer in module.buffers()]
        self.tensors = [buffer for buffer in self._all if buffer.is_floating_point()]
        self._kept = [buffer.clone() for buffer in self._all]

    def keep(self) -> None:
        """Remember the statistics as they are."""
        if self._all:
            torch._foreach_copy_(self._kept, self._all)

    def restore(self) -> None:
        """Put the remembered statistics back."""
        if self._all:
            torch._foreach_copy_(self._all, self._kept)

    def finite(self) -> bool:
        """True when no statistic is NaN or infinite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors)


def synchronize_normalization(model: nn.Module, world: World) -> None:
    """Make every batch normalization take its statistics over the batches of all ranks, in place."""
    if world.size == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm2d


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all ranks, whatever the size of each rank's batch. Torch's own works on GPUs alone."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        if not self.training:
            return super().forward(input)
        mean, inverse, count = self._statistics(input)
        result: Tensor = _Normalize.apply(input, self.weight, self.bias, mean, inverse, count)
        return result

    @torch.no_grad()
    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, inverse deviation and number of values of each channel over all ranks, FP32; the running ones move.

        What their derivatives need is in `_Normalize`: autograd would keep FP64 copies of the input for them.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        sums = torch.stack([input.double().sum((0, 2, 3)), torch.full_like(self.running_mean, input.numel()).double()])
        sums[1] /= self.num_features
        dist.all_reduce(sums)
        count = sums[1, :1]
        mean = sums[0] / count
        squares = (input - mean.float().view(1, -1, 1, 1)).double().square().sum((0, 2, 3))
        dist.all_reduce(squares)
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.float(), self.momentum)
        self.running_var.lerp_((squares / (count - 1)).float(), self.momentum)
        inverse = (squares / count + self.eps).rsqrt()
        return mean.float(), inverse.float(), count.float()


class _Normalize(torch.autograd.Function):
    """Normalization by given statistics; its gradient accounts for their dependence on all ranks' inputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, count: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse, count)
        scale = weight * inverse
        return torch.addcmul((bias - mean * scale).view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        normalized = (x - mean.view(1, -1, 1, 1)) * inverse.view(1, -1, 1, 1)
        grad_bias = grad.sum((0, 2, 3))
        grad_weight = (grad * normalized).sum((0, 2, 3))
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        means = (sums / count).view(2, 1, -1, 1, 1)
        grad_x = (grad - means[0] - normalized * means[1]) * (weight * inverse).view(1, -1, 1, 1)
        # Parameters' gradients are this rank's share; they are summed over the ranks with all others.
        return grad_x, grad_weight, grad_bias, None, None, None
