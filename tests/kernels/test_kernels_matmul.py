"""FP8 matrix products against FP64: interpreted on a CPU, compiled on a GPU."""

import itertools

import numpy as np
import pytest
import torch
from numeric import assert_close

from fp8repro.kernels.matmul.launch import Epilogue, matmul
from fp8repro.kernels.shared.configs import Tile
from fp8repro.kernels.shared.launch import INTERPRETED, counted_launches
from fp8repro.numerics import reference
from fp8repro.numerics.formats import BF16, E4M3, E5M2, FP16
from fp8repro.numerics.rounding import RandomBits, Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float8_e5m2, torch.float8_e4m3fn)
# Compiled for sm_90, each partial sum of 128 carries the short accumulator's truncation.
TOLERANCE = 3e-4 if torch.cuda.is_available() else 1e-6


def operand(*shape, dtype=torch.float8_e5m2, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def small_integers(*shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-3, 4, shape, generator=generator).float().to(dtype).to(DEVICE)


def assert_near(given, a, b, bias=None):
    expected = a.double() @ b.double() + (0 if bias is None else bias.double())
    size = (a.double().abs() @ b.double().abs()).clamp_min(1e-30)
    assert_close(given, expected, TOLERANCE, scale=size)


@pytest.mark.parametrize(("dtype_a", "dtype_b"), list(itertools.product(DTYPES, DTYPES)))
def test_small_integers_are_exact(dtype_a, dtype_b):
    a, b = small_integers(37, 150, dtype=dtype_a), small_integers(150, 70, dtype=dtype_b)
    assert_close(matmul(a, b), a.double() @ b.double())


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 129, 33), (64, 48, 200), (130, 17, 257), (3, 600, 1000)])
def test_any_shape_and_layout(shape):
    m, n, k = shape
    a, b, bias = operand(m, k), operand(k, n, seed=1), torch.randn(n, device=DEVICE)
    a_transposed, b_transposed = operand(k, m).t(), operand(n, k, seed=1).t()
    for left, right in itertools.product((a, a_transposed), (b, b_transposed)):
        assert_near(matmul(left, right, bias), left, right, bias)


