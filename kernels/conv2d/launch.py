"""Two-dimensional convolution products of FP8 (or 16-bit) operands: forward, error (dgrad), weight gradient (wgrad).

Works on channels_last memory; other layouts are copied first, as bytes. Must never round an operand.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from fp8repro.engines.products import Conv2dGeometry
from fp8repro.kernels.conv2d.device import gather_product, weight_gradient
from fp8repro.kernels.conv2d.device_tma import FARTHEST, bulk_gather_product, bulk_weight_gradient
from fp8repro.kernels.matmul.launch import (
    Epilogue,
    accumulation_of,
    check_bias,
    check_operands,
    matmul,
    promoted_by_steps,
    raw_result,
    summed_step,
)
from fp8repro.kernels.quantize.launch import PER_CALL
from fp8repro.kernels.shared import configs
from fp8repro.kernels.shared.launch import cdiv, launch
from fp8repro.kernels.shared.tma import box, describe, fits, pixel_view

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
    bulk: bool | None = None,
) -> Tensor:
    """Forward product.

    Args:
        x: [B, C, H, W], FP8, FP16 or BF16.
        weight: [O, C, R, S].
        bias: FP32 [O].
        geometry: stride, padding, dilation; one group.
        inverse_scale, accumulate, epilogue, bulk: see `matmul`.

    Returns:
        [B, O, P, Q], channels_last.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    epilogue = epilogue or Epilogue()
    check_operands(x, weight, "x", "weight")
    _check_geometry(x, weight, geometry)
    check_bias(bias, weight.shape[0], x.device)
    if _pointwise(weight, geometry):
        return _pixel_product(x, weight.flatten(1).t(), bias, inverse_scale, accumulate, epilogue, bulk)
    axes = [_forward_axis(geometry, axis, x.shape[2 + axis], weight.shape[2 + axis]) for axis in (0, 1)]
    shape = output_size(x.shape, weight.shape, geometry)
    return _gather(x, weight, bias, shape, [axes], inverse_scale, accumulate, epilogue, bulk)


