"""Triton kernels of an LSTM over a sequence: a cell forward and backward, and the gradient of the recurrent weight.

A cell's roundings (hidden state, errors) happen in the pass that computes what is rounded. Arithmetic is FP32; nothing
here may choose a rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp8repro.kernels.shared import codec
from fp8repro.kernels.shared.codec import RANDOM_WORDS, RandomWords
from fp8repro.kernels.shared.tiles import draws_of_tile, multiply_add, rounded_tile, to_fp32

ERROR_WORDS = ["error_seed0", "error_seed1", "error_stream0", "error_stream1"]


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); no exponential overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh(x):
    """Hyperbolic tangent; by a series near zero, where a difference of exponentials loses digits."""
    square = x * x
    series = square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x + x * (square * (-1.0 / 3.0 + square * (2.0 / 15.0 + series)))
    magnitude = tl.abs(x)
    small = tl.exp(-2.0 * magnitude)
    y = (1.0 - small) / (1.0 + small)
    return tl.where(magnitude < 0.25, series, tl.where(x < 0, -y, y))


@triton.jit
def _gate(inputs_ptr, product_ptr, offset, mask):
    """One gate before its activation."""
    inputs = to_fp32(tl.load(inputs_ptr + offset, mask=mask, other=0.0))
    product = to_fp32(tl.load(product_ptr + offset, mask=mask, other=0.0))
    return inputs, product


@triton.jit
def _keep(kept_ptr, offset, value, mask, KEPT: tl.constexpr):
    """Store values of a format as codes, or as they are where the format is FP32."""
    if kept_ptr is not None:
        if KEPT.mantissa_bits == 23:
            tl.store(kept_ptr + offset, value, mask=mask)
        else:
            code = codec.encode(value, None, KEPT)
            tl.store(kept_ptr + offset, code.to(kept_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RANDOM_WORDS)
def cell_forward(
    inputs_ptr,
    product_ptr,
    cell_ptr,
    hidden_ptr,
    new_cell_ptr,
    codes_ptr,
    transposed_ptr,
    kept_inputs_ptr,
    kept_product_ptr,
    rows,
    width,
    pitch,
    seed0,
    seed1,
    stream0,
    stream1,
    ENCODING: tl.constexpr,
    KEPT_INPUTS: tl.constexpr,
    KEPT_PRODUCT: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A cell of which `inputs` and `product` [rows, 4 * width] are the summands of its gates before activation.

    Where pointers are given: the codes of the new hidden state rounded to ENCODING, those of its transpose, whose rows
    lie `pitch` apart, and the summands in the formats KEPT_INPUTS and KEPT_PRODUCT, which hold their values.
    """
    words = RandomWords(seed0, seed1, stream0, stream1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < width)
    offset = row * (4 * width) + column
    for gate in tl.static_range(4):
        inputs, product = _gate(inputs_ptr, product_ptr, offset + gate * width, mask)
        _keep(kept_inputs_ptr, offset + gate * width, inputs, mask, KEPT_INPUTS)
        _keep(kept_product_ptr, offset + gate * width, product, mask, KEPT_PRODUCT)
        total = inputs + product
        if gate == 0:
            i = sigmoid(total)
        elif gate == 1:
            f = sigmoid(total)
        elif gate == 2:
            g = tanh(total)
        else:
            o = sigmoid(total)
    offset = row * width + column
    cell = f * tl.load(cell_ptr + offset, mask=mask, other=0.0) + i * g
    hidden = o * tanh(cell)
    tl.store(new_cell_ptr + offset, cell, mask=mask)
    tl.store(hidden_ptr + offset, hidden, mask=mask)
    if codes_ptr is not None:
        draw = draws_of_tile(row * width, first, words, ENCODING, WHOLE_GROUPS, BLOCK)
        code = codec.encode(hidden, draw, ENCODING).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + offset, code, mask=mask)
        if transposed_ptr is not None:
            place = transposed_ptr + tl.trans(column).to(tl.int64) * pitch + tl.trans(row)
            tl.store(place, tl.trans(code), mask=tl.trans(mask))


@triton.jit
def _store_error(
    gradient, gate, row, first, mask, grad_ptr, codes_ptr, transposed_ptr, width, pitch, words,
    ENCODING: tl.constexpr, WHOLE_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a gate's gradient and, rounded, its codes in both layouts."""
    column = gate * width + first + tl.arange(0, BLOCK)[None, :]
    start = row * (4 * width)
    tl.store(grad_ptr + start + column, gradient, mask=mask)
    draw = draws_of_tile(start, gate * width + first, words, ENCODING, WHOLE_GROUPS, BLOCK)
    code = codec.encode(gradient, draw, ENCODING).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + start + column, code, mask=mask)
    place = transposed_ptr + tl.trans(column).to(tl.int64) * pitch + tl.trans(row)
    tl.store(place, tl.trans(code), mask=tl.trans(mask))


