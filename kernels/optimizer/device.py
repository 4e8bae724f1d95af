"""Triton kernels of the optimizer step over many tensors in one launch: norm and finite check, then the update.

A table of addresses stands for the tensors, so that a model of many small parameters costs few launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import STOCHASTIC
from fp8repro.kernels.shared.tables import draws_of_block, tensor_at, words_of

# Columns of the table of tensors (int64).
GRAD = tl.constexpr(0)
MASTER = tl.constexpr(1)
STATE0 = tl.constexpr(2)
STATE1 = tl.constexpr(3)
WEIGHT = tl.constexpr(4)
COUNT = tl.constexpr(5)
MATRIX = tl.constexpr(6)  # rows and columns in memory, see `tables.draws_of_block`
UPDATED = tl.constexpr(8)
COLUMNS = tl.constexpr(9)

# What the loss scale and the clipping are, FP64 in device memory.
INVERSE_SCALE = tl.constexpr(0)
CLIP_NORM = tl.constexpr(1)  # the largest number: none
TERMS = 2
# An optimizer's numbers at a step, FP64 in device memory, as torch names them. Momentum is SGD's, or the first beta;
# the corrections are 1 - beta^step, for either beta; at the first step SGD's momentum begins.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
BETA2 = tl.constexpr(3)
EPS = tl.constexpr(4)
CORRECTION1 = tl.constexpr(5)
CORRECTION2 = tl.constexpr(6)
IS_FIRST = tl.constexpr(7)
NUMBERS = 8
# What the check of the gradients leaves, FP64.
BAD = tl.constexpr(0)
FACTOR = tl.constexpr(1)
NORM = tl.constexpr(2)

SGD = tl.constexpr(0)
ADAM = tl.constexpr(1)
ADAMW = tl.constexpr(2)


@triton.jit
def _fp32(numbers_ptr, which: tl.constexpr):
    return tl.load(numbers_ptr + which).to(tl.float32)


@triton.jit
def gradient_norms(table, chunks, terms_ptr, partial_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """For each chunk, the sum of squares of the unscaled gradient and the number of its non-finite values."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * chunk) * COLUMNS
    offset = tl.load(chunks + 2 * chunk + 1) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < tl.load(row + COUNT)
    gradient = tl.load(tensor_at(row, GRAD, tl.float32, ALIGNED) + offset, mask=mask, other=0.0)
    gradient *= _fp32(terms_ptr, INVERSE_SCALE)
    finite = tl.abs(gradient) < float("inf")
    # In FP64, which the squares of FP32 values do not overflow.
    exact = gradient.to(tl.float64)
    tl.store(partial_ptr + 2 * chunk, tl.sum(exact * exact))
    tl.store(partial_ptr + 2 * chunk + 1, tl.sum((mask & (finite == 0)).to(tl.int32)).to(tl.float64))


@triton.jit(do_not_specialize=["count"])
def gradient_control(partial_ptr, count, terms_ptr, control_ptr, BLOCK: tl.constexpr):
    """Sums of all chunks, in one program and one order, so that scheduling changes no bit."""
    local = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float64)
    bad = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        mask = first + local < count
        squares += tl.load(partial_ptr + 2 * (first + local), mask=mask, other=0.0)
        bad += tl.load(partial_ptr + 2 * (first + local) + 1, mask=mask, other=0.0)
    norm = tl.sqrt(tl.sum(squares))
    tl.store(control_ptr + BAD, tl.sum(bad))
    clip_norm = tl.load(terms_ptr + CLIP_NORM)
    tl.store(control_ptr + FACTOR, clip_norm / tl.maximum(clip_norm, norm + 1e-6))
    tl.store(control_ptr + NORM, norm)


