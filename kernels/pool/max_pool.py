"""Max pooling as a torch operator with its derivative; as plain functions where nothing is traced.

Operators have no optional results: absent codes are a tensor without elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8repro.engines.guards import read, untraced
from fp8repro.kernels.pool import launch as pool
from fp8repro.kernels.pool.launch import Window


def _window(kernel: list[int], stride: list[int], padding: list[int]) -> Window:
    return Window(*(tuple(pair) for pair in (kernel, stride, padding)))  # type: ignore[arg-type]


def _forward(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.pool.max_pool` of x [B, C, H, W].

    Args:
        x: see `max_pool`.
        kernel, stride, padding: of rows and of columns.
        rounding: how the result is wanted rounded too, without random bits (`guards.spell`); "" for not at all.

    Returns:
        Result (FP32, channels_last), numbers of the taps that won, and codes of the result.
    """
    y, taps, codes = pool.max_pool(x, _window(kernel, stride, padding), read(rounding) if rounding else None)
    return y, taps, x.new_empty(0, dtype=torch.uint8) if codes is None else codes


max_pool = torch.library.custom_op("fp8repro::max_pool", mutates_args=())(_forward)


@max_pool.register_fake
def _(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:2], *_window(kernel, stride, padding).output_size(*x.shape[2:]))
    y = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    codes = torch.empty_like(y, dtype=read(rounding).format.dtype) if rounding else x.new_empty(0, dtype=torch.uint8)
    return y, torch.empty_like(y, dtype=torch.uint8), codes


def _backward(
    grad: Tensor, taps: Tensor, input_size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """Gradient of the input, of the size that is given."""
    return pool.max_pool_backward(grad, taps, input_size, _window(kernel, stride, padding))


max_pool_backward = torch.library.custom_op("fp8repro::max_pool_backward", mutates_args=())(_backward)


@max_pool_backward.register_fake
def _(
    grad: Tensor, taps: Tensor, input_size: list[int], kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return torch.empty(input_size, dtype=torch.float32, device=grad.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *window, _ = inputs
    # Only the result has a derivative; without this, zeros would be made as gradients of the other outputs.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.geometry = (list(x.shape), *window)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return torch.ops.fp8repro.max_pool_backward(grad, *ctx.saved_tensors, *ctx.geometry), *[None] * 4


max_pool.register_autograd(_gradients, setup_context=_keep)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if not untraced(grad):
            return _gradients(ctx, grad)
        return _backward(grad, *ctx.saved_tensors, *ctx.geometry), *[None] * 4


def pool_largest(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], rounding: str
) -> tuple[Tensor, ...]:
    """`max_pool`, as an operator only under a tracer."""
    output: tuple[Tensor, ...] = (_MaxPool.apply if untraced(x) else max_pool)(x, kernel, stride, padding, rounding)
    return output
