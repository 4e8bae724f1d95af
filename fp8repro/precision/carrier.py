"""8-bit tensors between the layers of a ResNet's blocks, in training steps on a GPU.

Today's tensors between layers are FP32 and hold values of the recipe's formats. Inside of blocks nobody sees them, so
here they are the codes themselves, forward and backward: a convolution's kernel rounds its result, a normalization's
rounds what the next convolution takes, and in its backward pass the error of the convolution before it. Every rounding
of the recipe stays, with its random stream; none is a pass of its own, and the bytes are those of FP32 tensors. The sum
of a block stays FP32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8repro.engines.guards import plain
from fp8repro.numerics.rounding import RandomBits, Rounding
from fp8repro.precision.bypass import has_hooks
from fp8repro.precision.convolutions import FP8Conv2d
from fp8repro.precision.functional import product_of_codes
from fp8repro.precision.fused_normalization import FusedBatchNorm2d, check_size

if TYPE_CHECKING:
    from fp8repro.models.fused_resnet import ResidualBlock


def carry_codes(model: nn.Module) -> None:
    """Let the stages of a model's ResNets hand codes on, in place; after `fuse_normalizations` and `use_kernels`."""
    # Nobody has one of its networks who has not imported it.
    if "torchvision" not in sys.modules:
        return
    from fp8repro.models.fused_resnet import FusedResNet

    for module in model.modules():
        if type(module) is FusedResNet:
            module.run_stages = carried


