"""What lies between a Transformer's products, one launch each: see `device`.

Checks arguments and launches. Roundings are those of the arguments; must never keep generator state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fp8repro.kernels.attention import device as kernels
from fp8repro.kernels.quantize.launch import GRID_LIMIT, PER_CALL, raw_codes
from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.launch import INTERPRETED, block_size, capability, cdiv, check_device, launch, signed_words
from fp8repro.kernels.shared.tma import ALIGNMENT
from fp8repro.numerics.formats import FORMATS
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding

TILE_ROWS, TILE_COLUMNS = 32, 64
NO_BITS = RandomBits()
ROW_ELEMENTS, ROW_GRADIENTS = 8192, 4096  # a program, of whole rows
MOST_COLUMNS = 8192  # of a row that a program holds whole

_BY_DTYPE = {format.dtype: format for format in FORMATS.values() if format.dtype is not None}


@dataclass(frozen=True)
class Rerounded:
    """A tensor on its way from one product's result to another product's operand.

    Attributes:
        x: FP32 [P, Q, rows, columns], a view of a contiguous tensor that it begins; or [parts, P, Q, rows, columns],
            which add up to it.
        codes: [P, Q, rows, columns] in the format's storage dtype, columns contiguous, written.
        turned: [P, Q, columns, rows] of the same dtype, rows contiguous, written; or None.
        before: random bits of the first rounding; elements count as they lie in the memory of `x`.
        bits: those of the second; elements count as they lie in the memory of `codes`.
    """

    x: Tensor
    codes: Tensor
    turned: Tensor | None = None
    before: RandomBits = NO_BITS
    bits: RandomBits = NO_BITS

    def layout(self) -> tuple[int, ...]:
        """Outer planes, rows, parts, their distance, and strides, as the kernel takes them."""
        parts, size = (1, 0) if self.x.dim() == 4 else (self.x.shape[0], self.x.stride(0))
        turned = (0, 0, 0) if self.turned is None else self.turned.stride()[:3]
        return (
            self.codes.shape[0],
            self.codes.shape[2],
            parts,
            size,
            *self.x.stride()[-4:],
            *self.codes.stride()[:3],
            *turned,
        )


def empty_operand(*shape: int, like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An uninitialized tensor of codes whose rows lie so far apart that TMA can load them."""
    pitch = cdiv(shape[-1], ALIGNMENT) * ALIGNMENT
    return like.new_empty((*shape[:-1], pitch), dtype=dtype)[..., : shape[-1]]


