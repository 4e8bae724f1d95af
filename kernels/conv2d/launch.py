"""Two-dimensional convolution products of FP8 (or 16-bit) operands: forward, error (dgrad), weight gradient (wgrad).

Checks arguments, plans, launches. Works on channels_last memory; other layouts are copied first, as bytes. Must never
round an operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from fp8repro.engines.products import Conv2dGeometry
from fp8repro.kernels.conv2d.device import Axis, Positions, implicit_gemm, sum_splits, wgrad
from fp8repro.kernels.conv2d.device_tma import FARTHEST, implicit_gemm_tma, wgrad_tma
from fp8repro.kernels.matmul.launch import (
    Epilogue,
    accumulation_of,
    check_bias,
    check_operands,
    matmul,
    promoted_by_steps,
)
from fp8repro.kernels.quantize.launch import PER_CALL, raw_codes
from fp8repro.kernels.shared import configs
from fp8repro.kernels.shared.launch import block_size, cdiv, launch
from fp8repro.kernels.shared.tma import box, describe, fits, pixel_view
from fp8repro.numerics.rounding import Rounding

SUMMED = 1024  # elements of a weight gradient that a program adds up
CHANNELS = 128  # at most so many of a pixel's channels in one step of a tile


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    geometry: Conv2dGeometry = Conv2dGeometry(),  # noqa: B008 - frozen
    *,
    inverse_scale: float = 1.0,
    accumulate: str = "promoted",
    epilogue: Epilogue | None = None,
    target: configs.Target | None = None,
) -> Tensor:
    """Forward product.

    Args:
        x: [B, C, H, W], FP8, FP16 or BF16.
        weight: [O, C, R, S].
        bias: FP32 [O].
        geometry: stride, padding, dilation; one group.
        inverse_scale, accumulate, epilogue, target: see `matmul`.

    Returns:
        [B, O, P, Q], channels_last, FP32 unless the epilogue makes codes.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    epilogue, target = epilogue or Epilogue(), target or configs.target_of(x.device)
    check_operands(x, weight, "x", "weight")
    _check_geometry(x, weight, geometry)
    check_bias(bias, weight.shape[0], x.device)
    if _pointwise(weight, geometry):
        return _pixel_product(x, weight.flatten(1).t(), bias, inverse_scale, accumulate, epilogue, target)
    axes = _forward_axes(geometry, x.shape, weight.shape)
    shape = output_size(x.shape, weight.shape, geometry)
    return _gather(x, weight, bias, shape, (axes,), inverse_scale, accumulate, epilogue, target)


