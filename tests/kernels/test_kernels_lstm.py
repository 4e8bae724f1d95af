"""LSTM kernels against torch's autograd in FP64, and their roundings against the reference."""

import pytest
import torch
from numeric import assert_close

from fp8repro import quantize
from fp8repro.kernels.lstm.launch import cell_backward, cell_forward, summed_gradient
from fp8repro.kernels.matmul.launch import Epilogue, matmul
from fp8repro.numerics.formats import BF16, E4M3, E5M2, FP32, get_format
from fp8repro.numerics.rounding import IDENTITY, RandomBits, Rounding
from fp8repro.numerics.streams import StreamTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Widths whose rows share Philox blocks, and widths whose rows do not.
SHAPES = [(3, 16), (19, 72), (2, 5), (1, 1)]
STOCHASTIC = Rounding(E5M2, "stochastic")
BITS, OTHER_BITS = RandomBits(3, 2**63 + 17), RandomBits(3, 5)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE)


def rounded(x, how, bits):
    options = (how.format, how.rounding, how.overflow, bits.seed, bits.stream)
    return quantize(x, *options, out="float32")


def empty(*shape, fmt=FP32):
    return torch.empty(shape, dtype=fmt.dtype, device=DEVICE)


def same_bytes(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def reference_cell(inputs, product, cell):
    i, f, g, o = (inputs + product).chunk(4, dim=-1)
    new = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * new.tanh(), new


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 30.0])
def test_a_cell_equals_its_formula_in_fp64(shape, magnitude):
    rows, width = shape
    inputs, product = magnitude * draw(rows, 4 * width), magnitude * draw(rows, 4 * width, seed=1)
    cell, hidden, new = draw(rows, width), empty(*shape), empty(*shape)
    cell_forward(inputs, product, cell, hidden, new)
    for given, expected in zip(
        (hidden, new), reference_cell(*(t.double() for t in (inputs, product, cell))), strict=True
    ):
        assert_close(given, expected, 1e-6, scale=expected.abs() + 0.2)


def test_hyperbolic_tangents_are_as_exact_near_zero_as_elsewhere():
    x = torch.logspace(-30, 1.5, 999, device=DEVICE).repeat(2)[None]
    x[:, :999] *= -1
    # With an open input gate and a closed forget gate the new cell is the tangent itself.
    gates = torch.cat([torch.full_like(x, 200), torch.full_like(x, -200), x, torch.full_like(x, 200)], dim=1)
    hidden, new = empty(1, 1998), empty(1, 1998)
    cell_forward(gates, torch.zeros_like(gates), torch.ones_like(x), hidden, new)
    expected = x.double().tanh()
    assert_close(new, expected, 1e-6, scale=expected.abs())
    assert_close(hidden, expected.tanh(), 1e-6, scale=expected.abs())