def reround(
    tensors: Sequence[Rerounded],
    how: Rounding,
    before: Rounding = IDENTITY,
    *,
    scale: float = 1.0,
    relu: bool = False,
    mask: Tensor | None = None,
) -> None:
    """Round one to three tensors of as many inner planes and columns to `before`, then `how`; codes in both layouts.

    Args:
        tensors: what is read and written.
        how, before: the roundings.
        scale: between them the first tensor is multiplied by it,
        relu: and negative values become zero,
        mask: and so do values where this tensor, laid out as the first one's codes, is not over zero.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    first = tensors[0]
    _, inner, _, columns = first.codes.shape
    for tensor in tensors:
        _check_rerounded(tensor, how, inner, columns)
    outer = max(t.codes.shape[0] for t in tensors)
    if mask is not None and (mask.shape != first.codes.shape or mask.stride() != first.codes.stride()):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, expected that and the strides of the codes")
    if len(tensors) > 3 or outer * inner > GRID_LIMIT:
        raise ValueError(f"tensors: got {len(tensors)} of {outer * inner} planes, expected 3 and {GRID_LIMIT} at most")
    layouts = [t.layout() for t in tensors]
    padding = (0,) * (3 - len(tensors))
    rows = max(t.codes.shape[2] for t in tensors)
    height, block = block_size(TILE_ROWS, rows, 256), block_size(TILE_COLUMNS, columns, 256)
    words = [signed_words(bits.stream) for bits in (*(t.before for t in tensors), *[NO_BITS] * len(padding))]
    words += [signed_words(bits.stream) for bits in (*(t.bits for t in tensors), *[NO_BITS] * len(padding))]
    launch(
        kernels.reround,
        (cdiv(rows, height) * cdiv(columns, block), outer * inner, len(tensors)),
        first.codes.device,
        tuple(t.x for t in tensors),
        tuple(raw_codes(t.codes) for t in tensors),
        tuple(None if t.turned is None else raw_codes(t.turned) for t in tensors),
        mask,
        *layouts,
        *padding,
        scale,
        columns,
        inner,
        *signed_words(first.bits.seed),
        *(word for pair in words for word in pair),
        FIRST=codec.encoding(before, capability(first.codes.device)),
        ENCODING=codec.encoding(how, capability(first.codes.device)),
        RELU=relu,
        COUNT=len(tensors),
        X_GROUPS=all(_in_groups(s[:2], s[2], s[3]) for s in (t.x.stride()[-4:] for t in tensors[::2])),
        GROUPS=all(_in_groups(s[:2], s[2], s[3]) for s in (t.codes.stride() for t in tensors)),
        ROWS=height,
        BLOCK=block,
    )


def _in_groups(planes: Sequence[int], row: int, column: int) -> bool:
    """Whether eight neighbours in a row draw from one Philox block."""
    return column == 1 and all(stride % PER_CALL == 0 for stride in (*planes, row))


def softmax(
    scores: Tensor,
    mask: Tensor | None,
    how: Rounding,
    codes: Tensor,
    turned: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Codes of the softmax of scores + mask over the last dimension, in both layouts.

    Args:
        scores: FP32 [P, Q, T, S], contiguous.
        mask: FP32, broadcastable to [P, 1, T, S].
        how: rounding without random bits.
        codes: [P, Q, T, S] in the format's storage dtype, made by `empty_operand`, written.
        turned: [P, Q, S, T], likewise.
        kept: like scores in shape, in a dtype that holds their values: receives them for `softmax_backward`.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    grid, sizes, options = _softmax_arguments(scores, mask, codes, turned)
    if how.is_stochastic:
        raise ValueError(f"how: got {how}, expected a rounding without random bits")
    held = None if kept is None else codec.encoding(Rounding(_BY_DTYPE[kept.dtype]), capability(scores.device))
    launch(
        kernels.softmax_forward,
        grid,
        scores.device,
        scores,
        mask,
        raw_codes(codes),
        None if turned is None else raw_codes(turned),
        None if kept is None else raw_codes(kept),
        *sizes,
        ENCODING=codec.encoding(how, capability(scores.device)),
        KEPT=held,
        **options,
    )


def softmax_backward(
    grad: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    how: Rounding,
    bits: RandomBits,
    codes: Tensor,
    turned: Tensor,
    before: Rounding = IDENTITY,
    before_bits: RandomBits = NO_BITS,
) -> None:
    """Codes of the gradient of the scores, in both layouts.

    Args:
        grad: FP32 [P, Q, T, S], contiguous, gradient of the weights; rounded with `before` first.
        scores: as `softmax` got or kept them.
        mask: as `softmax` got it.
        how, bits: how the result is rounded; elements count row-major in [P, Q, T, S], as those of `grad`.
        codes, turned: as those of `softmax`, written.
        before, before_bits: how `grad` is rounded.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    grid, sizes, options = _softmax_arguments(grad, mask, codes, turned)
    if scores.shape != grad.shape or not scores.is_contiguous():
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected {tuple(grad.shape)}, contiguous")
    launch(
        kernels.softmax_backward,
        grid,
        grad.device,
        grad,
        scores,
        mask,
        raw_codes(codes),
        raw_codes(turned),
        *sizes,
        *signed_words(bits.seed),
        *signed_words(before_bits.stream),
        *signed_words(bits.stream),
        FIRST=codec.encoding(before, capability(grad.device)),
        ENCODING=codec.encoding(how, capability(grad.device)),
        GROUPS=grad.shape[-1] % PER_CALL == 0,
        **options,
    )