@triton.jit(do_not_specialize=[*RANDOM_WORDS, *ERROR_WORDS, "parts"])
def cell_backward(
    grad_ptr,
    recurrent_ptr,
    grad_cell_ptr,
    inputs_ptr,
    product_ptr,
    cell_ptr,
    grad_gates_ptr,
    codes_ptr,
    transposed_ptr,
    rows,
    width,
    grad_pitch,
    pitch,
    parts,
    seed0,
    seed1,
    stream0,
    stream1,
    error_seed0,
    error_seed1,
    error_stream0,
    error_stream1,
    RECURRENT: tl.constexpr,
    ENCODING: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the gates [rows, 4 * width], and of the cell state in place of that of the new one.

    Args:
        grad_ptr, recurrent_ptr: what adds up to the gradient of the new hidden state: the outputs' (rows `grad_pitch`
            apart) and the next step's product, whose `parts` add up to what is rounded to RECURRENT first; None where
            there is none.
        inputs_ptr, product_ptr, cell_ptr: as `cell_forward` got or kept them; activations are computed again.
        codes_ptr, transposed_ptr: the gates' gradients rounded to ENCODING, and the transpose, rows `pitch` apart.
    """
    words = RandomWords(seed0, seed1, stream0, stream1)
    error_words = RandomWords(error_seed0, error_seed1, error_stream0, error_stream1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < width)
    offset = row * width + column
    grad = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + row * grad_pitch + column, mask=mask, other=0.0)
    if recurrent_ptr is not None:
        recurrent = tl.load(recurrent_ptr + offset, mask=mask, other=0.0)
        for part in range(1, parts):
            place = recurrent_ptr + tl.cast(part, tl.int64) * rows * width + offset
            recurrent += tl.load(place, mask=mask, other=0.0)
        grad += rounded_tile(recurrent, row * width, first, words, RECURRENT, WHOLE_GROUPS, BLOCK)
    gates = row * (4 * width) + column
    inputs, product = _gate(inputs_ptr, product_ptr, gates, mask)
    i = sigmoid(inputs + product)
    inputs, product = _gate(inputs_ptr, product_ptr, gates + width, mask)
    f = sigmoid(inputs + product)
    inputs, product = _gate(inputs_ptr, product_ptr, gates + 2 * width, mask)
    g = tanh(inputs + product)
    inputs, product = _gate(inputs_ptr, product_ptr, gates + 3 * width, mask)
    o = sigmoid(inputs + product)
    cell = tl.load(cell_ptr + offset, mask=mask, other=0.0)
    squashed = tanh(f * cell + i * g)
    grad_cell = tl.load(grad_cell_ptr + offset, mask=mask, other=0.0)
    grad_cell += grad * o * (1.0 - squashed * squashed)
    tl.store(grad_cell_ptr + offset, grad_cell * f, mask=mask)
    for gate in tl.static_range(4):
        if gate == 0:
            gradient = grad_cell * g * (i * (1.0 - i))
        elif gate == 1:
            gradient = grad_cell * cell * (f * (1.0 - f))
        elif gate == 2:
            gradient = grad_cell * i * (1.0 - g * g)
        else:
            gradient = grad * squashed * (o * (1.0 - o))
        _store_error(
            gradient, gate, row, first, mask, grad_gates_ptr, codes_ptr, transposed_ptr, width, pitch, error_words,
            ENCODING, WHOLE_GROUPS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=("steps", "seed0", "seed1"))
def summed_gradient(
    error_ptr,
    x_ptr,
    streams_ptr,
    total_ptr,
    steps,
    rows,
    M,
    N,
    error_pitch,
    x_pitch,
    seed0,
    seed1,
    ENCODING: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WHOLE_GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """total [M, N] = the sum over time steps, from the last one, of error @ x, each product rounded to ENCODING.

    error [M, steps * rows] and x [N, steps * rows] have `rows` columns a step; rows lie their pitches apart.
    streams [steps, 2]: words of each step's stream.
    """
    tiles_n = tl.cdiv(N, BN)
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    first = tl.program_id(0) % tiles_n * BN
    n = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows beyond the end are read from the start instead and not stored: no mask in the loop.
    a_rows = error_ptr + (m % M).to(tl.int64)[:, None] * error_pitch
    b_rows = x_ptr + (n % N).to(tl.int64)[None, :] * x_pitch
    row = m.to(tl.int64)[:, None] * N
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for back in range(steps):
        step = steps - 1 - back
        product = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, rows, BK):
            inside = start + k < rows
            at = step * rows + start + k
            a = tl.load(a_rows + at[None, :], mask=inside[None, :], other=0.0)
            b = tl.load(b_rows + at[:, None], mask=inside[:, None], other=0.0)
            product = multiply_add(a, b, product, ACCUMULATE)
        place = streams_ptr + 2 * step
        words = RandomWords(seed0, seed1, place, place + 1)
        total += rounded_tile(product, row, first, words, ENCODING, WHOLE_GROUPS, BN)
    tl.store(total_ptr + row + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))
