"""An LSTM's cells and the gradient of its recurrent weight; codes of hidden states and errors are stored beside them.

Checks arguments and launches. Roundings are those of the arguments; must never keep generator state.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fp8repro.kernels.lstm import device as kernels
from fp8repro.kernels.matmul.launch import FP8_DTYPES, accumulation_of
from fp8repro.kernels.quantize.launch import PER_CALL, random_words, raw_codes
from fp8repro.kernels.shared import codec, configs
from fp8repro.kernels.shared.launch import INTERPRETED, block_size, capability, cdiv, check_device, launch, signed_words
from fp8repro.numerics.formats import FORMATS
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding
from fp8repro.numerics.streams import Stream, StreamSlot

CELL_ROWS, CELL_COLUMNS = 16, 64
GRADIENT_TILE = configs.Tile(64, 64, 128, 4, 3)

_BY_DTYPE = {format.dtype: format for format in FORMATS.values() if format.dtype is not None}


def cell_forward(
    inputs: Tensor,
    product: Tensor,
    cell: Tensor,
    hidden: Tensor,
    new_cell: Tensor,
    how: Rounding | None = None,
    bits: RandomBits = RandomBits(),
    *,
    codes: Tensor | None = None,
    transposed: Tensor | None = None,
    kept: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """One cell: activations, cell state, hidden state and its rounding, in one pass.

    Args:
        inputs, product: FP32 [B, 4 * width], summands of the gates (input, forget, cell, output) before activation.
        cell: FP32 [B, width].
        hidden, new_cell: FP32 [B, width], written.
        how, bits: how the hidden state is rounded to `codes`.
        codes: [B, width] in the format's storage dtype, written.
        transposed: [width, B] of the same dtype, columns contiguous, written.
        kept: tensors like `inputs` and `product`, of dtypes that hold their values, that receive them for
            `cell_backward`.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    rows, width = _check_cell(inputs, product, cell)
    _check("hidden", hidden, (rows, width), cell)
    _check("new_cell", new_cell, (rows, width), cell)
    _check_codes(codes, transposed, how, (rows, width))
    for name, tensor in zip(("kept[0]", "kept[1]"), kept, strict=True):
        if tensor is not None:
            _check(name, tensor, inputs.shape, cell, tuple(_BY_DTYPE))
    grid, options = _tiles(rows, width)
    launch(
        kernels.cell_forward,
        grid,
        cell.device,
        inputs,
        product,
        cell,
        hidden,
        new_cell,
        *(None if t is None else raw_codes(t) for t in (codes, transposed)),
        *(None if t is None else t if t.dtype == torch.float32 else raw_codes(t) for t in kept),
        rows,
        width,
        0 if transposed is None else transposed.stride(0),
        *random_words(bits),
        ENCODING=None if how is None else codec.encoding(how, capability(cell.device)),
        KEPT_INPUTS=_holding(kept[0], cell.device),
        KEPT_PRODUCT=_holding(kept[1], cell.device),
        **options,
    )