@triton.jit(do_not_specialize=["master_streams", "weight_streams", "seed0", "seed1"])
def update(
    table,
    chunks,
    terms_ptr,
    control_ptr,
    numbers_ptr,
    master_streams,
    weight_streams,
    seed0,
    seed1,
    RULE: tl.constexpr,
    NESTEROV: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    MASTER_TYPE: tl.constexpr,
    MASTER_ENCODING: tl.constexpr,
    WEIGHT_ENCODING: tl.constexpr,
    HAS_UPDATED: tl.constexpr,
    PERMUTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk: unscale, clip, update in FP32, round to the master, round the master to the next FP8 weight.

    Any non-finite gradient value (`gradient_control`) skips all. Streams are int64, one a tensor.
    """
    if tl.load(control_ptr + BAD) == 0:
        chunk = tl.program_id(0).to(tl.int64)
        tensor = tl.load(chunks + 2 * chunk)
        row = table + tensor * COLUMNS
        first = tl.load(chunks + 2 * chunk + 1) * BLOCK
        # Eight elements a thread, as in `quantize.device.round_flat`.
        offset = first + tl.max_contiguous(tl.arange(0, BLOCK), 8)
        mask = offset < tl.load(row + COUNT)
        gradient = tl.load(tensor_at(row, GRAD, tl.float32, ALIGNED) + offset, mask=mask, other=0.0)
        gradient *= _fp32(terms_ptr, INVERSE_SCALE)
        gradient *= _fp32(control_ptr, FACTOR)

        lr = _fp32(numbers_ptr, LR)
        weight_decay = _fp32(numbers_ptr, WEIGHT_DECAY)
        momentum = _fp32(numbers_ptr, MOMENTUM)
        master_ptr = tensor_at(row, MASTER, MASTER_TYPE, ALIGNED) + offset
        value = tl.load(master_ptr, mask=mask, other=0.0).to(tl.float32)
        if RULE == ADAMW:
            value *= 1 - lr * weight_decay
        else:
            gradient += weight_decay * value
        state0_ptr = tensor_at(row, STATE0, tl.float32, ALIGNED) + offset
        if RULE == SGD:
            if HAS_MOMENTUM:
                buffer = momentum * tl.load(state0_ptr, mask=mask, other=0.0) + gradient
                # Not the sum with zero, which has no sign.
                buffer = tl.where(tl.load(numbers_ptr + IS_FIRST) != 0, gradient, buffer)
                tl.store(state0_ptr, buffer, mask=mask)
                gradient = gradient + momentum * buffer if NESTEROV else buffer
            value -= lr * gradient
        else:
            beta2 = _fp32(numbers_ptr, BETA2)
            eps = _fp32(numbers_ptr, EPS)
            correction1 = _fp32(numbers_ptr, CORRECTION1)
            correction2 = _fp32(numbers_ptr, CORRECTION2)
            state1_ptr = tensor_at(row, STATE1, tl.float32, ALIGNED) + offset
            mean = tl.load(state0_ptr, mask=mask, other=0.0)
            mean += (1 - momentum) * (gradient - mean)
            square = beta2 * tl.load(state1_ptr, mask=mask, other=0.0) + (1 - beta2) * gradient * gradient
            tl.store(state0_ptr, mean, mask=mask)
            tl.store(state1_ptr, square, mask=mask)
            value -= lr / correction1 * mean / (tl.sqrt(square) / tl.sqrt(correction2) + eps)

        if HAS_UPDATED:
            tl.store(tensor_at(row, UPDATED, tl.float32, ALIGNED) + offset, value, mask=mask)
        if MASTER_ENCODING.mantissa_bits < 23:
            draw = offset
            if MASTER_ENCODING.rounding == STOCHASTIC:
                words = words_of(tl.load(master_streams + tensor), seed0, seed1)
                draw = draws_of_block(words, first, offset, row + MATRIX, PERMUTED, BLOCK)
            code = codec.encode(value, draw, MASTER_ENCODING)
            value = codec.decode(code, MASTER_ENCODING)
        # The values lie in the master's set: the conversion is exact.
        tl.store(master_ptr, value.to(MASTER_TYPE), mask=mask)
        if WEIGHT_ENCODING is not None:
            draw = offset
            if WEIGHT_ENCODING.rounding == STOCHASTIC:
                words = words_of(tl.load(weight_streams + tensor), seed0, seed1)
                draw = draws_of_block(words, first, offset, row + MATRIX, PERMUTED, BLOCK)
            code = codec.encode(value, draw, WEIGHT_ENCODING)
            tl.store(tensor_at(row, WEIGHT, tl.uint8, ALIGNED) + offset, code.to(tl.uint8), mask=mask)