def test_batched_operands_with_odd_strides():
    # As attention gives them: heads split from one tensor, then transposed.
    q = operand(2, 9, 3, 8).transpose(1, 2)
    k = operand(2, 11, 3, 8, seed=1).transpose(1, 2)
    assert_near(matmul(q, k.transpose(-1, -2)), q, k.transpose(-1, -2))


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0)])
def test_empty_sizes(shape):
    m, n, k = shape
    bias = torch.randn(n, device=DEVICE)
    assert_close(matmul(operand(m, k), operand(k, n), bias), bias.expand(m, n))
    assert matmul(operand(0, m, k), operand(0, k, n)).shape == (0, m, n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_operands(dtype):
    a, b = operand(33, 140, dtype=dtype), operand(140, 20, dtype=dtype)
    assert_near(matmul(a, b), a, b)


def test_infinity_and_nan_pass_through():
    a, b = operand(4, 130), torch.ones(130, 3).to(torch.float8_e5m2).to(DEVICE)
    codes = a.view(torch.uint8)
    codes[1, 5], codes[2, 129] = 0x7C, 0x7F
    result = matmul(a, b)
    assert result[1].isinf().all()
    assert result[2].isnan().all()
    assert result[[0, 3]].isfinite().all()


def test_scale_is_undone_exactly():
    a, b = operand(9, 40), operand(40, 6)
    assert_close(matmul(a, b, inverse_scale=2.0**-9), matmul(a, b) * 2.0**-9)


@pytest.mark.parametrize("splits", [2, 5])
def test_split_sums_are_the_same_at_every_run(splits):
    a, b, bias = operand(20, 700), operand(700, 30), torch.randn(30, device=DEVICE)
    result = matmul(a, b, bias, splits=splits)
    assert_near(result, a, b, bias)
    assert_close(result, matmul(a, b, bias, splits=splits))


@pytest.mark.parametrize("n", [5, 70, 128, 200])
def test_two_tiles_side_by_side(n):
    a, b, bias = small_integers(37, 150, dtype=DTYPES[0]), small_integers(150, n, dtype=DTYPES[1]), torch.ones(n)
    result = matmul(a, b, bias.to(DEVICE), tile=Tile(64, 32, 128, 4, 3, halves=2))
    assert_close(result, a.double() @ b.double() + 1)


@pytest.mark.parametrize("accumulate", ["promoted", "promoted_32", "fp16_mma", "unpromoted"])
def test_accumulations_agree(accumulate):
    a, b = small_integers(70, 300, dtype=DTYPES[0]), small_integers(300, 40, dtype=DTYPES[1])
    assert_close(matmul(a, b, accumulate=accumulate), a.double() @ b.double())


@pytest.mark.parametrize("format", [E5M2, E4M3, FP16, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("columns", [41, 40])
def test_epilogue_rounds_like_the_reference(format, rounding, columns):
    a, b = operand(2, 37, 150), (operand(2, 150, columns).float() * 64).to(torch.float8_e5m2)
    exact = matmul(a, b)
    epilogue = Epilogue(Rounding(format, rounding), RandomBits(7, 2**63 + 1))
    result = matmul(a, b, epilogue=epilogue).cpu()
    expected = reference.round_to_format(exact.cpu(), Rounding(format, rounding), RandomBits(7, 2**63 + 1))
    assert result.dtype == torch.float32
    assert_close(result, expected)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("codes", [False, True])
def test_results_are_those_of_a_pass_of_their_own(rounding, splits, codes):
    a, b = operand(37, 700), (operand(700, 41).float() * 2048).to(torch.float8_e5m2)
    exact, bias = matmul(a, b, splits=splits), 1e4 * torch.randn(41, device=DEVICE)
    for given, expected in ((None, exact), (bias, exact + bias)):
        # A sum in parts is rounded once it is complete.
        epilogue = Epilogue(Rounding(E5M2, rounding), RandomBits(7, 2**63 + 1), codes)
        with counted_launches() as launches:
            result = matmul(a, b, given, epilogue=epilogue, splits=splits)
        assert result.dtype == (torch.float8_e5m2 if codes else torch.float32)
        if INTERPRETED:
            assert launches["round_flat"] == (splits > 1)
        assert bool((expected.abs().double() > E5M2.max).any())
        expected = reference.round_to_format(expected.cpu(), epilogue.how, epilogue.bits)
        assert_close(result.float().cpu(), expected)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("a, b", (torch.zeros(2, 3), torch.zeros(3, 2))),
        ("a, b", (operand(2, 3), operand(3, 2, dtype=torch.float16))),
        ("b", (operand(2, 3), operand(2, 3))),
        ("b", (operand(4, 2, 3), operand(5, 3, 2))),
        ("bias", (operand(2, 3), operand(3, 2), torch.zeros(3, device=DEVICE))),
    ],
)
def test_bad_argument_is_named(argument, arguments):
    with pytest.raises(ValueError, match=f"^{argument}: got .*, expected "):
        matmul(*(a.to(DEVICE) for a in arguments))


def short_sum(products, interval):
    """Sums as Hopper's FP8 tensor cores are reported to: 32 products at a time, aligned to the largest, 14 bits kept.

    Args:
        products: FP64 [K, columns].
        interval: elements after which the partial sum is added in FP32; None never.
    """
    total = np.zeros(products.shape[1], np.float32)
    partial = np.zeros(products.shape[1])
    for start in range(0, len(products), 32):
        terms = np.concatenate([products[start : start + 32], partial[None]])
        largest = np.frexp(np.abs(terms).max(0))[1]
        quantum = np.ldexp(1.0, largest - 14)
        # Truncated, not rounded: the error has a bias, and grows with the number of additions.
        partial = (np.trunc(terms / quantum) * quantum).sum(0)
        if interval is not None and (start + 32) % interval == 0:
            total += partial.astype(np.float32)
            partial = np.zeros_like(partial)
    return total + partial


def test_short_accumulator_needs_promotion():
    k, columns = 16384, 512
    a = operand(k, columns).double().cpu().numpy()
    b = operand(k, columns, seed=1).double().cpu().numpy()
    products = a * b
    exact = products.sum(0)
    error = {
        interval: np.linalg.norm(short_sum(products, interval) - exact) / np.linalg.norm(exact)
        for interval in (32, 64, 128, None)
    }
    assert error[32] < error[64] < error[128] < error[None]
    assert error[128] <= 2e-4 < 1e-3 < error[None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's accumulator")
def test_accumulator_of_this_gpu():
    a, b = operand(512, 16384), operand(512, 16384, seed=1).t()
    exact = a.double() @ b.double()
    error = {
        form: float((matmul(a, b, accumulate=form, splits=1) - exact).norm() / exact.norm())
        for form in ("promoted", "promoted_64", "promoted_32", "fp16_mma", "unpromoted")
    }
    assert error["promoted"] <= 2e-4, error
    assert error["fp16_mma"] <= 2e-4, error