def cell_backward(
    grad: Tensor | None,
    recurrent: Tensor | None,
    grad_cell: Tensor,
    kept: tuple[Tensor, Tensor],
    cell: Tensor,
    grad_gates: Tensor,
    codes: Tensor,
    transposed: Tensor,
    how: Rounding,
    bits: RandomBits,
    recurrent_how: Rounding = IDENTITY,
    recurrent_bits: RandomBits = RandomBits(),
) -> None:
    """Gradients of one cell; what `cell_forward` computed on the way is computed again.

    Args:
        grad: FP32 [B, width], gradient of the hidden state as an output; rows may lie apart.
        recurrent: FP32 [parts, B, width], which add up to its gradient as the next step's input; that is rounded with
            `recurrent_how` and `recurrent_bits` before it is added.
        grad_cell: FP32 [B, width], gradient of the new cell state; that of `cell` takes its place.
        kept: [B, 4 * width] each, what `cell_forward` kept, or its `inputs` and `product`.
        cell: FP32 [B, width], as `cell_forward` got it.
        grad_gates: FP32 [B, 4 * width], written: the gradient of the gates before activation.
        codes: [B, 4 * width], written: `grad_gates` rounded with `how` and `bits`.
        transposed: [4 * width, B], columns contiguous, written: the same.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    rows, width = _check_cell(*kept, cell, tuple(_BY_DTYPE))
    _check("grad_cell", grad_cell, (rows, width), cell)
    _check("grad_gates", grad_gates, (rows, 4 * width), cell)
    _check_codes(codes, transposed, how, (rows, 4 * width))
    if recurrent is not None:
        _check("recurrent", recurrent, (*recurrent.shape[:1], rows, width), cell)
    if grad is not None and (grad.shape != cell.shape or grad.dtype != torch.float32 or grad.stride(1) != 1):
        raise ValueError(
            f"grad: got {grad.dtype} of shape {tuple(grad.shape)} and strides {grad.stride()}, expected torch.float32 "
            f"of shape {tuple(cell.shape)} with contiguous columns"
        )
    grid, options = _tiles(rows, width)
    launch(
        kernels.cell_backward,
        grid,
        cell.device,
        grad,
        recurrent,
        grad_cell,
        *kept,
        cell,
        grad_gates,
        raw_codes(codes),
        raw_codes(transposed),
        rows,
        width,
        0 if grad is None else grad.stride(0),
        transposed.stride(0),
        0 if recurrent is None else recurrent.shape[0],
        *random_words(recurrent_bits),
        *random_words(bits),
        RECURRENT=codec.encoding(recurrent_how, capability(cell.device)),
        ENCODING=codec.encoding(how, capability(cell.device)),
        **options,
    )


def summed_gradient(
    error: Tensor,
    x: Tensor,
    steps: int,
    how: Rounding,
    seed: int,
    streams: Sequence[Stream],
    accumulate: str = "promoted",
) -> Tensor:
    """The gradient of a weight that `steps` products share: each is rounded, and the last is added first.

    Args:
        error: FP8 [M, steps * B], columns contiguous: of each step the transposed error.
        x: FP8 [N, steps * B], columns contiguous: of each step the transposed input.
        steps: how many.
        how: how each step's product is rounded.
        seed, streams: where its random bits come from; elements are counted row-major in [M, N].
        accumulate: as in `kernels.matmul`.

    Returns:
        FP32 [M, N].

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    check_device("error", error)
    shared = error.shape[-1] if error.dim() == 2 else 0
    if steps < 1 or shared % steps or len(streams) != steps:
        raise ValueError(f"steps: got {steps} for {len(streams)} streams and {shared} columns, expected a divisor")
    for name, t in (("error", error), ("x", x)):
        if t.dim() != 2 or t.dtype not in FP8_DTYPES or t.stride(1) != 1 or t.shape[1] != shared:
            given = f"{t.dtype} of shape {tuple(t.shape)} and strides {t.stride()}"
            raise ValueError(f"{name}: got {given}, expected FP8 [N, {shared}] with contiguous columns")
    m, n, rows = error.shape[0], x.shape[0], shared // steps
    total = torch.empty((m, n), dtype=torch.float32, device=error.device)
    tile = configs.choose(configs.target_of(error.device), m, n, rows, 1, splittable=False, halves=False)[0]
    tile = tile if INTERPRETED else GRADIENT_TILE
    launch(
        kernels.summed_gradient,
        (cdiv(m, tile.m) * cdiv(n, tile.n),),
        error.device,
        error,
        x,
        stream_words(streams, error.device),
        total,
        steps,
        rows,
        m,
        n,
        error.stride(0),
        x.stride(0),
        *signed_words(seed),
        ENCODING=codec.encoding(how, capability(error.device)),
        ACCUMULATE=accumulation_of(error, accumulate, tile.k),
        WHOLE_GROUPS=n % PER_CALL == 0,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return total


def stream_words(streams: Sequence[Stream], device: torch.device) -> Tensor:
    """The words of several streams as a kernel reads them: int32 [len(streams), 2] on the device."""
    slots = [s for s in streams if isinstance(s, StreamSlot)]
    if slots:
        # Read when it runs, so that a replayed graph finds those of its step.
        return torch.stack([s.table[s.index] for s in slots])
    numbers = [s & (1 << 64) - 1 for s in streams if not isinstance(s, StreamSlot)]
    words = torch.frombuffer(array("Q", numbers), dtype=torch.int32).view(-1, 2)
    return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words.to(device)


def _tiles(rows: int, width: int) -> tuple[tuple[int, int], dict[str, Any]]:
    height, block = block_size(CELL_ROWS, rows, 256), block_size(CELL_COLUMNS, width, 256)
    options = {"WHOLE_GROUPS": width % PER_CALL == 0, "ROWS": height, "BLOCK": block}
    return (cdiv(rows, height), cdiv(width, block)), options


def _holding(kept: Tensor | None, device: torch.device) -> codec.Encoding | None:
    return None if kept is None else codec.encoding(Rounding(_BY_DTYPE[kept.dtype]), capability(device))


def _check_cell(
    inputs: Tensor, product: Tensor, cell: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> tuple[int, int]:
    check_device("cell", cell)
    if cell.dim() != 2:
        raise ValueError(f"cell: got shape {tuple(cell.shape)}, expected [B, width]")
    rows, width = cell.shape
    _check("cell", cell, (rows, width), cell)
    _check("inputs", inputs, (rows, 4 * width), cell, dtypes)
    _check("product", product, (rows, 4 * width), cell, dtypes)
    return rows, width


def _check_codes(codes: Tensor | None, transposed: Tensor | None, how: Rounding | None, shape: tuple[int, int]) -> None:
    if how is None or codes is None:
        if codes is not None or transposed is not None:
            raise ValueError("codes: got a tensor or a rounding without the other, expected both")
        return
    _check("codes", codes, shape, codes, (how.format.dtype,))
    if transposed is not None and (
        transposed.shape != shape[::-1] or transposed.dtype != codes.dtype or transposed.stride(1) != 1
    ):
        given = f"{transposed.dtype} of shape {tuple(transposed.shape)} and strides {transposed.stride()}"
        raise ValueError(f"transposed: got {given}, expected {codes.dtype} of shape {shape[::-1]}, contiguous columns")


def _check(
    name: str,
    t: Tensor,
    shape: Sequence[int],
    beside: Tensor,
    dtypes: tuple[torch.dtype | None, ...] = (torch.float32,),
) -> None:
    if tuple(t.shape) != tuple(shape) or t.dtype not in dtypes or t.device != beside.device or not t.is_contiguous():
        given = f"{t.dtype} of shape {tuple(t.shape)} and strides {t.stride()} on {t.device}"
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: got {given}, expected contiguous {wanted} of shape {tuple(shape)}")