def test_gates_at_their_limits():
    gates = torch.tensor([-torch.inf, torch.inf, torch.nan, -200.0, 200.0, 0.0], device=DEVICE).repeat(4)[None]
    cell, hidden, new = draw(1, 6), empty(1, 6), empty(1, 6)
    cell_forward(gates, torch.zeros_like(gates), cell, hidden, new)
    expected = reference_cell(gates.double(), torch.zeros_like(gates).double(), cell.double())
    for given, values in zip((hidden, new), expected, strict=True):
        torch.testing.assert_close(given.double(), values, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("how", [Rounding(E5M2), STOCHASTIC, Rounding(E4M3, "stochastic")], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_are_rounded_in_both_layouts_and_summands_kept(shape, how):
    rows, width = shape
    inputs, product = (quantize(draw(rows, 4 * width, seed=s), fmt, out="float32") for s, fmt in ((0, E5M2), (1, BF16)))
    cell, hidden, new = draw(rows, width), empty(*shape), empty(*shape)
    codes, transposed = empty(*shape, fmt=how.format), empty(width, 3, rows, fmt=how.format)
    kept = (empty(rows, 4 * width, fmt=E5M2), empty(rows, 4 * width, fmt=BF16))
    outputs = {"codes": codes, "transposed": transposed[:, 1], "kept": kept}
    cell_forward(inputs, product, cell, hidden, new, how, BITS, **outputs)
    assert torch.equal(codes.float(), rounded(hidden, how, BITS))
    assert same_bytes(transposed[:, 1], codes.t())
    assert torch.equal(kept[0].float(), inputs)
    assert torch.equal(kept[1].float(), product)


def run_backward(rows, width, how, recurrent_how, kept, parts=2, has_grad=True, has_recurrent=True):
    """Arguments of a backward pass, what it wrote, and the gradients in FP64 of the same gradient of the state."""
    inputs, product, cell = *(t.float() for t in kept), draw(rows, width)
    grad = draw(rows, 3, width, seed=2)[:, 1] if has_grad else None
    recurrent = draw(parts, rows, width, seed=3) if has_recurrent else None
    grad_cell, incoming = draw(rows, width, seed=4), draw(rows, width, seed=4)
    gates, codes = empty(rows, 4 * width), empty(rows, 4 * width, fmt=how.format)
    transposed = empty(4 * width, 2, rows, fmt=how.format)
    arguments = (grad, recurrent, grad_cell, kept, cell, gates, codes, transposed[:, 1])
    cell_backward(*arguments, how, BITS, recurrent_how, OTHER_BITS)
    total = torch.zeros(rows, width, device=DEVICE) if grad is None else grad
    if recurrent is not None:
        total = total + rounded(recurrent[0] + recurrent[1], recurrent_how, OTHER_BITS)
    leaves = [t.double().requires_grad_() for t in (inputs, product, cell)]
    expected = torch.autograd.grad(reference_cell(*leaves), leaves, [total.double(), incoming.double()])
    return (gates, grad_cell, codes, transposed[:, 1]), (expected[0], expected[2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", ["fp32", "e5m2", "bf16"])
@pytest.mark.parametrize("recurrent_how", [IDENTITY, STOCHASTIC], ids=str)
def test_a_cells_gradients_equal_autograds_in_fp64(shape, fmt, recurrent_how):
    rows, width = shape
    dtype = get_format(fmt).dtype
    kept = tuple(draw(rows, 4 * width, seed=s).to(dtype) for s in (0, 1))
    (gates, grad_cell, codes, transposed), expected = run_backward(rows, width, STOCHASTIC, recurrent_how, kept)
    assert_close(gates, expected[0], 1e-6, norm=True)
    assert_close(grad_cell, expected[1], 1e-6, norm=True)
    assert torch.equal(codes.float(), rounded(gates, STOCHASTIC, BITS))
    assert same_bytes(transposed, codes.t())


@pytest.mark.parametrize(("has_grad", "has_recurrent"), [(False, True), (True, False), (False, False)])
def test_gradients_that_are_absent_are_zeros(has_grad, has_recurrent):
    kept = (draw(4, 32), draw(4, 32, seed=1))
    absent = {"has_grad": has_grad, "has_recurrent": has_recurrent}
    (gates, grad_cell, *_), expected = run_backward(4, 8, Rounding(E5M2), IDENTITY, kept, **absent)
    assert_close(gates, expected[0], 1e-6, norm=True)
    assert_close(grad_cell, expected[1], 1e-6, norm=True)


@pytest.mark.parametrize("how", [IDENTITY, Rounding(E5M2), STOCHASTIC], ids=str)
@pytest.mark.parametrize(("m", "n", "rows", "steps"), [(24, 16, 8, 3), (20, 5, 13, 1), (70, 66, 150, 2)])
def test_summed_gradients_are_rounded_at_each_step(m, n, rows, steps, how):
    error = draw(m, steps, rows).to(torch.float8_e5m2)
    x = draw(n, steps + 1, rows, seed=1).to(torch.float8_e4m3fn)
    streams = [2**64 - 1 - step for step in range(steps)]
    given = summed_gradient(error.flatten(1), x[:, :steps].flatten(1), steps, how, 7, streams)
    expected = torch.zeros(m, n, device=DEVICE)
    for step in reversed(range(steps)):
        epilogue = Epilogue(how, RandomBits(7, streams[step]))
        expected += matmul(error[:, step], x[:, step].t(), epilogue=epilogue)
    assert torch.equal(given, expected)
    exact = torch.einsum("msb,nsb->mn", error.double(), x[:, :steps].double())
    assert_close(given, exact, 0.2 if how.format is E5M2 else 1e-3, norm=True)


def test_streams_may_lie_in_memory():
    error, x = (draw(8, 24, seed=s).to(torch.float8_e5m2) for s in (0, 1))
    table = StreamTable(torch.device(DEVICE), 8)
    table.slot(("another", 0, "weight_gradient", "gradient"))
    slots = [table.slot(("layer", step, "weight_gradient", "gradient")) for step in (1, 0, 2)]
    table.refresh(lambda module, call, *_: 2**40 + call)
    given = summed_gradient(error, x, 3, STOCHASTIC, 7, slots)
    assert torch.equal(given, summed_gradient(error, x, 3, STOCHASTIC, 7, [2**40 + call for call in (1, 0, 2)]))


def test_arguments_that_do_not_fit_are_refused():
    gates, cell, code = draw(2, 16), draw(2, 4), empty(2, 4, fmt=E5M2)
    good = (gates, gates, cell, empty(2, 4), empty(2, 4))
    with pytest.raises(ValueError, match=r"product: got .*\(2, 8\).*expected contiguous .*\(2, 16\)"):
        cell_forward(gates, draw(2, 8), *good[2:])
    with pytest.raises(ValueError, match="codes: got a tensor or a rounding without the other"):
        cell_forward(*good, codes=code)
    with pytest.raises(ValueError, match=r"transposed: got .*expected torch.float8_e5m2 of shape \(4, 2\)"):
        cell_forward(*good, STOCHASTIC, BITS, codes=code, transposed=code)
    with pytest.raises(ValueError, match=r"steps: got 3 for 3 streams and 8 columns"):
        summed_gradient(empty(4, 8, fmt=E5M2), empty(4, 8, fmt=E5M2), 3, STOCHASTIC, 0, [0, 1, 2])
    with pytest.raises(ValueError, match=r"x: got torch.float32.*expected FP8 \[N, 8\]"):
        summed_gradient(empty(4, 8, fmt=E5M2), draw(4, 8), 2, STOCHASTIC, 0, [0, 1])