def conv2d_error(
    error: Tensor,
    weight: Tensor,
    input_shape: tuple[int, ...],
    geometry: Conv2dGeometry = Conv2dGeometry(),  # noqa: B008 - frozen
    *,
    inverse_scale: float = 1.0,
    accumulate: str = "promoted",
    epilogue: Epilogue | None = None,
    target: configs.Target | None = None,
) -> Tensor:
    """Error product: error [B, O, P, Q], weight [O, C, R, S] -> [B, C, H, W], as `conv2d` gives it.

    A strided convolution takes a launch for each remainder of the input position by the stride, so that no tap is
    multiplied by zero.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    epilogue, target = epilogue or Epilogue(), target or configs.target_of(error.device)
    check_operands(error, weight, "error", "weight")
    shape = torch.Size(input_shape)
    _check_geometry(torch.empty(shape, device="meta"), weight, geometry)
    _check_shape("error", error, output_size(shape, weight.shape, geometry))
    if _pointwise(weight, geometry):
        return _pixel_product(error, weight.flatten(1), None, inverse_scale, accumulate, epilogue, target)
    # Sums run over output channels, which `_gather` makes contiguous by a copy of the weight's bytes.
    transposed = weight.transpose(0, 1)
    rows, columns = (_error_axes(geometry, axis, input_shape[2 + axis], weight.shape[2 + axis]) for axis in (0, 1))
    phases = tuple((row, column) for row in rows for column in columns)
    return _gather(error, transposed, None, tuple(input_shape), phases, inverse_scale, accumulate, epilogue, target)


def conv2d_gradient(
    error: Tensor,
    x: Tensor,
    weight_shape: tuple[int, ...],
    geometry: Conv2dGeometry = Conv2dGeometry(),  # noqa: B008 - frozen
    *,
    inverse_scale: float = 1.0,
    accumulate: str = "promoted",
    epilogue: Epilogue | None = None,
    splits: int | None = None,
    target: configs.Target | None = None,
) -> Tensor:
    """Weight-gradient product: error [B, O, P, Q], x [B, C, H, W] -> FP32 [O, C, R, S], channels_last; deterministic.

    Sums over the batch come in parts; the pass that adds them rounds them too.

    FP8 instructions want the summed pixels contiguous, which no layout of images gives: where TMA loads them, the
    operands become FP16 (exact) in front of FP16 instructions, all of whose sums are FP32.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    check_operands(error, x, "error", "x")
    shape = torch.Size(weight_shape)
    _check_geometry(x, torch.empty(shape, device="meta"), geometry)
    expected = output_size(x.shape, shape, geometry)
    _check_shape("error", error, expected)
    outputs, channels, height, width = weight_shape
    pixels = expected[0] * expected[2] * expected[3]
    columns = height * width * channels
    if outputs * columns == 0 or pixels == 0 or x.numel() == 0:
        return torch.zeros(weight_shape, device=x.device).to(memory_format=torch.channels_last)
    target = target or configs.target_of(x.device)
    axes = _forward_axes(geometry, x.shape, shape)
    errors, source = _channels_last(error), _channels_last(x)
    viewed = _tma_view(source, (axes,)) if target.tma and fits(errors) else None
    if viewed is not None:
        return _summed(_wgrad_tma(errors, viewed, weight_shape, axes, inverse_scale, splits, target), epilogue)
    tile, chosen, programs = configs.choose(target, outputs, columns, pixels, 1, splittable=True, halves=False)
    splits = chosen if splits is None else splits
    step = configs.summed_step(target, tile, x.element_size())
    chunk = cdiv(cdiv(pixels, splits), step) * step
    partial = torch.empty((splits, outputs, height, width, channels), dtype=torch.float32, device=x.device)
    launch(
        wgrad,
        (min(programs, splits * cdiv(outputs, tile.m) * cdiv(columns, tile.n)),),
        x.device,
        errors,
        source,
        partial,
        pixels,
        chunk,
        *x.shape[2:],
        channels,
        outputs,
        Positions.of(*axes),
        inverse_scale,
        ACCUMULATE=accumulation_of(x, accumulate),
        SPLITS=splits,
        BM=tile.m,
        BN=tile.n,
        BK=step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return _summed(partial, epilogue)


def output_size(x: torch.Size, weight: torch.Size, geometry: Conv2dGeometry) -> tuple[int, int, int, int]:
    """Shape [B, O, P, Q] of a convolution's output."""
    sizes = [
        (x[2 + a] + 2 * geometry.padding[a] - geometry.dilation[a] * (weight[2 + a] - 1) - 1) // geometry.stride[a] + 1
        for a in (0, 1)
    ]
    return x[0], weight[0], sizes[0], sizes[1]


def _forward_axes(g: Conv2dGeometry, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[Axis, Axis]:
    """Rows and columns of the forward product of an input and a weight of those shapes."""
    grids = output_size(torch.Size(x), torch.Size(weight), g)[2:]
    rows, columns = (
        Axis(grids[a], grids[a], 0, 1, g.stride[a], -g.padding[a], weight[2 + a], g.dilation[a], tap=0, tap_step=1)
        for a in (0, 1)
    )
    return rows, columns


def _error_axes(g: Conv2dGeometry, axis: int, size: int, kernel: int) -> list[Axis]:
    stride, padding, dilation = g.stride[axis], g.padding[axis], g.dilation[axis]
    axes: list[Axis] = []
    for phase in range(min(stride, size)):
        # Input position phase + i * stride met tap r at output i + (phase + padding - r * dilation) / stride.
        taps = [r for r in range(kernel) if (phase + padding - r * dilation) % stride == 0]
        tap_step = stride // gcd(stride, dilation)
        tap = taps[0] if taps else 0
        first = (phase + padding - tap * dilation) // stride
        grid = (size - phase + stride - 1) // stride
        axes.append(Axis(grid, size, phase, stride, 1, first, len(taps), -tap_step * dilation // stride, tap, tap_step))
    return axes


@dataclass(frozen=True)
class PhasePlan:
    """How one launch of a convolution goes: of all pixels, or those of one remainder of a strided error's positions.

    Attributes:
        positions: which pixels and taps meet.
        tile: the kernel's configuration.
        step: what one step sums: with boxes so many channels of a tap, else elements of taps and channels.
        programs: size of the grid.
        box: images, rows and columns of a tile's pixels, where TMA loads them.
    """

    positions: Positions
    tile: configs.Tile
    step: int
    programs: int
    box: tuple[int, int, int] | None


@lru_cache(maxsize=1024)
def plan_phases(
    target: configs.Target,
    phases: tuple[tuple[Axis, Axis], ...],
    batch: int,
    channels: int,
    outputs: int,
    element_size: int,
    tma: bool,
    how: Rounding,
    codes: bool = False,
) -> tuple[tuple[PhasePlan, ...], bool]:
    """Plan a launch for each phase; together they fill the result.

    Args:
        target: the GPU.
        phases: rows and columns of each.
        batch, channels, outputs: sizes of the source and the result.
        element_size: bytes of an operand's element.
        tma: the operands can be loaded by TMA.
        how, codes: how the result is rounded (see `Epilogue`).

    Returns:
        The plans, and whether the result is rounded in a pass of its own.
    """
    plans = []
    for rows, columns in phases:
        pixels = batch * rows.grid * columns.grid
        tile, _, resident = configs.choose(
            target,
            pixels,
            outputs,
            rows.taps * columns.taps * channels,
            1,
            splittable=False,
            halves=False,
            tma=configs.TMA_CONVOLUTION_TILES if tma else None,
        )
        sides, blocks = None, cdiv(pixels, tile.m)
        step = configs.summed_step(target, tile, element_size)
        if tma:
            # A power of two, at least what an instruction sums.
            step = max(32, min(tile.k // element_size, triton.next_power_of_2(channels)))
            sides = box(batch, rows.grid, columns.grid, tile.m)
            blocks = cdiv(batch, sides[0]) * cdiv(rows.grid, sides[1]) * cdiv(columns.grid, sides[2])
        programs = min(resident, blocks * cdiv(outputs, tile.n))
        plans.append(PhasePlan(Positions.of(rows, columns), tile, step, programs, sides))
    room = all(configs.takes_epilogue(target, plan.tile, 1, how.is_stochastic, codes) for plan in plans)
    return tuple(plans), not (how.is_identity or room)


def _gather(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    phases: tuple[tuple[Axis, Axis], ...],
    inverse_scale: float,
    accumulate: str,
    epilogue: Epilogue,
    target: configs.Target,
) -> Tensor:
    """The result of that shape of all phases."""
    batch, outputs, *pixels = shape
    if batch * outputs * pixels[0] * pixels[1] == 0:
        return torch.empty((batch, *pixels, outputs), dtype=epilogue.dtype, device=x.device).permute(0, 3, 1, 2)
    source, rows_of_weight = _channels_last(x), _channels_last(weight)
    taps_of_weight = rows_of_weight.flatten(1, 2)
    viewed = _tma_view(source, phases) if target.tma and fits(taps_of_weight) else None
    channels, height, width = weight.shape[1:]
    sizes = (batch, channels, outputs, x.element_size())
    plans, apart = plan_phases(target, phases, *sizes, viewed is not None, epilogue.how, epilogue.codes)
    stored = Epilogue() if apart else epilogue
    result = torch.empty((batch, *pixels, outputs), dtype=stored.dtype, device=x.device)
    accumulation = accumulation_of(x, accumulate)
    for plan in plans:
        tile = plan.tile
        shared = (bias, raw_codes(result) if stored.codes else result, inverse_scale, batch)
        options: dict[str, Any] = {"WHOLE_GROUPS": outputs % PER_CALL == 0, "BN": tile.n, "BK": plan.step}
        options |= {"ENCODING": stored.encoding(x.device), "num_warps": tile.warps, "num_stages": tile.stages}
        if viewed is not None and plan.box is not None:
            images, rows, columns = plan.box
            launch(
                implicit_gemm_tma,
                (plan.programs,),
                x.device,
                describe(viewed, (images, rows, 1, columns, plan.step)),
                describe(taps_of_weight, (tile.n, 1, plan.step)),
                *shared,
                channels,
                outputs,
                *plan.positions,
                width,
                *stored.words(),
                **options,
                ACCUMULATE=promoted_by_steps(accumulation),
                STEP=plan.positions.step_h,
                IMAGES=images,
                ROWS=rows,
                COLUMNS=columns,
            )
            continue
        launch(
            implicit_gemm,
            (plan.programs,),
            x.device,
            source,
            rows_of_weight,
            *shared,
            *x.shape[2:],
            channels,
            outputs,
            plan.positions,
            width,
            height * width * channels,
            *stored.words(),
            **options,
            ACCUMULATE=accumulation,
            BM=tile.m,
            GROUP=configs.GROUP,
        )
    return (epilogue.round(result) if apart else result).permute(0, 3, 1, 2)


def _pointwise(weight: Tensor, g: Conv2dGeometry) -> bool:
    """True when a convolution is a matrix product of pixels, whose rows count as the image's channels do."""
    return weight.shape[2:] == (1, 1) and g.stride == (1, 1) and g.padding == (0, 0)


def _pixel_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inverse_scale: float,
    accumulate: str,
    epilogue: Epilogue,
    target: configs.Target,
) -> Tensor:
    """x [B, C, H, W] times weight [C, O], pixel by pixel."""
    y = matmul(
        _channels_last(x).flatten(0, 2),
        weight,
        bias,
        inverse_scale=inverse_scale,
        accumulate=accumulate,
        epilogue=epilogue,
        target=target,
    )
    return y.view(x.shape[0], *x.shape[2:], y.shape[1]).permute(0, 3, 1, 2)


def _tma_view(source: Tensor, phases: tuple[tuple[Axis, Axis], ...]) -> Tensor | None:
    """The source [B, H, W, C] as TMA loads boxes of pixels of it; None where it cannot."""
    axes = [axis for pair in phases for axis in pair]
    step, channels = axes[0].step, source.shape[3]
    if any(axis.step != step for axis in axes):
        return None
    # With a step over 1, a block of channels must end with its pixel: the next one follows in the same dimension.
    whole = channels % min(CHANNELS, triton.next_power_of_2(channels)) == 0
    if step > 1 and (not whole or min(axis.first for axis in axes) < -step * FARTHEST.value):
        return None
    viewed = pixel_view(source, step)
    return viewed if viewed is not None and fits(viewed) else None


def _wgrad_tma(
    errors: Tensor,
    source: Tensor,
    weight_shape: tuple[int, ...],
    axes: tuple[Axis, Axis],
    inverse_scale: float,
    splits: int | None,
    target: configs.Target,
) -> Tensor:
    """Partial sums [splits, O, R, S, C] of `conv2d_gradient`, of errors [B, P, Q, O] and what `_tma_view` gave."""
    outputs, channels, height, width = weight_shape
    batch, grid_h, grid_w, _ = errors.shape
    tile, programs = configs.wgrad_tile(target, outputs, channels, height * width)
    images, rows, columns = box(batch, grid_h, grid_w, tile.k)
    boxes = cdiv(batch, images) * cdiv(grid_h, rows) * cdiv(grid_w, columns)
    tiles = height * width * cdiv(outputs, tile.m) * cdiv(channels, tile.n)
    if splits is None:
        # Programs for every multiprocessor, but at least eight boxes each: partial sums cost memory traffic.
        splits = max(1, min(cdiv(programs, tiles), boxes // 8))
    chunk = cdiv(boxes, splits)
    splits = cdiv(boxes, chunk)
    partial = torch.empty((splits, outputs, height, width, channels), dtype=torch.float32, device=errors.device)
    launch(
        wgrad_tma,
        (tiles * splits,),
        errors.device,
        describe(errors, (images, rows, columns, tile.m)),
        describe(source, (images, rows, 1, columns, tile.n)),
        partial,
        *(batch, chunk, channels, outputs),
        Positions.of(*axes),
        inverse_scale,
        ACCUMULATE=accumulation_of(errors, "fp16_mma"),
        STEP=axes[0].step,
        IMAGES=images,
        ROWS=rows,
        COLUMNS=columns,
        BM=tile.m,
        BN=tile.n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partial


def _summed(partial: Tensor, epilogue: Epilogue | None) -> Tensor:
    """[splits, O, R, S, C] summed and rounded, as FP32 [O, C, R, S]."""
    splits, epilogue = len(partial), epilogue or Epilogue()
    # Gradients live long, and the parts must not live as long.
    result = partial[0] if splits == 1 else torch.empty_like(partial[0])
    if splits > 1 or not epilogue.how.is_identity:
        block = block_size(SUMMED, result.numel())
        launch(
            sum_splits,
            (cdiv(result.numel(), block),),
            partial.device,
            partial,
            result,
            result.numel(),
            splits,
            *epilogue.words(),
            ENCODING=epilogue.encoding(partial.device),
            BLOCK=block,
        )
    return result.permute(0, 3, 1, 2)


def _channels_last(t: Tensor) -> Tensor:
    """The tensor as contiguous [.., height, width, channels]; a view where it is channels_last already."""
    return t.permute(0, 2, 3, 1).contiguous()


def _check_geometry(x: Tensor, weight: Tensor, geometry: Conv2dGeometry) -> None:
    if geometry.groups != 1:
        raise ValueError(f"geometry.groups: got {geometry.groups}, expected 1")
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, C, H, W]")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [O, {x.shape[1]}, R, S]")
    if min(output_size(x.shape, weight.shape, geometry)[2:]) < 1:
        raise ValueError(f"x: got {tuple(x.shape[2:])} pixels, expected enough for kernel {tuple(weight.shape[2:])}")


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