def carried(stages: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """The result of a training step's stages, one after the other, with codes between their layers.

    Args:
        stages: residual blocks in sequence, of a converted model.
        x: FP32 [B, C, H, W].

    Returns:
        FP32 [B, C', H', W'], as the stages themselves give it, and gradients that are equal to the byte; None where
        tensors between layers have to be FP32: outside of training and on other backends than Triton's, in a step that
        telemetry measures or somebody traces, where a module has hooks, and in recipes whose activations and errors
        are not rounded to one 8-bit format, the activations without random bits.
    """
    from fp8repro.models.fused_resnet import residual_blocks

    if not (torch.is_grad_enabled() and plain(x)) or has_hooks(stages):
        return None
    blocks = residual_blocks(stages)
    if not blocks or not _all_take_codes(blocks):
        return None
    first = blocks[0].convolutions[0]
    assert isinstance(first, FP8Conv2d)
    x = x.contiguous(memory_format=torch.channels_last)
    stream, codes = _Enter.apply(x, first, blocks[0].downsample is not None)
    for i, block in enumerate(blocks):
        after = blocks[i + 1] if i + 1 < len(blocks) else None
        stream, codes = _block(block, stream, codes, after)
    return stream


def _block(block: ResidualBlock, stream: Tensor, codes: Tensor, after: ResidualBlock | None) -> tuple[Tensor, Tensor]:
    """A block of what `_Enter` gives: the stream and its codes or, for two convolutions, the codes twice.

    Returns:
        The same for the block after it; for none the FP32 result, twice.
    """
    identity = stream
    if block.downsample is not None:
        convolution, norm = block.downsample
        identity = _normalized(*_convolved(convolution, stream), norm, relu=False, gives=("fp32",))[0]
    for convolution, norm in zip(block.convolutions[:-1], block.norms[:-1], strict=True):
        (codes,) = _normalized(*_convolved(convolution, codes), norm, gives=("codes",))
    gives = ("fp32",) if after is None else ("fp32", "codes") if after.downsample is None else ("codes", "codes")
    last = _convolved(block.convolutions[-1], codes)
    given = _normalized(*last, block.norms[-1], residual=identity, gives=gives)
    return given[0], given[-1]


def _convolved(convolution: nn.Module, codes: Tensor) -> tuple[Tensor, FP8Conv2d, int]:
    """Codes of a convolution's result, the convolution, and which of its calls that was."""
    assert isinstance(convolution, FP8Conv2d)
    result, call = product_of_codes(codes, convolution.weight, convolution.site, convolution.op)
    return result, convolution, call


def _normalized(
    codes: Tensor,
    convolution: FP8Conv2d,
    call: int,
    norm: nn.Module,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    gives: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """Normalization of what `_convolved` gave; `gives`: "fp32" or "codes", once for each of those who take it."""
    assert isinstance(norm, FusedBatchNorm2d)
    check_size(norm, codes)
    error = convolution.site.rounding("error", "output_error", call)
    given: tuple[Tensor, ...] = _Normalize.apply(codes, norm.weight, norm.bias, residual, norm, relu, gives, error)
    return given


class _Enter(torch.autograd.Function):
    """FP32 [B, C, H, W] -> the same and its codes, or the codes twice; in backward their gradients' sum in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: FP8Conv2d, twice: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # To nearest, so that every layer that takes it would make these very codes.
        codes = convolution.site.operand(x, "activation", "input", 0).codes
        return codes.detach() if twice else x.view_as(x), codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        from fp8repro.kernels.norm.launch import add

        terms = [g for g in gradients if g is not None]
        total = add(*terms) if len(terms) == 2 else terms[0].float() if terms else None
        return total, None, None


class _Normalize(torch.autograd.Function):
    """Batch normalization + residual + ReLU of codes; its backward pass gives the error as codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        norm: FusedBatchNorm2d,
        relu: bool,
        gives: tuple[str, ...],
        error: tuple[Rounding, RandomBits],
    ) -> tuple[Tensor, ...]:
        from fp8repro.kernels.norm import launch

        ctx.set_materialize_grads(False)
        running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        mean, rstd = launch.batch_statistics(x, *running, norm.momentum or 0.0, norm.eps)  # type: ignore[arg-type]
        torch.autograd.graph.increment_version(running)  # type: ignore[arg-type]
        how = norm.consumers if "codes" in gives else None
        wants_fp32 = "fp32" in gives
        result = launch.batch_norm(
            x, weight, bias, mean, rstd, residual=residual, relu=relu, how=how, codes_only=not wants_fp32
        )
        ctx.save_for_backward(x, weight, result.flags, mean, rstd)
        ctx.has_residual, ctx.error = residual is not None, error
        found = {"fp32": result.y, "codes": result.codes}
        # An autograd function's results are objects of their own.
        return tuple(t if i == 0 else t.detach() for i, t in enumerate(found[name] for name in gives))  # type: ignore[union-attr,misc]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from fp8repro.kernels.norm.launch import batch_norm_backward

        terms = [g for g in gradients if g is not None]
        if not terms:
            return (None,) * 8
        x, weight, flags, mean, rstd = ctx.saved_tensors
        how, bits = ctx.error
        *found, passed = batch_norm_backward(
            terms[0],
            x,
            weight,
            flags,
            mean,
            rstd,
            more=terms[1] if len(terms) == 2 else None,
            needs_residual=ctx.has_residual,
            how=how,
            bits=bits,
        )
        return *found, passed, *[None] * 4


def _all_take_codes(blocks: Sequence[ResidualBlock]) -> bool:
    roundings = set()
    for convolution, norm in _pairs(blocks):
        if type(norm) is not FusedBatchNorm2d or not norm.training or norm.consumers is None:
            return False
        if type(convolution) is not FP8Conv2d or not _takes_codes(convolution):
            return False
        # What a normalization rounds is what the convolutions behind it take.
        roundings |= {norm.consumers, convolution.site.roles["activation"]}
    return len(roundings) == 1


def _pairs(blocks: Sequence[ResidualBlock]) -> Iterator[tuple[nn.Module, nn.Module]]:
    for block in blocks:
        yield from zip(block.convolutions, block.norms, strict=True)
        if block.downsample is not None:
            yield block.downsample


def _takes_codes(convolution: FP8Conv2d) -> bool:
    site, activation = convolution.site, convolution.site.roles["activation"]
    return (
        convolution.training
        and convolution.bias is None
        and convolution.groups == 1
        and not convolution.pads_apart()
        and site.backend.name == "triton"
        and not site.context.telemetry.active
        and site.round_outputs
        and site.gives_codes("activation")
        and not activation.is_stochastic
        and activation.format.dtype is not None
        and site.takes_codes(activation.format.dtype)
    )