def _softmax_arguments(
    x: Tensor, mask: Tensor | None, codes: Tensor, turned: Tensor | None
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    check_device("scores", x)
    if x.dim() != 4 or x.dtype != torch.float32 or not x.is_contiguous() or not 0 < x.shape[3] <= MOST_COLUMNS:
        given = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"scores: got {given}, expected contiguous torch.float32 [P, Q, T, S], S to {MOST_COLUMNS}")
    outer, inner, rows, columns = x.shape
    for name, t, shape in (("codes", codes, x.shape), ("turned", turned, (outer, inner, columns, rows))):
        if t is not None and (t.shape != shape or t.stride(-1) != 1):
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, expected {tuple(shape)}, the last dimension contiguous"
            )
    strides = (0, 0)
    if mask is not None:
        expanded = mask.expand(outer, 1, rows, columns)
        if mask.dtype != torch.float32 or expanded.stride(3) != 1:
            raise ValueError(
                f"mask: got {mask.dtype} of strides {mask.stride()}, expected torch.float32, contiguous rows"
            )
        strides = (expanded.stride(0), expanded.stride(2))
    block = triton.next_power_of_2(columns)
    height = block_size(min(TILE_ROWS, max(1, 4096 // block)), rows, max(1, (1 << 16) // block))
    pitches = (codes.stride(2), 0 if turned is None else turned.stride(2))
    return (
        (cdiv(rows, height), outer * inner),
        (rows, columns, inner, *strides, *pitches),
        {"ROWS": height, "BLOCK": block},
    )


@dataclass(frozen=True)
class Dropout:
    """Which elements of [rows, width] are dropped: those whose 16 random bits are under `threshold`."""

    threshold: int
    bits: RandomBits

    @staticmethod
    def of(p: float, bits: RandomBits) -> Dropout:
        """Drop a share `p`, rounded to 2^-16."""
        return Dropout(round(p * 65536), bits)

    @property
    def scale(self) -> float:
        """What the others are multiplied by."""
        return 65536 / (65536 - self.threshold)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: Dropout,
    how: Rounding,
    codes: Tensor,
    turned: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Layer normalization of x + dropout(branch).

    Args:
        x, branch: FP32 [rows, width], contiguous.
        weight, bias: FP32 [width].
        eps: added to the variance.
        dropout: what of the branch is dropped.
        how: rounding of the result without random bits.
        codes, turned: [rows, width] and, made by `empty_operand`, [width, rows] in the format's storage dtype, written.

    Returns:
        FP32 [rows, width]; and what `residual_norm_backward` wants: the sum, mean and rstd.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    rows, width = _check_rows(x, branch, codes, turned)
    total, y = torch.empty_like(x), torch.empty_like(x)
    mean, rstd = x.new_empty(rows), x.new_empty(rows)
    height, options = _row_tiles(ROW_ELEMENTS, rows, width)
    launch(
        kernels.residual_norm_forward,
        (cdiv(rows, height),),
        x.device,
        x,
        branch,
        weight,
        bias,
        total,
        y,
        raw_codes(codes),
        None if turned is None else raw_codes(turned),
        mean,
        rstd,
        rows,
        width,
        0 if turned is None else turned.stride(0),
        eps,
        *_dropped(dropout),
        DROPOUT=dropout.threshold > 0,
        ENCODING=codec.encoding(how, capability(x.device)),
        **options,
    )
    return y, (total, mean, rstd)


def residual_norm_backward(
    grad: Tensor,
    kept: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    dropout: Dropout,
    how: Rounding,
    bits: RandomBits,
    codes: Tensor,
    turned: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum x + dropout(branch) and of weight and bias; that of the branch as codes.

    Args:
        grad: FP32 [rows, width], contiguous.
        kept, weight, dropout: as `residual_norm` gave and got them.
        how, bits: how the gradient of the branch is rounded; elements count row-major.
        codes, turned: as those of `residual_norm`, written.

    Returns:
        FP32 [rows, width], and [2, width] of weight and bias.

    Raises:
        ValueError: an argument does not fit; nothing was launched.
    """
    rows, width = _check_rows(grad, kept[0], codes, turned)
    grad_sum = torch.empty_like(grad)
    height, options = _row_tiles(ROW_GRADIENTS, rows, width)
    programs = min(cdiv(rows, height), 4 if INTERPRETED else 256)
    partial = grad.new_empty(programs, 2, width)
    launch(
        kernels.residual_norm_backward,
        (programs,),
        grad.device,
        grad,
        kept[0],
        weight,
        *kept[1:],
        grad_sum,
        raw_codes(codes),
        raw_codes(turned),
        partial,
        rows,
        width,
        turned.stride(0),
        *_dropped(dropout),
        *signed_words(bits.stream),
        DROPOUT=dropout.threshold > 0,
        ENCODING=codec.encoding(how, capability(grad.device)),
        **options,
    )
    return grad_sum, partial.sum(0)


def _dropped(dropout: Dropout) -> tuple[Any, ...]:
    bits = dropout.bits
    return (dropout.scale, dropout.threshold, *signed_words(bits.seed), *signed_words(bits.stream))


def _row_tiles(elements: int, rows: int, width: int) -> tuple[int, dict[str, Any]]:
    block = triton.next_power_of_2(width)
    height = block_size(max(1, elements // block), rows, max(1, (1 << 16) // block))
    return height, {"WHOLE_GROUPS": width % PER_CALL == 0, "ROWS": height, "BLOCK": block, "num_warps": 8}


def _check_rows(x: Tensor, other: Tensor, codes: Tensor, turned: Tensor | None) -> tuple[int, int]:
    check_device("x", x)
    if x.dim() != 2 or x.dtype != torch.float32 or not x.is_contiguous() or not 0 < x.shape[1] <= MOST_COLUMNS:
        given = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"x: got {given}, expected contiguous torch.float32 [rows, width], width to {MOST_COLUMNS}")
    for name, t, shape in (("branch", other, x.shape), ("codes", codes, x.shape)):
        if t.shape != shape or not t.is_contiguous():
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {tuple(shape)}, contiguous")
    if turned is not None and (turned.shape != x.shape[::-1] or turned.stride(1) != 1):
        raise ValueError(
            f"turned: got shape {tuple(turned.shape)}, expected {tuple(x.shape[::-1])}, contiguous columns"
        )
    return x.shape[0], x.shape[1]


def _check_rerounded(t: Rerounded, how: Rounding, inner: int, columns: int) -> None:
    check_device("x", t.x)
    shape = (t.codes.shape[0], inner, t.codes.shape[2], columns)
    if t.codes.shape != shape or t.codes.dtype != how.format.dtype or t.codes.stride(3) != 1:
        given = f"{t.codes.dtype} of shape {tuple(t.codes.shape)}"
        raise ValueError(f"codes: got {given}, expected {how.format.dtype} of shape {shape} with contiguous columns")
    if t.x.shape[-4:] != shape or t.x.dim() > 5 or t.x.dtype != torch.float32:
        raise ValueError(f"x: got {t.x.dtype} of shape {tuple(t.x.shape)}, expected torch.float32 of shape {shape}")
    turned = (*shape[:2], shape[3], shape[2])
    if t.turned is not None and (t.turned.shape != turned or t.turned.stride(3) != 1):
        raise ValueError(f"turned: got shape {tuple(t.turned.shape)}, expected {turned} with contiguous columns")
