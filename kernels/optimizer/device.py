"""Triton kernels of the optimizer step over many tensors in one launch: norm and finite check, then the update.

A table of addresses stands for the tensors, so that a model of many small parameters costs few launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import STOCHASTIC, RandomWords

# Columns of the table of tensors (int64).
GRAD = tl.constexpr(0)
MASTER = tl.constexpr(1)
STATE0 = tl.constexpr(2)
STATE1 = tl.constexpr(3)
WEIGHT = tl.constexpr(4)
COUNT = tl.constexpr(5)
MASTER_STREAM = tl.constexpr(6)
WEIGHT_STREAM = tl.constexpr(7)
ROWS = tl.constexpr(8)
PER_ROW = tl.constexpr(9)
UPDATED = tl.constexpr(10)
COLUMNS = tl.constexpr(11)

SGD = tl.constexpr(0)
ADAM = tl.constexpr(1)
ADAMW = tl.constexpr(2)


@triton.jit
def _address(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    # Loads are vectors only where the compiler knows the alignment.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit(do_not_specialize=["inverse_scale"])
def gradient_norms(table, chunks, partial_ptr, inverse_scale, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """For each chunk, the sum of squares of the unscaled gradient and the number of its non-finite values."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * chunk) * COLUMNS
    offset = tl.load(chunks + 2 * chunk + 1) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < tl.load(row + COUNT)
    gradient = tl.load(_address(row, GRAD, tl.float32, ALIGNED) + offset, mask=mask, other=0.0) * inverse_scale
    finite = tl.abs(gradient) < float("inf")
    # In FP64, which the squares of FP32 values do not overflow.
    exact = gradient.to(tl.float64)
    tl.store(partial_ptr + 2 * chunk, tl.sum(exact * exact))
    tl.store(partial_ptr + 2 * chunk + 1, tl.sum((mask & (finite == 0)).to(tl.int32)).to(tl.float64))


@triton.jit
def _draws(row, STREAM: tl.constexpr, first, offset, seed, PERMUTED: tl.constexpr, BLOCK: tl.constexpr):
    """Random draws of a chunk's elements, in the order in which they count."""
    stream = tl.load(row + STREAM)
    words = RandomWords(seed[0], seed[1], (stream & 0xFFFFFFFF).to(tl.uint32), (stream >> 32).to(tl.uint32))
    if PERMUTED:
        # Matrices that are [rows, columns] in memory and are counted as [columns, rows].
        rows = tl.load(row + ROWS)
        columns = tl.load(row + PER_ROW)
        inner = offset % (rows * columns)
        index = offset - inner + inner % columns * rows + inner // columns
        draw = codec.draw_of_index(index, words)
    else:
        group = first // 8 + tl.arange(0, BLOCK // 8)
        w0, w1, w2, w3 = codec.words_of_blocks(group, words)
        draw = tl.reshape(codec.draws_of_words(w0, w1, w2, w3), [BLOCK])
    return draw


class Numbers(NamedTuple):
    """An optimizer's numbers at a step, all FP32.

    Attributes:
        lr, weight_decay, eps: as torch names them.
        momentum: SGD's momentum, or the first beta.
        beta2: the second beta.
        correction1, correction2: 1 - beta^step, for either beta.
    """

    lr: Any
    weight_decay: Any
    momentum: Any
    beta2: Any
    eps: Any
    correction1: Any
    correction2: Any


@triton.jit(do_not_specialize=["inverse_scale", "seed0", "seed1"])
def update(
    table,
    chunks,
    control_ptr,
    inverse_scale,
    numbers,
    seed0,
    seed1,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    FIRST: tl.constexpr,
    MASTER_TYPE: tl.constexpr,
    MASTER_ENCODING: tl.constexpr,
    WEIGHT_ENCODING: tl.constexpr,
    HAS_UPDATED: tl.constexpr,
    PERMUTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk: unscale, clip, update in FP32, round to the master, round the master to the next FP8 weight.

    `control` holds the number of non-finite gradient values and the clipping factor; any non-finite one skips all.
    """
    lr, weight_decay, momentum, beta2, eps, correction1, correction2 = numbers
    if tl.load(control_ptr) == 0:
        chunk = tl.program_id(0).to(tl.int64)
        row = table + tl.load(chunks + 2 * chunk) * COLUMNS
        first = tl.load(chunks + 2 * chunk + 1) * BLOCK
        # Eight elements a thread, as in `quantize.device.round_flat`.
        offset = first + tl.max_contiguous(tl.arange(0, BLOCK), 8)
        mask = offset < tl.load(row + COUNT)
        gradient = tl.load(_address(row, GRAD, tl.float32, ALIGNED) + offset, mask=mask, other=0.0) * inverse_scale
        gradient *= tl.load(control_ptr + 1).to(tl.float32)

        master_ptr = _address(row, MASTER, MASTER_TYPE, ALIGNED) + offset
        value = tl.load(master_ptr, mask=mask, other=0.0).to(tl.float32)
        if RULE == ADAMW:
            value *= 1 - lr * weight_decay
        else:
            gradient += weight_decay * value
        state0_ptr = _address(row, STATE0, tl.float32, ALIGNED) + offset
        if RULE == SGD:
            if HAS_MOMENTUM:
                buffer = gradient if FIRST else momentum * tl.load(state0_ptr, mask=mask, other=0.0) + gradient
                tl.store(state0_ptr, buffer, mask=mask)
                gradient = gradient + momentum * buffer if NESTEROV else buffer
            value -= lr * gradient
        else:
            state1_ptr = _address(row, STATE1, tl.float32, ALIGNED) + offset
            mean = tl.load(state0_ptr, mask=mask, other=0.0)
            mean += (1 - momentum) * (gradient - mean)
            square = beta2 * tl.load(state1_ptr, mask=mask, other=0.0) + (1 - beta2) * gradient * gradient
            tl.store(state0_ptr, mean, mask=mask)
            tl.store(state1_ptr, square, mask=mask)
            value -= lr / correction1 * mean / (tl.sqrt(square) / tl.sqrt(correction2) + eps)

        if HAS_UPDATED:
            tl.store(_address(row, UPDATED, tl.float32, ALIGNED) + offset, value, mask=mask)
        if MASTER_ENCODING.mantissa_bits < 23:
            draw = offset
            if MASTER_ENCODING.rounding == STOCHASTIC:
                draw = _draws(row, MASTER_STREAM, first, offset, (seed0, seed1), PERMUTED, BLOCK)
            code = codec.encode(value, draw, MASTER_ENCODING)
            value = codec.decode(code, MASTER_ENCODING)
        # The values lie in the master's set: the conversion is exact.
        tl.store(master_ptr, value.to(MASTER_TYPE), mask=mask)
        if WEIGHT_ENCODING is not None:
            draw = offset
            if WEIGHT_ENCODING.rounding == STOCHASTIC:
                draw = _draws(row, WEIGHT_STREAM, first, offset, (seed0, seed1), PERMUTED, BLOCK)
            code = codec.encode(value, draw, WEIGHT_ENCODING)
            tl.store(_address(row, WEIGHT, tl.uint8, ALIGNED) + offset, code.to(tl.uint8), mask=mask)
