"""Normalizations as torch operators with their derivatives: FP32 in and out, bytes kept for backward.

Operators have no optional results: an absent output is a tensor without elements. Where nothing is traced,
`normalize_batch` and `normalize_rows` do the same without the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8repro.engines.guards import read, untraced
from fp8repro.kernels.norm import launch as norm
from fp8repro.numerics.formats import get_format


def _empty_channels_last(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _absent(x: Tensor, dtype: torch.dtype | None = torch.uint8) -> Tensor:
    return x.new_empty(0, dtype=dtype)


@torch.library.custom_op("fp8repro::batch_statistics", mutates_args=("running_mean", "running_var", "batches"))
def batch_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """`kernels.norm.batch_statistics`: mean and rstd [C] of x [B, C, H, W]; the running statistics move.

    Has no derivative: that of `batch_norm` accounts for it.
    """
    return norm.batch_statistics(x, running_mean, running_var, batches, momentum, eps)


@batch_statistics.register_fake
def _(
    x: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(running_mean), torch.empty_like(running_mean)


def _batch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    kept: str,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training-mode batch normalization + residual + ReLU + rounding of x [B, C, H, W]; see `kernels.norm`.

    Args:
        x, weight, bias, residual, mean, rstd, relu: see `kernels.norm.batch_norm`.
        kept: format that holds every value of x, whose codes are kept for backward; "" keeps x itself.
        rounding: how the result is wanted rounded too, without random bits (`guards.spell`); "" for not at all.

    Returns:
        Result (FP32, channels_last), its codes, codes of x, ReLU's flags.
    """
    how = read(rounding) if rounding else None
    store = get_format(kept) if kept else None
    result = norm.batch_norm(x, weight, bias, mean, rstd, residual=residual, relu=relu, how=how, kept=store)
    assert result.y is not None
    codes, stored, flags = (_absent(x) if t is None else t for t in (result.codes, result.kept, result.flags))
    return result.y, codes, stored, flags


batch_norm = torch.library.custom_op("fp8repro::batch_norm", mutates_args=())(_batch_forward)


@batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    kept: str,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = _empty_channels_last(x, read(rounding).format.dtype) if rounding else _absent(x)
    stored = _empty_channels_last(x, get_format(kept).dtype) if kept else _absent(x)
    channels = x.shape[1]
    flags = x.new_empty((x.numel() // channels, -(-channels // 8)), dtype=torch.uint8) if relu else _absent(x)
    return _empty_channels_last(x, torch.float32), codes, stored, flags


def _batch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, flags: Tensor, mean: Tensor, rstd: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias and (where wanted) residual; x may be what was kept of it."""
    mask = flags if flags.numel() else None
    *others, passed = norm.batch_norm_backward(grad, x, weight, mask, mean, rstd, needs_residual=residual)
    return *others, _absent(x, torch.float32) if passed is None else passed  # type: ignore[return-value]


batch_norm_backward = torch.library.custom_op("fp8repro::batch_norm_backward", mutates_args=())(_batch_backward)


@batch_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, flags: Tensor, mean: Tensor, rstd: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual = _empty_channels_last(x, torch.float32) if residual else _absent(x, torch.float32)
    grad_x = _empty_channels_last(x, torch.float32)
    return grad_x, torch.empty_like(weight), torch.empty_like(weight), grad_residual


def _keep_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, residual, mean, rstd, _, kept, _ = inputs
    _, _, stored, flags = output
    # Only the result has a derivative; without this, zeros would be made as gradients of the other outputs.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(stored if kept else x, weight, flags, mean, rstd)
    ctx.has_residual = residual is not None


def _batch_norm_gradients(ctx: Any, grad: Tensor, backward: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    x, weight, flags, mean, rstd = ctx.saved_tensors
    # Without a ReLU the residual's gradient is the result's.
    masked = ctx.has_residual and flags.numel() > 0
    grad_x, grad_weight, grad_bias, passed = backward(grad, x, weight, flags, mean, rstd, masked)
    grad_residual = (passed if masked else grad) if ctx.has_residual else None
    return grad_x, grad_weight, grad_bias, grad_residual, *[None] * 5


def _batch_norm_operators(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _batch_norm_gradients(ctx, grad, torch.ops.fp8repro.batch_norm_backward)


batch_norm.register_autograd(_batch_norm_operators, setup_context=_keep_batch_norm)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _batch_forward(*inputs)
        _keep_batch_norm(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        backward = _batch_backward if untraced(grad) else torch.ops.fp8repro.batch_norm_backward
        return _batch_norm_gradients(ctx, grad, backward)


def normalize_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    running: tuple[Tensor, Tensor, Tensor],
    momentum: float,
    eps: float,
    *how: Any,
) -> tuple[Tensor, ...]:
    """`batch_statistics`, then `batch_norm` with the last three of its arguments; as operators only under a tracer."""
    plain = untraced(x, weight, bias, residual, *running)
    # A copy is made once, and not for each pass.
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        if plain:
            statistics = norm.batch_statistics(x, *running, momentum, eps)
            # As the operator does: whoever kept them for a backward pass is told that they changed.
            torch.autograd.graph.increment_version(running)
        else:
            statistics = batch_statistics(x, *running, momentum, eps)
    normalize = _BatchNorm.apply if plain else batch_norm
    output: tuple[Tensor, ...] = normalize(x, weight, bias, residual, *statistics, *how)
    return output


def _rows_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer normalization of x [..., D] and its rounding; arguments as those of `batch_norm`.

    Returns:
        Result (FP32), its codes, mean and rstd of each row.
    """
    how = read(rounding) if rounding else None
    y, mean, rstd, codes = norm.layer_norm(x, weight, bias, eps=eps, how=how)
    return y, _absent(x) if codes is None else codes, mean, rstd


layer_norm = torch.library.custom_op("fp8repro::layer_norm", mutates_args=())(_rows_forward)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=read(rounding).format.dtype) if rounding else _absent(x)
    mean, rstd = (x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=torch.float32), codes, mean, rstd


@torch.library.custom_op("fp8repro::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias."""
    grad_x, *others = norm.layer_norm_backward(grad, x, weight, mean, rstd)
    # An operator's results may not share memory; these are two rows of one tensor.
    grad_weight, grad_bias = (g.clone() for g in others)
    return grad_x, grad_weight, grad_bias


@layer_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), torch.empty_like(weight), torch.empty_like(weight)


def _keep_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *output[2:])


def _layer_norm_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.fp8repro.layer_norm_backward(grad, *ctx.saved_tensors)
    return (*gradients, None, None)


layer_norm.register_autograd(_layer_norm_gradients, setup_context=_keep_layer_norm)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _rows_forward(*inputs)
        _keep_layer_norm(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if not untraced(grad):
            return _layer_norm_gradients(ctx, grad)
        return *norm.layer_norm_backward(grad, *ctx.saved_tensors), None, None


def normalize_rows(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """`layer_norm`, as an operator only under a tracer."""
    output: tuple[Tensor, ...] = (_LayerNorm.apply if untraced(x, *arguments[:2]) else layer_norm)(x, *arguments)
    return output