def conv2d_error(
    error: Tensor,
    weight: Tensor,
    input_shape: tuple[int, ...],
    geometry: Conv2dGeometry = Conv2dGeometry(),  # noqa: B008 - frozen
    *,
    inverse_scale: float = 1.0,
    accumulate: str = "promoted",
    epilogue: Epilogue | None = None,
    bulk: bool | None = None,
) -> Tensor:
    """Error product: error [B, O, P, Q], weight [O, C, R, S] -> [B, C, H, W], channels_last.

    A strided convolution is split by the remainder of the input position, so that no tap is multiplied by zero.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    epilogue = epilogue or Epilogue()
    check_operands(error, weight, "error", "weight")
    shape = torch.Size(input_shape)
    _check_geometry(torch.empty(shape, device="meta"), weight, geometry)
    _check_shape("error", error, output_size(shape, weight.shape, geometry))
    if _pointwise(weight, geometry):
        return _pixel_product(error, weight.flatten(1), None, inverse_scale, accumulate, epilogue, bulk)
    # Sums over output channels, which become the contiguous ones: a copy of the weight's bytes.
    turned = weight.transpose(0, 1)
    rows, columns = (_error_axes(geometry, axis, input_shape[2 + axis], weight.shape[2 + axis]) for axis in (0, 1))
    phases = [[row, column] for row in rows for column in columns]
    return _gather(error, turned, None, tuple(input_shape), phases, inverse_scale, accumulate, epilogue, bulk)


def conv2d_gradient(
    error: Tensor,
    x: Tensor,
    weight_shape: tuple[int, ...],
    geometry: Conv2dGeometry = Conv2dGeometry(),  # noqa: B008 - frozen
    *,
    inverse_scale: float = 1.0,
    accumulate: str = "promoted",
    splits: int | None = None,
    bulk: bool | None = None,
) -> Tensor:
    """Weight-gradient product: error [B, O, P, Q], x [B, C, H, W] -> FP32 [O, C, R, S], channels_last; deterministic.

    FP8 instructions want the summed pixels contiguous, which no layout of images gives: with `bulk` the operands
    become FP16 (exact) in front of FP16 instructions, all of whose sums are FP32.

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
    arguments = (error, x, weight_shape, expected, geometry, inverse_scale, splits)
    if configs.bulk_available(x.device) if bulk is None else bulk:
        result = _bulk_gradient(*arguments)
        if result is not None:
            return result
    tile, chosen, programs = configs.choose(x.device, outputs, columns, pixels, 1, splittable=True, halves=False)
    splits = chosen if splits is None else splits
    step = summed_step(tile, x)
    chunk = cdiv(cdiv(pixels, splits), step) * step
    partial = torch.empty((splits, outputs, height, width, channels), dtype=torch.float32, device=x.device)
    g = geometry
    launch(
        weight_gradient,
        (min(programs, splits * cdiv(outputs, tile.m) * cdiv(columns, tile.n)),),
        x.device,
        _channels_last(error),
        _channels_last(x),
        partial,
        inverse_scale,
        pixels,
        chunk,
        expected[2],
        expected[3],
        x.shape[2],
        x.shape[3],
        channels,
        outputs,
        height,
        width,
        *g.stride,
        -g.padding[0],
        -g.padding[1],
        *g.dilation,
        ACCUMULATE=accumulation_of(x, accumulate),
        SPLITS=splits,
        BM=tile.m,
        BN=tile.n,
        BK=step,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return (partial[0] if splits == 1 else partial.sum(0)).permute(0, 3, 1, 2)


def output_size(x: torch.Size, weight: torch.Size, geometry: Conv2dGeometry) -> tuple[int, int, int, int]:
    """Shape [B, O, P, Q] of a convolution's output."""
    sizes = [
        (x[2 + a] + 2 * geometry.padding[a] - geometry.dilation[a] * (weight[2 + a] - 1) - 1) // geometry.stride[a] + 1
        for a in (0, 1)
    ]
    return x[0], weight[0], sizes[0], sizes[1]


# Along one axis: (grid, start, stride, step, first, taps, apart, tap, tap_step), the names of `gather_product`.
Axis = tuple[int, int, int, int, int, int, int, int, int]


def _forward_axis(g: Conv2dGeometry, axis: int, size: int, kernel: int) -> Axis:
    grid = (size + 2 * g.padding[axis] - g.dilation[axis] * (kernel - 1) - 1) // g.stride[axis] + 1
    return grid, 0, 1, g.stride[axis], -g.padding[axis], kernel, g.dilation[axis], 0, 1


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
        axes.append((grid, phase, stride, 1, first, len(taps), -tap_step * dilation // stride, tap, tap_step))
    return axes


def _gather(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, ...],
    phases: list[list[Axis]],
    inverse_scale: float,
    accumulate: str,
    epilogue: Epilogue,
    bulk: bool | None,
) -> Tensor:
    """A launch for each phase, which is a pair of axes; together they fill a result of that shape."""
    result = _empty_channels_last(epilogue, shape, x.device)
    if result.numel() == 0:
        return result
    source, rows_of_weight = _channels_last(x), _channels_last(weight)
    if bulk is None:
        bulk = configs.bulk_available(x.device)
    viewed = None
    if bulk and fits(rows_of_weight.flatten(1, 2)):
        # The axes' fourth and fifth numbers are the step and the first position.
        steps, first = zip(*((axis[3], axis[4]) for axes in phases for axis in axes), strict=True)
        viewed = _bulk_view(source, steps, first)
    outputs, channels, height, width = weight.shape
    pixels = [shape[0] * rows[0] * columns[0] for rows, columns in phases]
    small = not (epilogue.plain or epilogue.values) and (viewed is None or epilogue.how.is_stochastic)
    table = None if viewed is None else configs.BULK_CONVOLUTION_TILES
    # The axes' sixth number is the count of taps.
    summed = [rows[5] * columns[5] * channels for rows, columns in phases]
    choices = [
        configs.choose(x.device, count, outputs, k, 1, splittable=False, halves=False, small=small, bulk=table)
        for count, k in zip(pixels, summed, strict=True)
    ]
    room = all(configs.takes_epilogue(x.device, tile, 1, epilogue.how.rounding) for tile, _, _ in choices)
    apart = epilogue.values and not epilogue.plain and not room
    stored = Epilogue() if apart else epilogue
    for axes, count, (tile, _, programs) in zip(phases, pixels, choices, strict=True):
        by_name: list[tuple[int, ...]] = list(zip(*axes, strict=True))
        grid, start, stride, step, first, taps, apart_by, tap, tap_step = by_name
        shared: tuple[Any, ...] = (bias, raw_result(result), stored.overflows, inverse_scale)
        options: dict[str, Any] = {**stored.options(x.device), "WHOLE_GROUPS": outputs % PER_CALL == 0}
        options |= {"BN": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}
        if viewed is not None:
            block = _channel_block(tile, x)
            images, rows, columns = box(shape[0], *grid, tile.m)
            taps_of_weight = rows_of_weight.flatten(1, 2)
            boxes = cdiv(shape[0], images) * cdiv(grid[0], rows) * cdiv(grid[1], columns)
            launch(
                bulk_gather_product,
                (min(programs, boxes * cdiv(outputs, tile.n)),),
                x.device,
                describe(viewed, (images, rows, 1, columns, block)),
                describe(taps_of_weight, (tile.n, 1, block)),
                *shared,
                *(shape[0], channels, outputs, *grid, shape[2], shape[3]),
                *(*start, *stride, *first, *taps, *apart_by, *tap, *tap_step, width),
                *stored.words(),
                **options,
                ACCUMULATE=promoted_by_steps(accumulation_of(x, accumulate)),
                STEP=step[0],
                IMAGES=images,
                ROWS=rows,
                COLUMNS=columns,
                BK=block,
            )
            continue
        launch(
            gather_product,
            (min(programs, cdiv(count, tile.m) * cdiv(outputs, tile.n)),),
            x.device,
            source,
            rows_of_weight,
            *shared,
            *(shape[0], x.shape[2], x.shape[3], channels, outputs),
            *(*grid, shape[2], shape[3], *start, *stride, *step, *first, *taps, *apart_by, *tap, *tap_step),
            *(width, height * width * channels),
            *stored.words(),
            **options,
            ACCUMULATE=accumulation_of(x, accumulate),
            BM=tile.m,
            BK=summed_step(tile, x),
            GROUP=configs.GROUP,
        )
    if apart:
        epilogue.round(result.movedim(1, -1))
    return result


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
    bulk: bool | None,
) -> Tensor:
    """x [B, C, H, W] times weight [C, O], pixel by pixel."""
    y = matmul(
        _channels_last(x).flatten(0, 2),
        weight,
        bias,
        inverse_scale=inverse_scale,
        accumulate=accumulate,
        epilogue=epilogue,
        bulk=bulk,
    )
    return y.view(x.shape[0], *x.shape[2:], y.shape[1]).permute(0, 3, 1, 2)


def _bulk_view(source: Tensor, steps: tuple[int, ...], first: tuple[int, ...]) -> Tensor | None:
    """The source image as boxes of pixels are read from it; None where the bulk copy engine cannot read it.

    Args:
        source: [B, H, W, C].
        steps: pixels between those that neighbours of a box read, along each axis.
        first: position of the first of them; negative in the padding.
    """
    step, channels = steps[0], source.shape[3]
    if set(steps) != {step}:
        return None
    # With pixels apart, a block of channels that is not whole would go on in the pixel beside.
    whole = channels % min(CHANNELS, triton.next_power_of_2(channels)) == 0
    if step > 1 and (not whole or min(first) < -step * FARTHEST.value):
        return None
    viewed = pixel_view(source, step)
    return viewed if viewed is not None and fits(viewed) else None


def _channel_block(tile: configs.Tile, operand: Tensor) -> int:
    """Channels in one step of a bulk tile: a power of two, at least what an instruction sums."""
    return max(32, min(tile.k // operand.element_size(), triton.next_power_of_2(operand.shape[1])))


def _bulk_gradient(
    error: Tensor,
    x: Tensor,
    weight_shape: tuple[int, ...],
    output: tuple[int, int, int, int],
    g: Conv2dGeometry,
    inverse_scale: float,
    splits: int | None,
) -> Tensor | None:
    """`conv2d_gradient` by the bulk copy engine; None where it cannot."""
    outputs, channels, height, width = weight_shape
    source, errors = _channels_last(x), _channels_last(error)
    if not fits(errors):
        return None
    viewed = _bulk_view(source, g.stride, (-g.padding[0], -g.padding[1]))
    if viewed is None:
        return None
    batch, _, grid_h, grid_w = output
    tile, programs = configs.gradient_tile(x.device, outputs, channels, height * width)
    images, rows, columns = box(batch, grid_h, grid_w, tile.k)
    boxes = cdiv(batch, images) * cdiv(grid_h, rows) * cdiv(grid_w, columns)
    tiles = height * width * cdiv(outputs, tile.m) * cdiv(channels, tile.n)
    if splits is None:
        # Programs for every multiprocessor, but at least eight boxes each: partial sums cost memory traffic.
        splits = max(1, min(cdiv(programs, tiles), boxes // 8))
    chunk = cdiv(boxes, splits)
    splits = cdiv(boxes, chunk)
    partial = torch.empty((splits, outputs, height, width, channels), dtype=torch.float32, device=x.device)
    launch(
        bulk_weight_gradient,
        (tiles * splits,),
        x.device,
        describe(errors, (images, rows, columns, tile.m)),
        describe(viewed, (images, rows, 1, columns, tile.n)),
        partial,
        inverse_scale,
        *(batch, grid_h, grid_w, chunk, channels, outputs, height, width),
        *(-g.padding[0], -g.padding[1], *g.dilation),
        ACCUMULATE=accumulation_of(x, "fp16_mma"),
        STEP=g.stride[0],
        IMAGES=images,
        ROWS=rows,
        COLUMNS=columns,
        BM=tile.m,
        BN=tile.n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return (partial[0] if splits == 1 else partial.sum(0)).permute(0, 3, 1, 2)


def _empty_channels_last(epilogue: Epilogue, shape: tuple[int, ...], device: torch.device) -> Tensor:
    batch, channels, height, width = shape
    return epilogue.empty((batch, height, width, channels), device).permute(0, 3, 1, 2)


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
